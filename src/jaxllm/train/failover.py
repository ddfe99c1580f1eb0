"""The step of a run that has lost workers: those that live train every shard of the batch (MeCeFO, arXiv 2510.16415).

A run of n workers cuts each batch into n shards; with m workers alive each has up to k = ceil(n / m) of them, in slots.
Which shards those are is data (:class:`FailoverPlan`): one program serves every pattern of failures with the same m and k.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig, one_of, positive, require
from jaxllm.model.functional import Params, map_named
from jaxllm.train.degraded import MIXERS, POLICY, RULES, Degraded, letter_of, make_refresh, ranks
from jaxllm.train.loss import LossSums
from jaxllm.train.optim import OptimConfig
from jaxllm.train.state import Leaf, TrainPlan
from jaxllm.train.step import StepSettings, gradients, make_train_step
from pallas_kernels.materialise import hold
from parallel.failover.ordered import sum_in_order
from parallel.mesh import AXES, ROWS, MeshShape, make_mesh
from parallel.order import in_turn
from parallel.sharding import Placement

AXIS = "data"
METHODS = ("mecefo", "exact", "drop")


@dataclass(frozen=True)
class FailoverSettings:
    """What a run does about shards whose worker has died.

    Attributes:
        method: "mecefo": a neighbour trains them, and while it does two jobs its gradients are cheaper ones; "exact": it
            trains them in full, and shards are summed in their order, so that parameters are, bit for bit, those of an
            undisturbed run with this method; "drop": nobody does.
        rank: mecefo: of weight gradients; "full": nothing is left out of them; None: a sixteenth of the model's width.
        refresh: mecefo: steps after which the bases of low-rank gradients are made anew.
        policy: mecefo: rule of each letter, "skip" (mixers only), "low_rank" or "exact"; letters that are not given have
            :data:`jaxllm.train.degraded.POLICY`'s.
        recompute: mecefo: sub-blocks keep their inputs only and are computed again in backward; stages of pipelines are
            so whatever it says.
    """

    method: str = "mecefo"
    rank: int | str | None = None
    refresh: int = 100
    policy: Mapping[str, str] = field(default_factory=dict)
    recompute: bool = True

    def __post_init__(self) -> None:
        one_of("failover.method", self.method, *METHODS)
        positive(**{"failover.refresh": self.refresh})
        if isinstance(self.rank, str):
            require(self.rank == "full", "failover.rank", self.rank, 'must be an integer, "full" or None')
        elif self.rank is not None:
            positive(**{"failover.rank": self.rank})
        for letter, rule in self.policy.items():
            require(letter in POLICY, "failover.policy", letter, f"letters are {', '.join(POLICY)}")
            one_of(f"failover.policy[{letter!r}]", rule, *RULES)
            fits = rule != "skip" or letter in MIXERS
            allowed = "feed-forward blocks are not skipped; choose low_rank or exact"
            require(fits, f"failover.policy[{letter!r}]", rule, allowed)
        object.__setattr__(self, "policy", {**POLICY, **self.policy})

    @property
    def every_step(self) -> bool:
        """Whether steps of a healthy world, too, are those of :func:`make_failover_step`; else `make_train_step`'s."""
        return self.method == "exact"

    def jobs(self, jobs: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """What living workers train of what an assignment gives them, their own shard first."""
        return tuple(tuple(own[:1] if self.method == "drop" else own) for own in jobs)

    def make_bases(self, cfg: ModelConfig) -> Any:
        """The compiled ``(params, previous) -> bases`` of a plan (:func:`jaxllm.train.degraded.make_refresh`).

        Raises:
            ConfigError: the rank is above that of a weight.
        """
        return make_refresh(cfg, self.policy, self.rank)

    def skipped(self, cfg: ModelConfig) -> frozenset[str]:
        """Letters of the model that neighbours skip in backward.

        Raises:
            ConfigError: they are all of the model.
        """
        letters = frozenset(letter for letter in cfg.letters if self.policy[letter] == "skip")
        allowed = f"pattern={cfg.pattern!r} would have no gradient from who does two jobs; skip fewer letters"
        require(letters != set(cfg.letters), "failover.policy", dict(self.policy), allowed)
        return letters


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FailoverPlan:
    """Who trains what in one step; the same arrays on every worker.

    Attributes:
        shards: i32[m, k]; numbers of the shards in the slots of each living worker, -1 where a slot is idle; busy slots
            come first.
        degraded: bool[m, k]; slots whose gradients may be cheaper: all of a worker that does more than one job.
        bases: method mecefo: V1 by dotted path (:meth:`FailoverSettings.make_bases`).
    """

    shards: Leaf
    degraded: Leaf
    bases: Any = None


def failover_plan(jobs: Sequence[Sequence[int]], slots: int, bases: Any = None) -> FailoverPlan:
    """The arrays of an assignment.

    Args:
        jobs: shards of each of the m living workers, its own first (:meth:`FailoverSettings.jobs`).
        slots: k.
        bases: for method mecefo.

    Raises:
        ValueError: a worker has more jobs than slots, or none, or a shard is trained twice.
    """
    given = [shard for own in jobs for shard in own]
    if len(set(given)) < len(given):
        raise ValueError(f"jobs={jobs}: a shard stands there twice; each is trained by one worker")
    if not all(1 <= len(own) <= slots for own in jobs):
        raise ValueError(f"jobs={jobs}: every living worker must have 1 to slots={slots} of them")
    shards = np.full((len(jobs), slots), -1, np.int32)
    for worker, own in enumerate(jobs):
        shards[worker, : len(own)] = own
    degraded = np.array([[len(own) > 1] * slots for own in jobs])
    return FailoverPlan(shards, degraded, bases)


def make_failover_step(
    cfg: ModelConfig,
    optim: OptimConfig,
    settings: StepSettings | None = None,
    failover: FailoverSettings | None = None,
    place: Placement | None = None,
) -> Any:
    """The compiled step ``(state, batch, plan) -> (state, Metrics)`` of m living workers; it never donates ``state``.

    A step that fails because a worker dies in it leaves the state of the last one, from which the survivors go on.

    Args:
        cfg: model.
        optim: optimiser and schedule.
        settings: of the step; ``accum_steps`` cuts each shard.
        failover: what to do about shards without a worker. Gradients of a skipped sub-block are averaged over the
            shards of those who do one job; where nobody does, its parameters and moments stay as they are.
        place: the m devices, along ``data``; None: one. The state is whole on each, the batch lies as
            :func:`parallel.mesh.batch_sharding` says.

    Returns:
        A jitted function. Leaves of the batch are [m * k * (B / n), ...]: for each worker k slots of one shard's rows.
        Idle slots are not computed, but their segments must be 0 and their targets -1. ``plan.failover`` is a
        :class:`FailoverPlan`.

    Raises:
        ConfigError: devices along another axis than ``data``, or an objective that is not a sum over shards.
    """
    settings, failover = settings or StepSettings(), failover or FailoverSettings()
    place = place or Placement(make_mesh(MeshShape(), jax.local_devices()[:1]))
    _check(cfg, settings, place)
    cheap = failover.method == "mecefo"
    skipped = failover.skipped(cfg) if cheap else frozenset()
    bounds = ranks(cfg, failover.policy, failover.rank) if cheap else {}

    def one(params: Params, rng: Any, plan: FailoverPlan, part: PackedBatch, slot: Array) -> _Found:
        """Of one shard: the gradient, the sums, and the weight of the tokens that skipped sub-blocks have learnt from."""

        def exact(params: Params, part: PackedBatch) -> _Found:
            grads, sums = gradients(cfg, params, part, settings, rng)
            return grads, sums, sums.weight

        def cheaper(params: Params, part: PackedBatch) -> _Found:
            degraded = Degraded(skipped, plan.bases or {}, failover.recompute)
            grads, sums = gradients(cfg, params, part, settings, rng, degraded=degraded)
            return grads, sums, jnp.zeros_like(sums.weight)

        if not cheap:
            return exact(params, part)
        # Neither branch holds a collective: devices may take different ones.
        return jax.lax.cond(plan.degraded[jax.lax.axis_index(AXIS), slot], cheaper, exact, params, part)

    def differentiate(
        params: Params, batch: PackedBatch, rng: Any, plan: TrainPlan
    ) -> tuple[Params, LossSums, Params | None, None]:
        who = plan.failover
        if not isinstance(who, FailoverPlan):
            raise ValueError(f"plan.failover={who!r}: must be a FailoverPlan (failover_plan)")
        _check_plan(batch, who, place, bounds)
        collect = _ordered if failover.method == "exact" else partial(_summed, place)

        def local(params: Params, batch: PackedBatch, plan: FailoverPlan, rng: Any) -> Any:
            return collect(partial(one, params, rng, plan), batch, plan)

        over = partial(jax.shard_map, mesh=place.mesh, out_specs=P(), check_vma=False)
        grads, sums, whole = over(local, in_specs=(P(), P(ROWS), P(), P()))(params, batch, who, rng)
        if not cheap:
            return grads, sums, None, None

        def behind(name: str, _: Any) -> Array:
            return whole if letter_of(cfg, name) in skipped else sums.weight

        return grads, sums, map_named(behind, grads), None

    return make_train_step(cfg, optim, settings, place=place, donate=False, differentiate=differentiate)


_Found = tuple[Params, LossSums, Array]
# (rows of one shard, the slot it stands in) -> what is summed over shards.
_OfShard = Callable[[PackedBatch, Array], Any]


def _slots(batch: PackedBatch, plan: FailoverPlan) -> tuple[PackedBatch, Array]:
    """This device's rows as [k, B / n, ...], and how many of its slots are busy."""
    slots = plan.shards.shape[1]
    cut = jax.tree.map(lambda x: x.reshape(slots, x.shape[0] // slots, *x.shape[1:]), batch)
    return cut, jnp.sum(plan.shards[jax.lax.axis_index(AXIS)] >= 0)


def _slot(batch: PackedBatch, place: Array) -> PackedBatch:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), batch)


def _zeros(of_shard: _OfShard, batch: PackedBatch, *leading: int) -> Any:
    found = jax.eval_shape(lambda batch: of_shard(_slot(batch, jnp.int32(0)), jnp.int32(0)), batch)
    return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), found)


def _summed(place: Placement, of_shard: _OfShard, batch: PackedBatch, plan: FailoverPlan) -> Any:
    """Sums over all shards, in an order that depends on who trains them; one gradient's memory."""
    batch, count = _slots(batch, plan)

    def add(slot: Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, of_shard(_slot(batch, slot), slot))

    # The trip count differs between devices: nothing in the loop may wait for another one.
    local, total = (
        jax.lax.fori_loop(0, count, add, _zeros(of_shard, batch)),
        partial(jax.lax.psum, axis_name=AXIS),
    )
    return in_turn(total, local) if place.in_turn else total(local)


def _ordered(of_shard: _OfShard, batch: PackedBatch, plan: FailoverPlan) -> Any:
    """Sums over all shards in their order; the memory of 2 k gradients."""
    batch, count = _slots(batch, plan)
    zeros = _zeros(of_shard, batch)
    leaves, tree = jax.tree.flatten(zeros)
    # Integers are exact in any order.
    floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    # What the compiler makes of a shard must not depend on how many slots there are: a single one it would take out of the
    # loop, and what surrounds the shard it would fuse with it.
    batch = jax.tree.map(lambda x: jnp.pad(x, ((0, 1), *[(0, 0)] * (x.ndim - 1))), batch)

    def one(place: Array, kept: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        found = jax.tree.leaves(of_shard(jax.tree.map(hold, _slot(batch, place)), place))
        rows, whole = kept
        row = hold(jnp.concatenate([x.ravel() for x, real in zip(found, floats, strict=True) if real]))
        counts = [x for x, real in zip(found, floats, strict=True) if not real]
        rows = jax.lax.dynamic_update_index_in_dim(rows, row, place, 0)
        return rows, [total + x for total, x in zip(whole, counts, strict=True)]

    size = sum(leaf.size for leaf, real in zip(leaves, floats, strict=True) if real)
    start = jnp.zeros((plan.shards.shape[1], size), jnp.float32)
    counts = [leaf for leaf, real in zip(leaves, floats, strict=True) if not real]
    rows, counts = jax.lax.fori_loop(0, count, one, (start, counts))
    total, done = sum_in_order(rows, plan.shards, AXIS)
    counts = iter(jax.lax.psum(jax.tree.map(lambda x: jnp.where(done, x, 0), counts), AXIS))
    out, first = [], 0
    for leaf, real in zip(leaves, floats, strict=True):
        out.append(total[first : first + leaf.size].reshape(leaf.shape) if real else next(counts))
        first += leaf.size * real
    return jax.tree.unflatten(tree, out)


def _check(cfg: ModelConfig, settings: StepSettings, place: Placement) -> None:
    for axis in AXES:
        if axis != AXIS:
            require(
                place.size(axis) == 1,
                f"mesh.{axis}",
                place.size(axis),
                "a lost worker's share of it has no second owner; failover shares rows only, leave it at 1",
            )
    whole = "is of the whole batch, which failover cuts into shards"
    require(cfg.mtp is None, "mtp", cfg.mtp, f"the scale of its loss {whole}; train without it")
    if "E" in cfg.letters:
        given = settings.balance_scope
        require(given == "sequence", "balance_scope", given, f"this loss {whole}; choose sequence")


def _check_plan(batch: PackedBatch, plan: FailoverPlan, place: Placement, bounds: Mapping[str, int]) -> None:
    given = {name: v1.shape[-1] for name, v1 in (plan.bases or {}).items()}
    if bounds and given != bounds:
        raise ValueError(
            f"plan.failover.bases: of {len(given)} weights; this method needs those of {len(bounds)}, as the settings' "
            "make_bases(cfg)(params) gives them"
        )
    workers, slots = plan.shards.shape
    rows, devices = len(batch.tokens), place.size(AXIS)
    if workers != devices:
        raise ValueError(f"plan.failover: of {workers} workers; the mesh has data={devices}")
    if rows % (workers * slots):
        raise ValueError(
            f"batch: {rows} rows; must be a multiple of workers * slots = {workers} * {slots}, a shard for each slot"
        )

"""The step of pipelines that have lost devices: a neighbour runs the lost stage as well (MeCeFO, arXiv 2510.16415).

R replicas of p stages; each of the N living devices has k slots for stages, and ``parallel/failover/chains.py`` says which
stage stands in which, and how the devices of a replica follow each other. That is data (:class:`ChainPlan`): one program
serves every pattern of failures with the same N and k. The state lies in slots too: a device has the parameters and moments
of its own stage and of the one that it has adopted.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig, one_of, require
from jaxllm.linear import Context
from jaxllm.model.functional import Params, abstract_params, flatten, map_named, merge
from jaxllm.model.hybrid import HybridLM
from jaxllm.model.scan import groups_of
from jaxllm.train.degraded import Degraded, letter_of, ranks
from jaxllm.train.failover import FailoverSettings
from jaxllm.train.loss import LossSums
from jaxllm.train.optim import OptimConfig
from jaxllm.train.stages import check_stages, deal_rows
from jaxllm.train.state import Leaf, TrainPlan, TrainState, abstract_state
from jaxllm.train.step import Differentiate, StepSettings, batch_loss, make_train_step
from parallel.failover.assignment import StageAssignment
from parallel.failover.chains import SLOTS, firsts, moved, rows_of, sum_by_stage, take_rows
from parallel.mesh import AXES, MeshShape
from parallel.order import in_turn
from parallel.pipeline import Chain, through_chain
from parallel.sharding import Placement

AXIS = "data"
# What a slot does with a microbatch in a tick.
IDLE, FULL, CHEAP = range(3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChainPlan:
    """Who runs which stage in one step; the same arrays on every worker.

    Attributes:
        chains: :class:`parallel.failover.chains.Chains`.
        bases: method mecefo: V1 by dotted path, in slots as the parameters (`FailoverSettings.make_bases` of
            :func:`slot_config`).
    """

    chains: Leaf
    bases: Any = None


def slot_config(cfg: ModelConfig, stages: int, nodes: int, slots: int = SLOTS) -> ModelConfig:
    """The model whose stacked layers are all slots of all devices: what the state is a state of.

    Args:
        cfg: the model that is trained.
        stages: of a pipeline.
        nodes: living devices.
        slots: of each.
    """
    (span,) = groups_of(cfg.pattern)
    motif = cfg.pattern[: span.length]
    return cfg.replace(pattern=motif * (span.repeats // stages * nodes * slots))


def slot_shardings(tree: Any, place: Placement) -> Any:
    """Where a state in slots, or a part of it, lies: stacked layers on their devices, all else whole on each."""

    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(place.mesh, P(AXIS) if in_stack(path) else P()), tree
    )


def in_stack(path: Any) -> bool:
    """Whether a leaf of a state, or of its parameters, is stacked over layers, by its path (``jax.tree_util``)."""
    return any(getattr(key, "key", None) == "groups" for key in path)


def move_state(
    state: TrainState, old: np.ndarray, new: np.ndarray, place: Placement | None = None
) -> TrainState:
    """A state in other slots, through the host; no number of it changes.

    Args:
        state: in the slots ``old``.
        old: i32[N, k]; ``Chains.stages``, -1 where a device is lost with what it had (:func:`parallel.failover.chains.lost`).
            ``np.arange(p)[:, None]`` is the state of the model as any other run has it.
        new: i32[M, l].
        place: the devices of ``new``; None: leaves stay on the host.

    Raises:
        ValueError: no living device has a stage.
    """
    rows = moved(old, new)

    def move(path: Any, leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        if not in_stack(path):
            return leaf
        blocks = leaf.reshape(old.size, -1, *leaf.shape[1:])
        taken = np.where((rows >= 0).reshape(-1, *[1] * (blocks.ndim - 1)), blocks[rows], 0)
        return taken.reshape(-1, *leaf.shape[1:]).astype(leaf.dtype)

    out = jax.tree_util.tree_map_with_path(move, state)
    return out if place is None else jax.device_put(out, slot_shardings(out, place))


def chained_batch(batch: PackedBatch, assignment: StageAssignment) -> PackedBatch:
    """Rows of a batch for each living device: those of its replica; targets only where they are scored.

    Raises:
        ValueError: the replicas cannot share the rows equally.
    """
    index = rows_of(assignment, len(batch.tokens))
    laid = jax.tree.map(lambda x: take_rows(index, np.asarray(x)), batch)
    ends = np.asarray([any(task.stage == assignment.stages - 1 for task in own) for own in assignment.tasks])
    scored = np.repeat(ends, index.shape[1])
    return laid.replace(targets=np.where(scored[:, None, None], laid.targets, -1).astype(np.int32))


def make_chained_step(
    cfg: ModelConfig,
    optim: OptimConfig,
    settings: StepSettings | None = None,
    failover: FailoverSettings | None = None,
    *,
    place: Placement,
    stages: int,
    slots: int = SLOTS,
) -> Any:
    """The compiled step ``(state, batch, plan) -> (state, Metrics)`` of N living devices; it never donates ``state``.

    Args:
        cfg: model, with stacked layers.
        optim: optimiser and schedule.
        settings: of the step; ``accum_steps`` microbatches follow each other through a replica's devices.
        failover: method "mecefo": devices with two stages take cheaper gradients of both. "exact": they take them in
            full; sums are those of an undisturbed run up to rounding, for replicas are added in the network's order.
        place: the N devices, along ``data``, in the order of an assignment's ``live``.
        stages: of a pipeline.
        slots: k, most stages of a device; 1 where all live.

    Returns:
        A jitted function. State and bases are in slots (:func:`move_state`, :func:`slot_config`), the batch is that
        of :func:`chained_batch`; ``plan.failover`` is a :class:`ChainPlan`.

    Raises:
        ConfigError: devices along another axis than ``data``, a model whose stages are not alike, or with experts.
    """
    settings, failover = settings or StepSettings(), failover or FailoverSettings()
    wide = slot_config(cfg, stages, place.size(AXIS), slots)
    # What the step makes of numbers does not ask how many layers there are; the moments' structure is the model's.
    differentiate = chained_gradients(cfg, settings, failover, place=place, stages=stages)
    step = make_train_step(wide, optim, settings, donate=False, differentiate=differentiate)
    shardings = slot_shardings(abstract_state(wide, optim), place), NamedSharding(place.mesh, P())
    return jax.jit(step, out_shardings=shardings)


def chained_gradients(
    cfg: ModelConfig, settings: StepSettings, failover: FailoverSettings, *, place: Placement, stages: int
) -> Differentiate:
    """How :func:`make_chained_step` takes gradients; in slots, every copy of a stage with the same sum over replicas."""
    _check(cfg, settings, failover, place, stages)
    cheap = failover.method == "mecefo"
    skipped = failover.skipped(cfg) if cheap else frozenset()
    bounds = ranks(cfg, failover.policy, failover.rank) if cheap else {}
    stage = _stage(cfg, settings, skipped)
    size = groups_of(cfg.pattern)[0].repeats // stages

    def local(params: Params, batch: PackedBatch, bases: Any, chains: Any) -> Any:
        device, count = jax.lax.axis_index(AXIS), chains.stages.shape[0]
        mine = chains.stages[device]
        kinds = jnp.where(mine < 0, IDLE, jnp.where(chains.degraded[device] & cheap, CHEAP, FULL))
        links = tuple((at, at + 1) for at in range(count - 1))
        spot = Chain(AXIS, chains.position[device], chains.last[device], links)

        def hidden(params: Params, model: HybridLM, batch: PackedBatch, ctx: Context) -> Any:
            # Slots of a device are the stages that follow each other there.
            stacked = {name: leaf for name, leaf in flatten(params).items() if name.startswith("groups.")}
            held = [_share((stacked, bases), slot * size, size) for slot in range(len(mine))]

            def layers(h: Array, part: PackedBatch, works: Array) -> tuple[Array, None]:
                for kind, (groups, v1) in zip(kinds, held, strict=True):
                    h = stage(groups, v1, h, part, jnp.where(works, kind, IDLE))
                return h, None

            inputs = batch.replace(targets=None, loss_mask=None)
            entering, parts = deal_rows((model.embed(batch.tokens, ctx), inputs), settings.accum_steps)
            out, _ = through_chain(layers, entering, parts, stages, spot)
            out = model.norm_f(out.swapaxes(0, 1).reshape(-1, *out.shape[2:]))
            return out, batch.targets, batch.loss_mask, None

        def objective(params: Params) -> tuple[Array, LossSums]:
            return batch_loss(cfg, params, batch, settings, hidden=partial(hidden, params))

        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params)

        def summed(name: str, leaf: Array) -> Array:
            if not name.startswith("groups."):
                return jax.lax.psum(leaf, AXIS)
            own = leaf.reshape(len(mine), size, *leaf.shape[1:])
            return sum_by_stage(own, mine, stages, AXIS).reshape(leaf.shape)

        weight = sums.weight[None]
        if not place.in_turn:
            return map_named(summed, grads), jax.lax.psum(sums, AXIS), weight
        names = iter(flatten(grads))
        grads = in_turn(lambda leaf: summed(next(names), leaf), grads)
        last = jax.tree.leaves(grads)[-1]
        return grads, in_turn(partial(jax.lax.psum, axis_name=AXIS), sums, last), weight

    def differentiate(params: Params, batch: PackedBatch, rng: Any, plan: TrainPlan) -> Any:
        who = plan.failover
        if not isinstance(who, ChainPlan):
            raise ValueError(f"plan.failover={who!r}: must be a ChainPlan")
        _check_plan(who, place, bounds)
        specs = jax.tree.map(lambda where: where.spec, slot_shardings(params, place))
        over = partial(
            jax.shard_map,
            mesh=place.mesh,
            in_specs=(specs, P(AXIS), P(AXIS), P()),
            out_specs=(specs, P(), P(AXIS)),
            check_vma=False,
        )
        chains = jax.tree.map(jnp.asarray, who.chains)
        grads, sums, weights = over(local)(params, batch, who.bases or {}, chains)
        # Tokens of a replica are scored by its last device only.
        weights = jax.ops.segment_sum(weights, chains.replica, len(weights))[chains.replica]
        flat = chains.stages.ravel()
        full = (chains.stages >= 0) & ~chains.degraded[:, None] if cheap else chains.stages >= 0
        learnt = jax.ops.segment_sum(
            (full * weights[:, None]).ravel(), jnp.where(flat < 0, stages, flat), stages + 1
        )
        behind = {True: learnt[flat], False: sums.weight}

        def by_slot(name: str, values: Array, leaf: Array) -> Array:
            if not name.startswith("groups."):
                return values if values.ndim == 0 else jnp.ones((), values.dtype)
            return jnp.repeat(jnp.broadcast_to(values, flat.shape), size).reshape(-1, *[1] * (leaf.ndim - 1))

        def of(name: str, leaf: Array) -> Array:
            found = by_slot(name, behind[letter_of(cfg, name) in skipped], leaf)
            # What stands in an idle slot is nobody's.
            return jnp.where(by_slot(name, flat >= 0, leaf), found, 0)

        return grads, sums, map_named(of, grads), map_named(lambda n, x: by_slot(n, firsts(flat), x), grads)

    return differentiate


def _share(tree: Any, first: int, size: int) -> Any:
    return jax.tree.map(lambda x: x[first : first + size], tree)


def _stage(cfg: ModelConfig, settings: StepSettings, skipped: frozenset[str]) -> Any:
    """``(groups, bases, h, part, kind) -> h`` of one stage, of which backward keeps the input only.

    Backward chooses between gradients in a branch of its own: differentiating a branch of forward would keep what both of
    them read. Neither holds a collective.
    """
    # Nothing but the layers is read.
    empty = map_named(lambda _name, _leaf: jnp.zeros(()), abstract_params(cfg))

    def run(cheap: bool, bases: Any, part: PackedBatch, groups: Any, h: Array) -> Array:
        params = map_named(lambda name, nothing: groups.get(name, nothing), empty)
        if cheap:
            params = Degraded(skipped, bases, False).weights(cfg, params)
        ctx = Context(
            precision=cfg.precision,
            remat=settings.remat,
            skipped=skipped if cheap else frozenset(),
            implementation=settings.implementation,
        )
        return merge(cfg, params).through(h, part, ctx)[0]

    @jax.custom_vjp
    def stage(groups: Any, bases: Any, h: Array, part: PackedBatch, kind: Array) -> Array:
        full = partial(run, False, bases, part)
        return jax.lax.cond(kind == IDLE, lambda _, h: h, full, groups, h)

    def forward(*given: Any) -> tuple[Array, Any]:
        return stage(*given), given

    def backward(given: Any, g: Array) -> Any:
        groups, bases, h, part, kind = given

        def idle(groups: Any, h: Array, g: Array) -> Any:
            return jax.tree.map(jnp.zeros_like, groups), g

        def taken(cheap: bool, groups: Any, h: Array, g: Array) -> Any:
            return jax.vjp(partial(run, cheap, bases, part), groups, h)[1](g)

        branches = [idle, partial(taken, False), partial(taken, True)]
        groups, h = jax.lax.switch(kind, branches, groups, h, g)
        return groups, None, h, None, None

    stage.defvjp(forward, backward)
    return stage


def check_chained(cfg: ModelConfig, stages: int) -> None:
    """Raise ConfigError unless a neighbour can run a stage of the model as well as its own."""
    require(stages > 1, "stages", stages, "a pipeline has 2 or more; use jaxllm.train.failover")
    check_stages(cfg, MeshShape(stage=stages))
    require("E" not in cfg.letters, "pattern", cfg.pattern, "pipelines with experts have no failover")


def _check(
    cfg: ModelConfig, settings: StepSettings, failover: FailoverSettings, place: Placement, stages: int
) -> None:
    for axis in AXES:
        if axis != AXIS:
            allowed = "the living devices stand along data, in one line; leave it at 1"
            require(place.size(axis) == 1, f"mesh.{axis}", place.size(axis), allowed)
    one_of("failover.method", failover.method, "mecefo", "exact")
    check_chained(cfg, stages)


def _check_plan(plan: ChainPlan, place: Placement, bounds: dict[str, int]) -> None:
    given = {name: v1.shape[-1] for name, v1 in (plan.bases or {}).items()}
    if bounds and given != bounds:
        raise ValueError(
            f"plan.failover.bases: of {len(given)} weights; this method needs those of {len(bounds)}, as "
            "make_bases(slot_config(...))(params) gives them"
        )
    nodes, devices = len(plan.chains.stages), place.size(AXIS)
    if nodes != devices:
        raise ValueError(f"plan.failover.chains: of {nodes} devices; the mesh has data={devices}")

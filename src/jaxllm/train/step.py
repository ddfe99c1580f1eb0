"""One training step: a pure function of (state, batch, plan), compiled once, its state donated."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig, one_of, positive, require
from jaxllm.linear import Context
from jaxllm.model.functional import Params, merge
from jaxllm.model.shares import at_hand
from jaxllm.train import balance
from jaxllm.train.degraded import Degraded
from jaxllm.train.loss import CHUNK, LossSums, cross_entropy
from jaxllm.train.mtp import prediction_loss
from jaxllm.train.optim import OptimConfig, learning_rate, make_optimizer
from jaxllm.train.placement import param_specs, state_shardings
from jaxllm.train.stages import deal_rows, hidden_in_stages
from jaxllm.train.state import Leaf, TrainPlan, TrainState
from parallel.context.scattered import Scattered
from parallel.mesh import ROWS, SLOTS
from parallel.order import there
from parallel.sharding import Placement

# (params, batch, rng, plan) -> (gradients of the summed objective, sums, what ``apply_gradients`` calls ``behind`` and
# ``once``).
Differentiate = Callable[
    [Params, PackedBatch, Any, TrainPlan], tuple[Params, LossSums, Params | None, Params | None]
]
# (model, batch, context) -> (final hidden states, targets, loss mask, what routers did).
Hidden = Callable[[Any, PackedBatch, Context], tuple[Any, Any, Any, balance.Routing | None]]


@dataclass(frozen=True)
class StepSettings:
    """Static settings of a step.

    Attributes:
        accum_steps: microbatches that a batch is cut into; the update is that of the whole batch.
        remat: "none", "layer" (keep layer inputs only) or "dots" (keep matrix products as well).
        z_loss: weight of logsumexp(logits)^2.
        loss_chunk: tokens whose logits exist at once.
        implementation: of the kernels.
        mtp_depths: tokens further ahead that prediction blocks are trained on; None: one for each block.
        mtp_scale: weight of the mean of their losses (arXiv 2512.20856: 0.3).
        balance_loss: weight of the experts' load-balancing loss, summed over layers (Nemotron 3: 1e-4; Mixtral: 1e-3).
        balance_scope: "sequence": of each row (DeepSeek-V3); "batch": of all rows of a microbatch (Switch, Mixtral).
        bias_rate: step of the routers' correction bias after each update (arXiv 2408.15664); 0 leaves it alone.
    """

    accum_steps: int = 1
    remat: str = "none"
    z_loss: float = 0.0
    loss_chunk: int = CHUNK
    implementation: str = "auto"
    mtp_depths: int | None = None
    mtp_scale: float = 0.3
    balance_loss: float = 1e-4
    balance_scope: str = "sequence"
    bias_rate: float = 1e-3

    def __post_init__(self) -> None:
        positive(accum_steps=self.accum_steps, loss_chunk=self.loss_chunk)
        if self.mtp_depths is not None:
            positive(mtp_depths=self.mtp_depths)
        require(self.mtp_scale >= 0, "mtp_scale", self.mtp_scale, "must be at least 0")
        one_of("remat", self.remat, "none", "layer", "dots")
        for name in ("z_loss", "balance_loss", "bias_rate"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must be at least 0")
        require(
            self.balance_scope in balance.SCOPES, "balance_scope", self.balance_scope, "sequence or batch"
        )

    def depths(self, cfg: ModelConfig) -> int:
        """Prediction depths beside the next token; 0 for a model without prediction blocks.

        Raises:
            ConfigError: the model has a block for each depth, and not this many.
        """
        if cfg.mtp is None:
            return 0
        depths = self.mtp_depths or cfg.mtp.blocks
        require(
            cfg.mtp.blocks in (1, depths),
            "mtp_depths",
            self.mtp_depths,
            f"must be None or {cfg.mtp.blocks}, one for each of the model's prediction blocks",
        )
        return depths


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """Scalars of one step; means are over the scored tokens.

    Attributes:
        loss: nats per token, without the z-loss.
        z_loss: what the z-loss adds to the objective, per token.
        accuracy: share of targets that were the arg max.
        grad_norm: global norm of the mean gradient before clipping.
        lr: learning rate.
        mtp_loss: nats per token, mean of the multi-token prediction depths; 0 without them.
        balance_loss: the experts' load-balancing loss, summed over layers and not weighted; None without experts.
        imbalance: load of the busiest expert over the mean, of the worst layer; None without experts.
        tokens: i32[]; scored tokens (weights above zero count as one).
        skipped: i32[]; updates left out so far.
        consecutive_skips: i32[]; those since the last update; above 0: this one was left out.
    """

    loss: Leaf
    z_loss: Leaf
    accuracy: Leaf
    grad_norm: Leaf
    lr: Leaf
    mtp_loss: Leaf
    balance_loss: Leaf
    imbalance: Leaf
    tokens: Leaf
    skipped: Leaf
    consecutive_skips: Leaf


def batch_loss(
    cfg: ModelConfig,
    params: Params,
    batch: PackedBatch,
    settings: StepSettings,
    rng: Any = None,
    *,
    depths: int | None = None,
    place: Placement | None = None,
    scattered: Scattered | None = None,
    microbatches: int = 1,
    degraded: Degraded | None = None,
    hidden: Hidden | None = None,
) -> tuple[jax.Array, LossSums]:
    """Summed objective of a batch and its parts.

    Args:
        cfg: model.
        params: its parameters.
        batch: with targets.
        settings: of the step.
        rng: for stochastic weights.
        depths: prediction depths beside the next token; None: those of ``settings``.
        place: devices share the step, and the call is under ``shard_map``: rows, parameters, objective and sums are this
            device's.
        scattered: rows are slots of documents that go on elsewhere; this device's part.
        microbatches: into which the rows are cut where devices share the layers (:mod:`parallel.pipeline`).
        degraded: what gradients of it leave out; the value is the same.
        hidden: runs the layers, instead of this device over its share of them (:mod:`jaxllm.train.chained`).

    Raises:
        ValueError: the batch has no targets, or not those of every depth that is trained.
    """
    if batch.targets is None:
        raise ValueError(
            "batch.targets=None: training needs i32[B, T, 1] targets; make batches with a Loader"
        )
    depths = settings.depths(cfg) if depths is None else depths
    if batch.targets.shape[-1] != 1 + depths:
        raise ValueError(
            f"batch.targets: {batch.targets.shape[-1]} steps ahead; this model is trained on {1 + depths}, make batches "
            f"with Loader(depths={1 + depths})"
        )
    model = merge(cfg, params if degraded is None else degraded.weights(cfg, params))
    recompute = degraded is not None and degraded.recompute
    ctx = Context(
        precision=cfg.precision,
        remat="layer" if recompute else settings.remat,
        skipped=frozenset() if degraded is None else degraded.skipped,
        implementation=settings.implementation,
        rng=rng,
        placement=place,
        scattered=scattered,
    )
    reporting = replace(ctx, taps=balance.taps(cfg.pattern, settings.balance_scope))
    weights = balance.row_weights(batch, scattered)
    if hidden is not None:
        h, targets, mask, routing = hidden(model, batch, reporting)
    elif place is not None and place.size("stage") > 1:
        h, targets, mask, routing = hidden_in_stages(model, batch, reporting, microbatches)
    else:
        targets, mask = batch.targets, batch.loss_mask
        h, aux = model.hidden(batch, reporting)
        routing = balance.routing(aux, weights)
    w = at_hand(model.embed if model.lm_head is None else model.lm_head, ctx).weight.get_value()
    score = partial(
        _score,
        w=w,
        tied=model.lm_head is None,
        z_loss=settings.z_loss,
        precision=cfg.precision,
        chunk=settings.loss_chunk,
        axis="tensor" if place is not None and place.size("tensor") > 1 else None,
    )
    objective, sums = score(h, targets[..., 0], mask)
    if depths and cfg.mtp is not None:
        inside = replace(ctx, taps=balance.taps(cfg.mtp.pattern, settings.balance_scope))
        further, nats, reports = prediction_loss(model, h, batch, inside, score, sums, depths)
        objective, sums = objective + settings.mtp_scale * further, sums._replace(mtp=nats)
        each = [balance.routing(report, weights) for report in reports]
        routing = balance.joined(routing, each, cfg.mtp.blocks)
    if routing is not None:
        objective, sums = objective + settings.balance_loss * routing.balance, sums._replace(routing=routing)
    return objective, sums


def _score(h: Any, targets: Any, loss_mask: Any, *, w: Any, **options: Any) -> tuple[jax.Array, LossSums]:
    return cross_entropy(h, w, targets, loss_mask, **options)


def gradients(
    cfg: ModelConfig,
    params: Params,
    batch: PackedBatch,
    settings: StepSettings,
    rng: Any = None,
    place: Placement | None = None,
    scattered: Scattered | None = None,
    degraded: Degraded | None = None,
) -> tuple[Params, LossSums]:
    """Gradient of the *summed* objective, float32, and the sums; microbatches add up without any weighting.

    With ``place`` parameters and rows are shared by its devices, and gradients lie as their parameters do; with
    ``scattered`` (:func:`parallel.context.scatter`, for as many parts as ``settings.accum_steps``) the batch are slots. With
    ``degraded`` they are those of who does two jobs, which devices do not share.

    Raises:
        ValueError: devices along ``context``, and a batch that is not scattered.
    """
    if place is None:
        return _gradients(cfg, params, batch, settings, rng, degraded=degraded)
    specs = param_specs(cfg, place)

    def shared(
        params: Params, batch: PackedBatch, scattered: Scattered | None, rng: Any
    ) -> tuple[Params, LossSums]:
        grads, sums = _gradients(cfg, params, batch, settings, rng, place, scattered)
        grads = place.sum_gradients(grads, specs)
        return grads, _summed(place, sums, jax.tree.leaves(grads)[-1])

    in_specs = (specs, *batch_specs(place, scattered), P())
    over = partial(jax.shard_map, mesh=place.mesh, in_specs=in_specs, check_vma=False)
    return over(shared, out_specs=(specs, P()))(params, batch, scattered, rng)


def _summed(place: Placement, sums: LossSums, *before: jax.Array) -> LossSums:
    """Over the devices that see other tokens; no part of it before the layers are done, nor ``before`` if they take turns."""
    done = there(sums.nats)
    return place.sum_tokens(jax.tree.map(lambda x: jnp.where(done, x, 0), sums), *before)


def batch_specs(place: Placement, scattered: Scattered | None) -> tuple[Any, Any]:
    """How a batch and what it was scattered by lie on the devices of a step.

    Raises:
        ValueError: devices along ``context``, and a batch that is not scattered, or the other way round.
    """
    count = place.size("context")
    if (scattered is None) != (count == 1):
        raise ValueError(
            f"scattered={'None' if scattered is None else 'a plan'}: with mesh.context={count} batches must "
            f"{'not ' if count == 1 else ''}be scattered (jaxllm.train.context)"
        )
    return (P(ROWS), P()) if scattered is None else (P(SLOTS), scattered.specs())


def _gradients(
    cfg: ModelConfig,
    params: Params,
    batch: PackedBatch,
    settings: StepSettings,
    rng: Any,
    place: Placement | None = None,
    scattered: Scattered | None = None,
    degraded: Degraded | None = None,
) -> tuple[Params, LossSums]:
    # Devices with the same tokens have the same objective, each a part: what is differentiated is the sum of all devices'.
    copies = 1 if place is None else place.mesh.size // place.size(*place.rows, "stage")
    # Microbatches follow each other through the stages, and are not added up one after the other.
    staged = place is not None and place.size("stage") > 1
    count, microbatches = (1, settings.accum_steps) if staged else (settings.accum_steps, 1)

    def one(part: PackedBatch, scattered: Scattered | None, key: Any) -> tuple[Params, LossSums]:
        def objective(p: Params) -> tuple[jax.Array, LossSums]:
            value, sums = batch_loss(
                cfg,
                p,
                part,
                settings,
                key,
                place=place,
                scattered=scattered,
                microbatches=microbatches,
                degraded=degraded,
            )
            return value / copies, sums

        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return grads, sums

    if count == 1:
        return one(batch, scattered, rng)

    def accumulate(total: Any, item: Any) -> tuple[Any, None]:
        part, slots, index = item
        key = None if rng is None else jax.random.fold_in(rng, index)
        return jax.tree.map(jnp.add, total, one(part, slots, key)), None

    if scattered is None:
        parts = deal_rows(batch, count), None, jnp.arange(count)
    else:
        # Slots of one microbatch stand together.
        cut = jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), (batch, scattered))
        parts = *cut, jnp.arange(count)
    _, sums = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], parts[:2]), rng)
    start = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    total, _ = jax.lax.scan(accumulate, (start, zeros), parts)
    return total


def apply_gradients(
    optim: OptimConfig,
    state: TrainState,
    grads: Params,
    sums: LossSums,
    lr: Any,
    z_loss: float = 0.0,
    behind: Params | None = None,
    once: Params | None = None,
) -> tuple[TrainState, Metrics]:
    """Mean, clip, update; with a loss or gradient that is not finite, parameters and moments stay as they are.

    Args:
        optim: optimiser.
        state: before the update.
        grads: of the summed objective.
        sums: of the batch.
        lr: learning rate.
        z_loss: its weight, for the metrics.
        behind: f32[] for each parameter, the summed weight of the tokens that its gradient is of: gradients may be of
            different parts of the batch. Parameters of which it is 0 stay as they are, and their moments too. None:
            ``sums.weight`` for all.
        once: bool for each parameter, or part of it: false for those that are copies of others, which the gradient's
            norm counts once. None: there are no copies.
    """
    least = jnp.finfo(jnp.float32).tiny
    weight = jnp.maximum(sums.weight, least)
    loss = sums.nats / weight
    if behind is not None:
        # Relative to all tokens, so that one factor is the mean of all.
        share = jax.tree.map(lambda w: jnp.where(w > 0, weight / jnp.maximum(w, least), 0), behind)
        grads = jax.tree.map(jnp.multiply, grads, share)
    norm = optax.tree.norm(grads if once is None else jax.tree.map(jnp.multiply, grads, once)) / weight
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    # One factor does the mean and the clipping, so that the gradient is read once more and not written.
    clip = 1.0 if optim.clip_norm is None else jnp.minimum(1.0, optim.clip_norm / (norm + 1e-12))
    grads = jax.tree.map(lambda g: g * (clip / weight), grads)
    seen = balance.trained(state.params)
    updates, opt_state = make_optimizer(optim).update(balance.trained(grads), state.opt_state, seen)
    params = balance.updated(state.params, updates, lr)
    if behind is not None:
        learnt = jax.tree.map(lambda w: w > 0, behind)
        moments = optax.tree_utils.tree_map_params(
            make_optimizer(optim),
            lambda _, there: there,
            opt_state,
            balance.trained(learnt),
            transform_non_params=lambda _: True,
        )
        params = jax.tree.map(jnp.where, learnt, params, state.params)
        opt_state = jax.tree.map(jnp.where, moments, opt_state, state.opt_state)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    skip = 1 - finite.astype(jnp.int32)
    state = state.replace(
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        step=state.step + 1,
        skipped=state.skipped + skip,
        consecutive_skips=(state.consecutive_skips + 1) * skip,
    )
    metrics = Metrics(
        loss=loss,
        z_loss=z_loss * sums.z / weight,
        accuracy=sums.correct / weight,
        grad_norm=norm,
        lr=lr,
        mtp_loss=sums.mtp / weight,
        balance_loss=None if sums.routing is None else sums.routing.balance / weight,
        imbalance=None if sums.routing is None else balance.imbalance(sums.routing.counts),
        tokens=jnp.zeros((), jnp.int32),
        skipped=state.skipped,
        consecutive_skips=state.consecutive_skips,
    )
    return state, metrics


def scored_tokens(batch: PackedBatch, once: Any = True) -> jax.Array:
    """i32[]; positions that have a target and a weight, counted once ``once`` is known."""
    scored = (batch.targets[..., 0] >= 0) & once
    if batch.loss_mask is not None:
        scored &= batch.loss_mask > 0
    return jnp.sum(scored, dtype=jnp.int32)


def make_train_step(
    cfg: ModelConfig,
    optim: OptimConfig,
    settings: StepSettings | None = None,
    *,
    place: Placement | None = None,
    donate: bool = True,
    differentiate: Differentiate | None = None,
) -> Any:
    """The compiled step ``(state, batch, plan) -> (state, Metrics)``; it consumes (donates) ``state``.

    Args:
        cfg: model; ``cfg.precision`` gives the compute and operand dtypes, the masters are float32.
        optim: optimiser and schedule.
        settings: see :class:`StepSettings`.
        place: the devices that share the step; None: one. The state lies as
            :func:`jaxllm.train.placement.state_shardings` says, the batch as :func:`parallel.mesh.batch_sharding`.
        donate: reuse the memory of ``state``; False keeps it (for jax_debug_nans, which runs a step twice).
        differentiate: takes the gradients instead of :func:`gradients`, and gives ``behind`` and
            ``once`` of :func:`apply_gradients` with them (:mod:`jaxllm.train.failover`).

    Returns:
        A jitted function. Without ``plan.lr`` the learning rate is that of the schedule at ``state.step``; a clock may
        set it. With devices along ``context`` the batch is what ``plan.scattered`` has made of it.
    """
    settings = settings or StepSettings()

    def train_step(
        state: TrainState, batch: PackedBatch, plan: TrainPlan | None = None
    ) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        plan = plan or TrainPlan()
        lr = learning_rate(optim, state.step) if plan.lr is None else jnp.asarray(plan.lr, jnp.float32)
        if differentiate is None:
            grads, sums = gradients(cfg, state.params, batch, settings, rng, place, plan.scattered)
            behind = once = None
        else:
            grads, sums, behind, once = differentiate(state.params, batch, rng, plan)
        state, metrics = apply_gradients(optim, state, grads, sums, lr, settings.z_loss, behind, once)
        tokens = scored_tokens(batch, True if place is None else there(metrics.grad_norm))
        if sums.routing is not None and settings.bias_rate > 0:
            rate = jnp.where(metrics.consecutive_skips > 0, 0.0, settings.bias_rate)
            moved = balance.corrected(state.params, cfg, sums.routing.counts, rate)
            state = state.replace(params=moved)
        return state, Metrics(**{**vars(metrics), "tokens": tokens})

    shardings = None
    if place is not None:
        shardings = state_shardings(cfg, optim, place), NamedSharding(place.mesh, P())
    return jax.jit(train_step, donate_argnums=0 if donate else (), out_shardings=shardings)


def make_eval_step(
    cfg: ModelConfig, settings: StepSettings | None = None, *, place: Placement | None = None
) -> Any:
    """The compiled ``(params, batch, scattered) -> LossSums`` of the next token; add up, then divide by ``weight``."""
    settings = settings or StepSettings()

    def eval_step(params: Params, batch: PackedBatch, scattered: Scattered | None = None) -> LossSums:
        # Rows that do not make as many microbatches go through the stages together.
        parts = 1 if batch.shape[0] % settings.accum_steps else settings.accum_steps
        _, sums = batch_loss(
            cfg, params, batch, settings, depths=0, place=place, scattered=scattered, microbatches=parts
        )
        sums = sums._replace(routing=None)
        return sums if place is None else _summed(place, sums)

    if place is None:
        return jax.jit(eval_step)
    specs = param_specs(cfg, place)

    def shared(params: Params, batch: PackedBatch, scattered: Scattered | None = None) -> LossSums:
        in_specs = (specs, *batch_specs(place, scattered))
        over = partial(jax.shard_map, mesh=place.mesh, in_specs=in_specs, out_specs=P(), check_vma=False)
        return over(eval_step)(params, batch, scattered)

    return jax.jit(shared)

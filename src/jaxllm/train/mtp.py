"""The loss of multi-token prediction: every depth's cross-entropy on the tokens one step further ahead."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.batch import PackedBatch
from jaxllm.linear import Context
from jaxllm.model.hybrid import HybridLM
from jaxllm.train.loss import LossSums
from parallel.order import there
from parallel.sharding import everything_but_gathered

Score = Callable[[Array, Array, Array | None], tuple[Array, LossSums]]


def ahead(weights: Float[Array, "B T"], segment_ids: Int[Array, "B T"], steps: int) -> Float[Array, "B T"]:
    """``weights`` of the positions ``steps`` further on in the same document; the own one where the row ends before.

    A row may cut a document, whose next tokens are then known as targets but not as positions.
    """
    length = weights.shape[1]
    padded, ids = jnp.pad(weights, ((0, 0), (0, steps))), jnp.pad(segment_ids, ((0, 0), (0, steps)))
    inside = ids[:, steps : steps + length] == segment_ids
    return jnp.where(inside, padded[:, steps : steps + length], weights)


def prediction_loss(
    model: HybridLM,
    h: Float[Array, "B T D"],
    batch: PackedBatch,
    ctx: Context,
    score: Score,
    first: LossSums,
    depths: int,
) -> tuple[Float[Array, ""], Float[Array, ""], list[dict[str, Any]]]:
    """Mean over the depths of their summed losses, each scaled to the weight of the main one (arXiv 2512.20856).

    Args:
        model: has prediction blocks.
        h: final hidden states of the model.
        batch: ``targets`` of 1 + ``depths`` steps ahead; depth k reads target k and is scored on target k + 1.
        ctx: as in the forward pass; its taps are those of the prediction blocks.
        score: ``(h, targets, loss_mask) -> (objective, sums)`` of the head.
        first: sums of the main loss.
        depths: K.

    Returns:
        (objective, nats), both summed over tokens, the second without a z-loss and without a gradient; and what the
        taps gave at each depth.
    """
    objective = nats = jnp.zeros((), jnp.float32)
    reports = []
    for depth in range(1, depths + 1):
        tokens = batch.targets[..., depth - 1]
        known = (tokens >= 0) & (batch.segment_ids > 0)
        # Positions whose next token is unknown are padding at this depth: the end of each document.
        read = PackedBatch(
            tokens=jnp.maximum(tokens, 0),
            segment_ids=jnp.where(known, batch.segment_ids, 0),
            positions=batch.positions,
        )
        h, aux = _predict(model, h, read, ctx, depth)
        reports.append(aux)
        mask: Any = batch.loss_mask
        if mask is not None:
            scattered = ctx.scattered
            mask = (
                ahead(mask, batch.segment_ids, depth)
                if scattered is None
                else scattered.ahead[..., depth - 1]
            )
        value, sums = score(h, batch.targets[..., depth], mask)
        weights = jax.lax.stop_gradient((first.weight, sums.weight))
        if ctx.placement is not None:
            done = there(jax.lax.stop_gradient(sums.nats))
            weights = ctx.placement.sum_rows(tuple(jnp.where(done, x, 0) for x in weights))
        scale = weights[0] / jnp.maximum(weights[1], jnp.finfo(jnp.float32).tiny) / depths
        objective, nats = objective + scale * value, nats + scale * sums.nats
    return objective, nats, reports


def _predict(model: HybridLM, h: Array, batch: PackedBatch, ctx: Context, depth: int) -> tuple[Array, Any]:
    call = lambda h, batch: model.predict(h, batch, ctx, depth=depth)  # noqa: E731
    if ctx.remat == "none" and ctx.placement is None:
        return call(h, batch)
    policy = everything_but_gathered if ctx.remat == "none" else None
    return jax.checkpoint(call, policy=policy)(h, batch)

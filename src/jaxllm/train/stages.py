"""Layers shared by devices along ``stage``: what a pipeline asks of a model, and its hidden states."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig, require
from jaxllm.linear import Context
from jaxllm.model.hybrid import HybridLM
from jaxllm.model.scan import groups_of
from jaxllm.model.shares import at_hand
from jaxllm.train import balance
from parallel.mesh import MeshShape
from parallel.pipeline import deal_tokens, own_tokens, through_stages


def check_stages(cfg: ModelConfig, shape: MeshShape) -> None:
    """Raise ConfigError unless every device along ``mesh.stage`` gets the same letters of the pattern.

    All devices run one program, so that a stage is a number of repeats of the pattern's motif.
    """
    stages = shape.stage
    require(
        cfg.scan_layers,
        "mesh.stage",
        stages,
        "needs stacked layers, of which each stage has a share: set model.scan_layers to true",
    )
    groups = groups_of(cfg.pattern)
    require(
        len(groups) == 1 and groups[0].repeats % stages == 0,
        "mesh.stage",
        stages,
        f"every stage must have the same letters; pattern={cfg.pattern!r} is "
        + " + ".join(
            f"{span.repeats} x {cfg.pattern[span.start : span.start + span.length]!r}" for span in groups
        )
        + ", which must be one motif, as often as a multiple of the stages",
    )
    require(cfg.mtp is None, "mesh.stage", stages, "does not train prediction blocks; leave model.mtp out")
    require(
        shape.context == 1,
        "mesh.context",
        shape.context,
        f"must be 1 beside mesh.stage={stages}: give these devices to data, fsdp, expert or tensor, or leave stages out",
    )


def deal_rows(tree: Any, count: int) -> Any:
    """[B, ...] leaves to [count, B / count, ...]; rows are dealt round, so that sharded rows stay on their device.

    Raises:
        ValueError: ``count`` does not divide B.
    """

    def cut(x: Array) -> Array:
        if x.shape[0] % count:
            raise ValueError(
                f"accum_steps={count}: the batch has {x.shape[0]} rows; choose a divisor of that, or another batch size"
            )
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, tree)


def hidden_in_stages(
    model: HybridLM, batch: PackedBatch, ctx: Context, microbatches: int
) -> tuple[Float[Array, "B t D"], Any, Any, balance.Routing | None]:
    """Final hidden states of this stage's share of every row's tokens; call it under ``shard_map``.

    Args:
        model: over this device's shares of its parameters.
        batch: rows that all stages have.
        ctx: with the placement, and taps of :func:`jaxllm.train.balance.taps`.
        microbatches: that follow each other through the stages; must divide the rows.

    Returns:
        the hidden states, their targets and loss mask, and what the routers of this stage's layers did, in the
        place that they have among all layers.

    Raises:
        ValueError: ``microbatches`` does not divide the rows.
    """
    assert ctx.placement is not None
    stages = ctx.placement.size("stage")
    h = at_hand(model.embed, ctx)(batch.tokens, ctx)
    weights = balance.row_weights(batch)

    def layers(h: Array, part: tuple[PackedBatch, Array]) -> tuple[Array, balance.Routing | None]:
        inputs, weights = part
        h, aux = model.through(h, inputs, ctx)
        return h, balance.routing(aux, weights)

    # Layers read no targets.
    inputs = batch.replace(targets=None, loss_mask=None)
    entering, *parts = deal_rows((h, inputs, weights), microbatches)
    out, routing = through_stages(layers, entering, tuple(parts), stages)
    h = at_hand(model.norm_f, ctx)(deal_tokens(out.swapaxes(0, 1).reshape(h.shape), stages))
    targets = own_tokens(batch.targets, stages, -1)
    mask = None if batch.loss_mask is None else own_tokens(batch.loss_mask, stages)
    if routing is not None:
        count = len(routing.counts)
        counts = jnp.zeros((stages * count, *routing.counts.shape[1:]), routing.counts.dtype)
        first = jax.lax.axis_index("stage") * count
        counts = jax.lax.dynamic_update_slice_in_dim(counts, routing.counts, first, 0)
        routing = routing._replace(counts=counts)
    return h, targets, mask, routing

"""Causal convolutions over documents whose blocks are scattered over workers.

The last inputs of every block go through an all-to-all that gives each device some channels of all blocks' last inputs;
there they are put in front of the lanes that look back on them, and a second all-to-all brings them home. Moved per
device: (S + L) (k - 1) D numbers, whatever the plan.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import causal_conv as static_op
from pallas_kernels import dynamic_conv as dynamic_op
from parallel.context.lanes import Lanes
from parallel.context.rows import Axis, check_lanes, from_lanes, to_lanes
from parallel.context.shares import from_shares, padded, to_shares


def halo(x: Float[Array, "S T D"], lanes: Lanes, axis: Axis, reach: int) -> Float[Array, "L reach D"]:
    """The inputs before each lane's first block, of its own document; zeros before a document's begin.

    Raises:
        ValueError: the lanes were made for a shorter reach, or rows, lanes and axis do not fit together.
    """
    workers = check_lanes(lanes, axis, x.shape)
    known = lanes.halo.shape[-1]
    if reach > known:
        raise ValueError(
            f"a convolution over {reach + 1} inputs: lanes were made with reach={known}, not {reach}"
        )
    slots, size, channels = x.shape
    sent = min(reach, size)
    parts = padded(x[:, size - sent :], 2, workers).reshape(slots * sent, workers, -1)
    everywhere = to_shares(parts, axis)
    wanted = jnp.asarray(lanes.halo)[..., known - reach :].reshape(workers, -1)
    row = wanted // size * sent + wanted % size - (size - sent)
    found = jnp.where((wanted >= 0)[..., None], everywhere[jnp.maximum(row, 0)], 0)
    return from_shares(found, axis).reshape(-1, reach, workers * parts.shape[2])[..., :channels]


def _with_halo(
    op: Callable[..., tuple[Array, Any]],
    x: Array,
    parameters: tuple[Array | None, ...],
    reach: int,
    lanes: Lanes,
    axis: Axis,
    options: dict[str, Any],
) -> Array:
    """``op`` on lanes that begin with the inputs before them, as tokens of their first block."""
    check_lanes(lanes, axis, x.shape)
    rows, ids = to_lanes(x, lanes), jnp.asarray(lanes.segment_ids[0])
    if reach:
        rows = jnp.concatenate([halo(x, lanes, axis, reach), rows], axis=1)
        own = jnp.asarray(lanes.halo)[jax.lax.axis_index(axis)]
        ids = jnp.concatenate([(own[:, own.shape[1] - reach :] >= 0).astype(jnp.int32), ids], axis=1)
    # The op's other arguments are not the caller's.
    y, _ = op(rows, *parameters, segment_ids=ids, initial_state=None, num_segments=None, **options)
    return from_lanes(y[:, reach:], lanes)


def causal_conv(
    x: Float[Array, "S T D"],
    weight: Float[Array, "k D"],
    bias: Float[Array, "D"] | None = None,
    *,
    lanes: Lanes,
    axis: Axis,
    **options: Any,
) -> Float[Array, "S T D"]:
    """:func:`pallas_kernels.causal_conv.causal_conv` of the documents that a plan has scattered.

    Args:
        x: raw inputs of a worker's S slots of T tokens.
        weight: one filter of k taps per channel, the oldest input first.
        bias: added before the activation.
        lanes: of the plan, sharded by :func:`parallel.context.rows.lane_specs`.
        axis: the mesh axis, or axes, of the workers.
        options: ``activation`` and ``implementation``, as the op takes them.

    Returns:
        y in the dtype of x; finite on padding, otherwise unspecified there.

    Raises:
        ValueError: as the op and :func:`halo`.
    """
    return _with_halo(static_op.causal_conv, x, (weight, bias), weight.shape[0] - 1, lanes, axis, options)


def dynamic_conv(
    x: Float[Array, "S T D"],
    kernels: Float[Array, "S T k D"],
    *,
    lanes: Lanes,
    axis: Axis,
    **options: Any,
) -> Float[Array, "S T D"]:
    """:func:`pallas_kernels.dynamic_conv.dynamic_conv` of the documents that a plan has scattered.

    Args:
        x: raw inputs of a worker's S slots of T tokens.
        kernels: k taps for each token and channel, the oldest input first.
        lanes: as of :func:`causal_conv`; so are ``axis``, ``options``, what is returned and what is raised.
        axis: likewise.
        options: likewise.
    """
    reach = kernels.shape[2] - 1
    # Only inputs stand before a lane: no output is made there, so that no taps are needed.
    taps = jnp.pad(to_lanes(kernels, lanes), ((0, 0), (reach, 0), (0, 0), (0, 0)))
    return _with_halo(dynamic_op.dynamic_conv, x, (taps,), reach, lanes, axis, options)

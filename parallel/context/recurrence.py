"""Mamba-2 and the gated delta rule over documents whose blocks are scattered over workers.

A block of a recurrent layer is an affine map of its state (arXiv 2405.21060, 2412.06464). Every worker runs its blocks
from zero states and learns their maps; ``prefix.py`` composes them in the order of the documents; what each block's
true start state adds to its outputs is one product more. The state that a second pass would start from is not waited
for: only that product depends on what travels.

All functions run inside ``jax.shard_map`` over the axis of the workers, with ``check_vma=False``, and take the slots of
one worker as rows. Gradients flow through everything but the lanes.
"""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import gated_delta as delta_op
from pallas_kernels import ssd as ssd_op
from pallas_kernels.precision import contract
from parallel.context.lanes import Lanes
from parallel.context.prefix import scaled_states, transformed_states
from parallel.context.rows import Axis, check_lanes, from_lanes, to_lanes


def ssd(
    x: Float[Array, "S T H P"],
    dt: Float[Array, "S T H"],
    A: Float[Array, "H"],
    B: Float[Array, "S T G N"],
    C: Float[Array, "S T G N"],
    D: Float[Array, "H"] | None = None,
    *,
    lanes: Lanes,
    axis: Axis,
    operand_dtype: DTypeLike | None = None,
    **options: Any,
) -> tuple[Float[Array, "S T H P"], Float[Array, "L H P N"]]:
    """:func:`pallas_kernels.ssd.ssd` of the documents that a plan has scattered.

    Args:
        x: as the op's, of a worker's S slots of T tokens; so are ``dt``, ``A``, ``B``, ``C`` and ``D``.
        dt: step sizes.
        A: decay rates.
        B: input projections.
        C: output projections.
        D: weight of the skip connection.
        lanes: of the plan, sharded by :func:`parallel.context.rows.lane_specs`.
        axis: the mesh axis, or axes, of the workers.
        operand_dtype: as the op's.
        options: ``chunk_size`` and ``implementation``, as the op takes them.

    Returns:
        y in the dtype of x (finite on padding, otherwise unspecified there), and the float32 state after the last
        document of each lane (``lanes.ends`` says which end there).

    Raises:
        ValueError: as the op, and where rows, lanes and axis do not fit together.
    """
    check_lanes(lanes, axis, x.shape)
    slots, _, H, P = x.shape
    G, N = B.shape[2:]
    x, dt, B, C = (to_lanes(v, lanes) for v in (x, dt, B, C))
    ids = jnp.asarray(lanes.segment_ids[0])
    y, own = ssd_op.ssd(
        x,
        dt,
        A,
        B,
        C,
        D,
        segment_ids=ids,
        initial_state=None,
        num_segments=1,
        open_ends=True,
        operand_dtype=operand_dtype,
        **options,
    )
    assert own is not None
    own = own[:, 0].reshape(-1, H, P * N)
    entered = (ids == 1)[..., None]
    log = jnp.cumsum(jnp.where(entered, dt.astype(jnp.float32) * A.astype(jnp.float32), 0), axis=1)
    faded = jnp.where(entered, jnp.exp(log), 0)
    # Where another document follows in the lane, nothing of what enters comes out.
    through = jnp.where(jnp.max(ids, axis=1)[:, None] == 1, jnp.exp(log[:, -1]), 0)
    before = scaled_states(through[:slots], own[:slots], lanes, axis)
    by_group = before.reshape(-1, G, H // G * P, N)
    carried = contract("ltgn,lgmn->ltgm", C.astype(jnp.float32), by_group, operand_dtype=operand_dtype)
    y = y + faded[..., None] * carried.reshape(y.shape)
    left = (through[..., None] * before + own).reshape(-1, H, P, N)
    return from_lanes(y.astype(x.dtype), lanes), left


def gated_delta(
    q: Float[Array, "S T H dk"],
    k: Float[Array, "S T H dk"],
    v: Float[Array, "S T Hv dv"],
    g: Float[Array, "S T Hv"],
    beta: Float[Array, "S T Hv"],
    *,
    lanes: Lanes,
    axis: Axis,
    operand_dtype: DTypeLike | None = None,
    **options: Any,
) -> tuple[Float[Array, "S T Hv dv"], Float[Array, "L Hv dk dv"]]:
    """:func:`pallas_kernels.gated_delta.gated_delta` of the documents that a plan has scattered.

    The map of a block is ``out = M in + Z``. The columns of a state do not mix, so that one call of the op on dk columns
    more, whose values are zero and whose start is the identity, gives M beside Z, and beside each output the query as it
    meets the start state, ``M_t^T q_t``. The two passes that this replaces, one for (M, Z) and one from the true state,
    cost as much and wait for what travels.

    Args:
        q: as the op's, of a worker's S slots of T tokens; so are ``k``, ``v``, ``g`` and ``beta``.
        k: keys.
        v: values.
        g: log decays.
        beta: strength of each write.
        lanes: as of :func:`ssd`; so are ``axis``, ``operand_dtype``, ``options`` and what is raised.
        axis: likewise.
        operand_dtype: likewise.
        options: likewise.

    Returns:
        o in the dtype of v, and the state, as of :func:`ssd`.
    """
    check_lanes(lanes, axis, q.shape)
    slots, T, _, dk = q.shape
    Hv, dv = v.shape[2:]
    q, k, v, g, beta = (to_lanes(each, lanes) for each in (q, k, v, g, beta))
    rows = q.shape[0]
    wide = jnp.concatenate([jnp.zeros((rows, T, Hv, dk), v.dtype), v], axis=-1)
    start = jnp.broadcast_to(jnp.eye(dk, dk + dv), (rows, 1, Hv, dk, dk + dv))
    o, own = delta_op.gated_delta(
        q,
        k,
        wide,
        g,
        beta,
        segment_ids=jnp.asarray(lanes.segment_ids[0]),
        initial_state=start,
        num_segments=None,
        open_ends=True,
        operand_dtype=operand_dtype,
        **options,
    )
    assert own is not None
    matrix, state = own[:, 0, ..., :dk], own[:, 0, ..., dk:]
    before = transformed_states(matrix[:slots], state[:slots], lanes, axis)
    reads = o[..., :dk].astype(jnp.float32)
    carried = contract("lthk,lhkv->lthv", reads, before, operand_dtype=operand_dtype)
    left = state + jnp.einsum("lhjk,lhkv->lhjv", matrix, before, precision="highest")
    return from_lanes((o[..., dk:] + carried).astype(v.dtype), lanes), left

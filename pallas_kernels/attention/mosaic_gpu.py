"""Attention on Hopper GPUs through Mosaic: TMA copies, WGMMA products, bfloat16 operands and float32 softmax."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.bits import MOST_KEYS, words
from pallas_kernels.attention.blocks import NO_KEY, NO_QUERY, Places, whole
from pallas_kernels.attention.common import CONSUMERS, ROWS, statistics
from pallas_kernels.attention.mask import Marks
from pallas_kernels.attention.mosaic_forward import forward
from pallas_kernels.attention.mosaic_key_gradients import key_gradients
from pallas_kernels.attention.mosaic_query_gradient import query_gradient
from pallas_kernels.attention.options import Options
from pallas_kernels.attention.tiles import DEFAULTS, Tiles
from pallas_kernels.tiles import tiles

REASON = "warp-specialised TMA and WGMMA kernels of our own, blocks that no query sees left out"
BESIDE = (
    "nothing but casts, paddings and the sums of the backward pass over channels: no product, sort or gather"
)


def supports(q, k, _v, marks: Marks, options: Options) -> str | None:
    d = q.shape[3]
    if d not in DEFAULTS:
        return f"head dimension {d} is none of {', '.join(map(str, DEFAULTS))}"
    dtype = jnp.dtype(k.dtype if options.operand_dtype is None else options.operand_dtype)
    if dtype != jnp.bfloat16:
        return f"operands are bfloat16, not {dtype.name}"
    if marks.mask is not None and marks.mask.shape[2] > MOST_KEYS:
        return f"it takes a mask of at most {MOST_KEYS} keys, not {marks.mask.shape[2]}"
    if not options.scale > 0:
        return f"scale={options.scale!r} is not positive"
    return None


def _launch(options: Options, d: int) -> dict[str, Any]:
    """What every kernel is told."""
    return {
        "window": options.window,
        "soft_cap": options.soft_cap,
        "scale": options.scale,
        "kv_layout": options.kv_layout,
        "tiles": tiles("attention", f"d{d}", DEFAULTS[d]),
    }


def _places(q_side: Any, block_q: int, kv_side: Any, block_kv: int) -> tuple[Places, Places]:
    (q_ids, q_positions, held), (kv_ids, kv_positions, owned) = q_side, kv_side
    queries = whole(q_ids, q_positions, block_q, NO_QUERY, held)
    return queries, whole(kv_ids, kv_positions, block_kv, NO_KEY, owned)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, q_side, kv_side, options):
    """Output [B, T, H, d] and lse [B, T, H] of bfloat16 operands; sides: (segment ids, positions, words or None)."""
    launch = _launch(options, q.shape[3])
    own: Tiles = launch["tiles"]
    queries, keys = _places(q_side, CONSUMERS * ROWS, kv_side, own.block_kv)
    out, lse = forward(q, k, v, queries, keys, **launch)
    return out, lse.swapaxes(1, 2)


def _gradients(q, k, v, q_side, kv_side, out, lse, dout, dlse, options):
    """dQ, dK and dV in bfloat16."""
    launch = _launch(options, q.shape[3])
    own: Tiles = launch["tiles"]
    stats = statistics(out, lse, dout, dlse)
    operands = (q, k, v, dout.astype(q.dtype), stats)
    queries, keys = _places(q_side, CONSUMERS * ROWS, kv_side, own.dq_block_kv)
    dq = query_gradient(*operands, queries, keys, **launch)
    queries, keys = _places(q_side, own.dkv_block_q, kv_side, CONSUMERS * ROWS)
    return dq, *key_gradients(*operands, queries, keys, **launch)


def _attend_fwd(q, k, v, q_side, kv_side, options):
    outputs: Any = _attend(q, k, v, q_side, kv_side, options)
    return outputs, (q, k, v, q_side, kv_side, *outputs)


def _attend_bwd(options, residuals, cotangents):
    q, k, v, q_side, kv_side, out, lse = residuals
    dout, dlse = cotangents
    return *_gradients(q, k, v, q_side, kv_side, out, lse, dout, dlse, options), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _sides(marks: Marks):
    held, owned = (None, None) if marks.mask is None else words(marks.mask)
    return (marks.q_segment_ids, marks.q_positions, held), (marks.kv_segment_ids, marks.kv_positions, owned)


def run(q, k, v, marks: Marks, options: Options):
    narrow = (w.astype(jnp.bfloat16) for w in (q, k, v))
    outputs: Any = _attend(*narrow, *_sides(marks), options)
    out, lse = outputs
    return out.astype(q.dtype), lse


def backward(q, k, v, out, lse, dout, dlse, marks: Marks, options: Options):
    one, two, three = (w.astype(jnp.bfloat16) for w in (q, k, v))
    grads = _gradients(one, two, three, *_sides(marks), out, lse, dout, dlse, options)
    return tuple(g.astype(w.dtype) for g, w in zip(grads, (q, k, v), strict=True))

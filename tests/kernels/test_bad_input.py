"""Arguments of a wrong dtype, of no size or of a wrong kind: every op names them, and says what it takes."""

import jax.numpy as jnp
import pytest

from pallas_kernels.attention import attention
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.causal_conv.step import causal_conv_step
from pallas_kernels.causal_conv.window import causal_conv_window
from pallas_kernels.dynamic_conv import dynamic_conv
from pallas_kernels.gated_delta import gated_delta
from pallas_kernels.gated_delta.step import gated_delta_step
from pallas_kernels.gated_delta.window import gated_delta_window
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.norm_quant import norm_quant
from pallas_kernels.paged_attention import OpenTail, page_scores, paged_attention
from pallas_kernels.segmented_matmul import segmented_matmul
from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.step import ssd_step
from pallas_kernels.ssd.window import ssd_window

F, Z, B = (
    lambda *shape, dtype=dtype: jnp.ones(shape, dtype) for dtype in (jnp.float32, jnp.int32, jnp.bool_)
)
SSD = {"x": F(2, 4, 4, 8), "dt": F(2, 4, 4), "A": -F(4), "B": F(2, 4, 2, 8), "C": F(2, 4, 2, 8)}
DELTA = {"q": F(2, 4, 2, 8), "k": F(2, 4, 2, 8), "v": F(2, 4, 4, 8), "g": -F(2, 4, 4), "beta": F(2, 4, 4)}
WINDOW = {"ancestors": B(2, 4, 4), "initial_state": F(2, 4, 8, 8)}
POOL = {"pool": F(3, 4, 8, 8), "slots": Z(2), "live": B(2), "fresh": B(2)}


def one_token(arrays):
    return {name: a[:, 0] if a.ndim > 1 else a for name, a in arrays.items()}


PLACES = {name: Z(2, 4) for name in ("q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids")}
TAIL = OpenTail(F(2, 2, 3, 16), F(2, 2, 3, 16), Z(2), Z(2, 3), B(2, 1, 3))
SEGMENTS = {"segment_ids": Z(2, 4), "initial_state": F(2, 1, 3, 8)}
GOOD = {
    attention: {"q": F(2, 4, 4, 8), "k": F(2, 4, 2, 8), "v": F(2, 4, 2, 8), **PLACES, "mask": B(2, 4, 4)},
    paged_attention: {
        "q": F(2, 1, 4, 16),
        "k_pages": F(6, 2, 8, 16),
        "v_pages": F(6, 2, 8, 16),
        "table": Z(2, 2, 3),
        "logical": Z(2, 2, 3),
        "count": Z(2, 2),
        "kv_len": Z(2, 2),
        "q_positions": Z(2, 1),
    },
    page_scores: {
        "q": F(2, 4, 16),
        "page_min": F(6, 2, 16),
        "page_max": F(6, 2, 16),
        "table": Z(2, 2, 3),
        "num_pages": Z(2, 2),
    },
    causal_conv: {"x": F(2, 4, 8), "weight": F(4, 8), "bias": F(8), **SEGMENTS},
    causal_conv_step: {
        "x": F(2, 8),
        "weight": F(4, 8),
        "bias": F(8),
        "pool": F(3, 3, 8),
        "slots": Z(2),
        "live": B(2),
    },
    causal_conv_window: {
        "x": F(2, 4, 8),
        "weight": F(4, 8),
        "bias": F(8),
        "ancestors": B(2, 4, 4),
        "initial_state": F(2, 3, 8),
    },
    dynamic_conv: {"x": F(2, 4, 8), "kernels": F(2, 4, 4, 8), **SEGMENTS},
    gated_delta: {**DELTA, "segment_ids": Z(2, 4), "initial_state": F(2, 1, 4, 8, 8)},
    gated_delta_step: {**one_token(DELTA), **POOL},
    gated_delta_window: {**DELTA, **WINDOW},
    ssd: {**SSD, "D": F(4), "segment_ids": Z(2, 4), "initial_state": F(2, 1, 4, 8, 8)},
    ssd_step: {**one_token(SSD), "D": F(4), **POOL},
    ssd_window: {**SSD, "D": F(4), **WINDOW},
    grouped_matmul: {"x": F(8, 16), "w": F(3, 16, 8), "sizes": Z(3)},
    norm_quant: {"x": F(4, 32), "weight": F(32), "residual": F(4, 32)},
    segmented_matmul: {
        "x": F(8, 16),
        "a": F(3, 16, 4),
        "b": F(3, 4, 8),
        "scaling": F(3),
        "slots": Z(8),
    },
}
WRONG = {"float32": (jnp.int32, "float"), "int32": (jnp.float32, "integer"), "bool": (jnp.int32, "bool")}


@pytest.mark.parametrize("op", GOOD, ids=lambda op: op.__name__)
def test_every_array_of_a_wrong_dtype_is_named(op, own_checks):
    for name, array in GOOD[op].items():
        dtype, allowed = WRONG[array.dtype.name]
        with pytest.raises(
            ValueError, match=rf"^{name}\.dtype='{jnp.dtype(dtype).name}': expected .*{allowed}"
        ):
            op(**(GOOD[op] | {name: array.astype(dtype)}))


@pytest.mark.parametrize("name", OpenTail._fields)
def test_the_dtypes_of_a_tail_are_named(name, own_checks):
    array = getattr(TAIL, name)
    tail = TAIL._replace(**{name: array.astype(WRONG[array.dtype.name][0])})
    with pytest.raises(ValueError, match=rf"^tail\.{name}\.dtype="):
        paged_attention(**GOOD[paged_attention], tail=tail)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (attention, {"window": 2.5}, r"^window=2\.5: expected None or at least 1, a whole number"),
        (attention, {"window": True}, "^window=True"),
        (attention, {"soft_cap": "high"}, "^soft_cap='high': expected None or a positive number"),
        (attention, {"soft_cap": float("nan")}, "^soft_cap=nan"),
        (attention, {"scale": "small"}, "^scale='small': expected None or a number"),
        (
            attention,
            {"operand_dtype": "nibble"},
            "^operand_dtype='nibble': expected None or one of .*'bfloat16'",
        ),
        (attention, {"q": F(2, 4, 0, 8)}, "^q.shape=.*at least one query, head and channel"),
        (attention, {name: F(2, 4, 2, 0) for name in "qkv"}, "^q.shape=.*at least one query, head"),
        (paged_attention, {"window": "all"}, "^window='all'"),
        (paged_attention, {"q": F(0, 1, 4, 16)}, r"^q.shape=.*at least one row"),
        (paged_attention, {"q": F(2, 1, 0, 16)}, r"^q.shape=.*at least one row"),
        (paged_attention, {"tail": (1, 2)}, "^tail='tuple': expected None or OpenTail"),
        (page_scores, {"q": F(2, 0, 16)}, r"^q.shape=.*at least one row, head"),
        (causal_conv, {"num_segments": 1.5}, r"^num_segments=1\.5: expected None or at least 1, a whole"),
        (causal_conv_window, {"x": F(2, 0, 8)}, "^x.shape=.*at least one node"),
        (gated_delta, {"chunk_size": "64"}, "^chunk_size='64': expected at least 1, a whole number"),
        (gated_delta, {name: F(2, 4, 0, 8) for name in "qk"}, "^q.shape=.*at least one token and head"),
        (ssd, {"chunk_size": None}, "^chunk_size=None: expected at least 1"),
        (ssd, {name: F(2, 4, 0, 8) for name in "BC"}, "^B.shape=.*G, N"),
        (grouped_matmul, {"w": F(0, 16, 8), "sizes": Z(0)}, "^w.shape=.*at least one expert"),
    ],
)
def test_what_has_no_size_or_is_no_number_is_named(own_checks, op, change, message):
    with pytest.raises(ValueError, match=message):
        op(**(GOOD[op] | change))

"""The interpreted GPU kernels of paged attention on random calls, against plain loops in float64."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compat
from tests.kernels.kernel_cases import close
from tests.kernels.paged_cases import by_hand, draw_call, quantized

pytestmark = pytest.mark.slow


def rounded(call):
    """``call`` with queries, tail and plain pages in bfloat16."""
    pools = {
        name: pages.astype(jnp.bfloat16)
        for name in ("k_pages", "v_pages")
        if isinstance(pages := getattr(call, name), np.ndarray)
    }
    tail = call.tail
    if tail is not None:
        tail = tail._replace(k=tail.k.astype(jnp.bfloat16), v=tail.v.astype(jnp.bfloat16))
    return replace(call, q=call.q.astype(jnp.bfloat16), tail=tail, **pools)


@st.composite
def calls(draw, granularity):
    """A call, and the same with pages as they are to be understood: odd lengths, gaps, NaN where nothing is read."""
    call = draw_call(
        draw(st.integers(0, 2**20)),
        W=draw(st.integers(1, 5)),
        K=draw(st.integers(1, 3)),
        G=draw(st.integers(1, 4)),
        d=64,
        page=draw(st.sampled_from([16, 32, 64])),
        n=draw(st.integers(2, 5)),
        t=draw(st.sampled_from([None, 7])),
        granularity=granularity,
    )
    call = replace(
        call, window=draw(st.sampled_from([None, 40])), soft_cap=draw(st.sampled_from([None, 2.0]))
    )
    bits = draw(st.sampled_from([0, 8, 4]))
    plain = call
    if bits:
        call, plain = quantized(call, bits, draw(st.booleans()))
        plain = replace(plain, q=rounded(plain).q, tail=rounded(plain).tail)
    return rounded(call), plain if bits else rounded(plain)


@pytest.mark.parametrize(
    ("implementation", "granularity"), [("mosaic_gpu", None), ("mosaic_gpu", "page"), ("triton", "token")]
)
@settings(max_examples=3)
@given(data=st.data())
def test_random_calls_agree_with_plain_loops(implementation, granularity, data):
    call, plain = data.draw(calls(granularity))
    with compat.interpreted():
        found = call.run(implementation=implementation, return_mass=True)
    close(tuple(found), by_hand(plain), 2e-2)

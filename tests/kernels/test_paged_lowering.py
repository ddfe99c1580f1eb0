"""What XLA runs of paged attention and of page scores lowers for a TPU too, at the shapes of the cases."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import page_scores
from pallas_kernels.paged_attention.cases import CASES
from pallas_kernels.proof import lowering

DEVICES = pytest.mark.parametrize("lower", [lowering.lower_tpu, lowering.lower_cuda])


@DEVICES
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_paged_attention_lowers(lower, case):
    """Two products over the pages (four where a byte holds two channels) and two over the tail, and one more of each
    where mean probabilities are wanted; no sort, no kernel."""
    text = lower(case.call("xla"), case.avals())
    found = lowering.outside(text)
    sealed = 4 if case.options.get("bits") == 4 else 2
    mass = bool(case.options.get("return_mass"))
    assert found.dots == sealed + mass + (2 + mass if "k_tail" in case.avals() else 0)
    assert found.sorts == 0 and "custom_call" not in text
    # Nothing that only a CPU needs: what holds values in memory there is a conditional.
    assert "stablehlo.case" not in text and "stablehlo.if" not in text


@DEVICES
@pytest.mark.parametrize("reduce", ["max", "none"])
def test_page_scores_lower(lower, reduce):
    """8B at 64k: 4096 pages of 16 keys; one product for the greatest values, one for the least."""
    B, H, K, d, n = 8, 32, 8, 128, 4096
    bound = jax.ShapeDtypeStruct((B * n, K, d), jnp.bfloat16)
    text = lower(
        lambda *a: page_scores(*a[:3], table=a[3], num_pages=a[4], reduce=reduce),
        jax.ShapeDtypeStruct((B, H, d), jnp.bfloat16),
        *(bound, bound),
        jax.ShapeDtypeStruct((B, K, n), jnp.int32),
        jax.ShapeDtypeStruct((B, K), jnp.int32),
    )
    found = lowering.outside(text)
    assert (found.dots, found.sorts) == (2, 0)
    # Nothing but the two bounds of each page is gathered.
    assert found.gathers == (B * K * n * d,) * 2

"""The Hopper kernel of paged attention: interpreted, lowered for CUDA, broken on purpose, and refused where it cannot run."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat
from pallas_kernels.paged_attention import mosaic_kernel, paged_attention, quantize_pages
from pallas_kernels.paged_attention.cases import CASES
from pallas_kernels.proof import interpret, lowering, numerics
from tests.kernels.paged_cases import draw_call
from tests.kernels.proof.poison import must_fail

SMALL = [case for case in CASES if case.small]
QUICK = {"small page16 d64", "small page32 selected", "small 4 bits"}


def sorted_by_cost(cases):
    """One case of each kind runs always, the others with the slow tests."""
    marks = {case.name: () if case.name in QUICK else (pytest.mark.slow,) for case in cases}
    return [pytest.param(case, id=case.name, marks=marks[case.name]) for case in cases]


@pytest.mark.parametrize("case", sorted_by_cost(SMALL))
def test_the_interpreted_kernel_agrees_with_the_reference(case):
    """With NaN behind every row's length and in pages of nobody."""
    with compat.interpreted():
        numerics.compare_case(case, "mosaic_gpu", seed=1, repeat=case is SMALL[0]).require(case.tolerance)


def test_rows_without_keys_are_zero():
    call = draw_call(0, page=16, n=5, d=64, t=None, dtype=jnp.bfloat16)
    call = replace(call, kv_len=call.kv_len * 0)
    with compat.interpreted():
        found = call.run(implementation="mosaic_gpu")
    assert not found.out.any() and (found.lse == -jnp.inf).all()


@pytest.mark.slow
def test_a_poisoned_constant_is_noticed(monkeypatch):
    must_fail(monkeypatch, mosaic_kernel, "LOG2E", 1.3, SMALL[1], "mosaic_gpu")


@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this version of jax does not see races")
@pytest.mark.parametrize("case", sorted_by_cost(SMALL))
def test_the_kernel_has_no_races(case):
    arrays = jax.jit(case.inputs)(jax.random.key(0))
    interpret.run(case.call("mosaic_gpu"), arrays, races=True)


@pytest.mark.parametrize("case", sorted_by_cost(CASES))
def test_the_kernel_lowers_and_xla_only_merges(case):
    text = lowering.lower_cuda(case.call("mosaic_gpu"), case.avals())
    lowering.require_kernel(text, "mosaic_gpu", "paged_attention")
    found = lowering.outside(text)
    # The open tail is the only thing that XLA multiplies, and nothing of the pools is gathered.
    assert found.dots == (2 if "k_tail" in case.avals() else 0)
    assert (found.sorts, found.gathers) == (0, ())


@pytest.mark.parametrize(
    ("changes", "statics", "message"),
    [
        ({"dtype": jnp.float32}, {}, "must be bfloat16, not float32"),
        ({"page": 8}, {}, "pages of 16, 32 or 64 tokens, not 8"),
        ({"d": 96}, {}, "heads of 64 or 128 channels, not 96"),
        ({"granularity": "token"}, {}, "single tokens"),
        ({}, {"return_mass": True}, "it does not return mass"),
        ({}, {"operand_dtype": jnp.float32}, "operands are bfloat16, not float32"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(changes, statics, message):
    call = draw_call(0, **({"page": 16, "n": 4, "d": 64, "dtype": jnp.bfloat16} | changes))
    with compat.interpreted(), pytest.raises(ValueError, match=message):
        call.run(implementation="mosaic_gpu", **statics)


def refused(message: str, **changes) -> None:
    pages = jnp.zeros((4, 2, 16, 64), jnp.bfloat16)
    arguments = {
        "q": jnp.zeros((2, 1, 4, 64), jnp.bfloat16),
        "k_pages": pages,
        "v_pages": pages,
        "table": jnp.zeros((2, 2, 2), jnp.int32),
        "kv_len": jnp.zeros((2, 2), jnp.int32),
        "q_positions": jnp.zeros((2, 1), jnp.int32),
    }
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments | changes, implementation="mosaic_gpu")


def test_other_devices_are_refused_with_the_reason():
    refused("needs a Hopper GPU, not cpu")


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ({"k_pages": {"bits": 4}}, "plain both"),
        ({"k_pages": {"bits": 4}, "v_pages": {"bits": 8}}, "the same number of bits"),
        ({"k_pages": {"bits": 4}, "v_pages": {"bits": 4}}, "must fill 128 bytes .* not 32"),
        ({"k_pages": {"bits": 4, "per_channel": True}, "v_pages": {"bits": 4}}, "scales per channel"),
    ],
)
def test_quantised_pages_that_it_cannot_read_are_refused_with_the_reason(pools, message):
    pages = jnp.ones((4, 2, 16, 64), jnp.bfloat16)
    with compat.interpreted():
        refused(message, **{name: quantize_pages(pages, **options) for name, options in pools.items()})

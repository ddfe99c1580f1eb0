"""The GPU kernels of paged attention: interpreted, lowered for CUDA, broken on purpose, refused where they cannot run.

Pages go through Mosaic, single tokens through Triton; both have cases of their own.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat
from pallas_kernels.paged_attention import (
    mosaic_kernel,
    mosaic_mass,
    paged_attention,
    quantize_pages,
    triton_kernel,
)
from pallas_kernels.paged_attention.cases import CASES
from pallas_kernels.proof import interpret, lowering, numerics
from tests.kernels.paged_cases import draw_call
from tests.kernels.proof.poison import must_fail

SMALL = [case for case in CASES if case.small]
QUICK = {
    "small page16 d64",
    "small page32 selected",
    "small 4 bits",
    "small mass page16 tail W3",
    "small 8 bits by channel page16",
    "small tokens",
    "small tokens mass W3 tail",
}
KERNELS = {
    "mosaic_gpu": ("paged_attention", "paged_attention_mass"),
    "triton": ("paged_attention_tokens", "paged_attention_token_mass"),
}
NAMED = {case.name: case for case in CASES}


def sorted_by_cost(cases):
    """One case of each kind runs always, the others with the slow tests."""
    marks = {case.name: () if case.name in QUICK else (pytest.mark.slow,) for case in cases}
    return [pytest.param(case, id=case.name, marks=marks[case.name]) for case in cases]


@pytest.mark.parametrize("case", sorted_by_cost(SMALL))
def test_the_interpreted_kernel_agrees_with_the_reference(case):
    """With NaN behind every row's length and in pages of nobody."""
    with compat.interpreted():
        done = numerics.compare_case(case, case.implementations[0], seed=1, repeat=case is SMALL[0])
        done.require(case.tolerance)


def test_rows_without_keys_are_zero():
    call = draw_call(0, page=16, n=5, d=64, t=None, dtype=jnp.bfloat16)
    call = replace(call, kv_len=call.kv_len * 0)
    with compat.interpreted():
        found = call.run(implementation="mosaic_gpu")
    assert not found.out.any() and (found.lse == -jnp.inf).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (mosaic_kernel, "small page32 selected"),
        (mosaic_mass, "small mass page16 tail W3"),
        (triton_kernel, "small tokens"),
    ],
)
def test_a_poisoned_constant_is_noticed(monkeypatch, module, name):
    """Of the log-sum-exp in the first and last, of the probabilities alone in the second."""
    must_fail(monkeypatch, module, "LOG2E", 1.3, NAMED[name], NAMED[name].implementations[0])


@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this version of jax does not see races")
@pytest.mark.parametrize("case", sorted_by_cost([c for c in SMALL if "mosaic_gpu" in c.implementations]))
def test_the_kernel_has_no_races(case):
    arrays = jax.jit(case.inputs)(jax.random.key(0))
    interpret.run(case.call("mosaic_gpu"), arrays, races=True)


@pytest.mark.parametrize("case", sorted_by_cost(CASES))
def test_the_kernel_lowers_and_xla_only_merges(case):
    (implementation,) = case.implementations
    text = lowering.lower_cuda(case.call(implementation), case.avals())
    mass = bool(case.options.get("return_mass"))
    first, second = KERNELS[implementation]
    for kernel in (first, second) if mass else (first,):
        lowering.require_kernel(text, implementation, kernel)
    found = lowering.outside(text)
    # The open tail is the only thing that XLA multiplies, and nothing of the pools is gathered.
    assert found.dots == (2 + mass if "k_tail" in case.avals() else 0)
    assert (found.sorts, found.gathers) == (0, ())


@pytest.mark.parametrize(
    ("implementation", "changes", "statics", "message"),
    [
        ("mosaic_gpu", {"dtype": jnp.float32}, {}, "must be bfloat16, not float32"),
        ("mosaic_gpu", {"page": 8}, {}, "pages of 16, 32 or 64 tokens, not 8"),
        ("mosaic_gpu", {"d": 80}, {}, "heads of 64, 96, 128 or 256 channels, not 80"),
        ("mosaic_gpu", {"granularity": "token"}, {}, "single tokens"),
        ("mosaic_gpu", {}, {"operand_dtype": jnp.float32}, "operands are bfloat16, not float32"),
        ("triton", {}, {}, "it gathers single tokens, not whole pages"),
        ("triton", {"granularity": "token", "d": 96}, {}, "heads of 64, 128 or 256 channels, not 96"),
        ("triton", {"granularity": "token", "dtype": jnp.float32}, {}, "must be bfloat16, not float32"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_with_the_reason(implementation, changes, statics, message):
    call = draw_call(0, **({"page": 16, "n": 4, "d": 64, "dtype": jnp.bfloat16} | changes))
    with compat.interpreted(), pytest.raises(ValueError, match=message):
        call.run(implementation=implementation, **statics)


def refused(message: str, *, pool=(4, 2, 16, 64), implementation="mosaic_gpu", **changes) -> None:
    pages = jax.ShapeDtypeStruct(pool, jnp.bfloat16)
    arguments = {
        "q": jax.ShapeDtypeStruct((2, 1, 4, pool[3]), jnp.bfloat16),
        "k_pages": pages,
        "v_pages": pages,
        "table": jnp.zeros((2, pool[1], 2), jnp.int32),
        "kv_len": jnp.zeros((2, pool[1]), jnp.int32),
        "q_positions": jnp.zeros((2, 1), jnp.int32),
    }
    options = {name: changes.pop(name) for name in ("granularity",) if name in changes}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda given: paged_attention(**given, **options, implementation=implementation),
            arguments | changes,
        )


def test_other_devices_are_refused_with_the_reason():
    refused("needs a Hopper GPU, not cpu")


@pytest.mark.parametrize(
    ("pool", "pools", "message"),
    [
        ((4, 2, 16, 64), {"k_pages": {"bits": 4}}, "plain both"),
        ((4, 2, 16, 64), {"k_pages": {"bits": 4}, "v_pages": {"bits": 8}}, "the same number of bits"),
        (
            (4, 2, 16, 64),
            {"k_pages": {"bits": 4}, "v_pages": {"bits": 4, "per_channel": True}},
            "values must have scales per token",
        ),
        ((2, 1, 16, 64), {"k_pages": {"bits": 8}, "v_pages": {"bits": 8}}, "at least 64 tokens, .* not 32"),
        ((4, 2, 16, 256), {"k_pages": {"bits": 8}, "v_pages": {"bits": 8}}, "codes of 256 channels"),
        (
            (4, 2, 16, 96),
            {"k_pages": {"bits": 8, "per_channel": True}, "v_pages": {"bits": 8}},
            "multiples of 128 bytes for TMA, not 192",
        ),
    ],
)
def test_quantised_pages_that_it_cannot_read_are_refused_with_the_reason(pool, pools, message):
    pages = jax.ShapeDtypeStruct(pool, jnp.bfloat16)
    given = {
        name: jax.eval_shape(lambda p, options=options: quantize_pages(p, **options), pages)
        for name, options in pools.items()
    }
    with compat.interpreted():
        refused(message, pool=pool, **given)


def test_codes_beyond_what_triton_counts_are_refused_with_the_reason():
    pages = jax.ShapeDtypeStruct((2**16, 8, 64, 128), jnp.bfloat16)
    codes = jax.eval_shape(lambda p: quantize_pages(p, bits=8), pages)
    message = "counts to 4294967296 bytes of codes in 32 signed bits"
    logical = jnp.zeros((2, 8, 2), jnp.int32)
    given = {"k_pages": codes, "v_pages": codes, "logical": logical, "granularity": "token"}
    with compat.interpreted():
        refused(
            message,
            pool=pages.shape,
            implementation="triton",
            q=jax.ShapeDtypeStruct((2, 1, 16, 128), jnp.bfloat16),
            **given,
        )

"""The Hopper kernels of both convolutions without a GPU: interpreted on random documents, lowered, broken on purpose."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.causal_conv import cases as static
from pallas_kernels.causal_conv import causal_conv, mosaic_backward, mosaic_forward, mosaic_gpu
from pallas_kernels.causal_conv.tiles import Tiles
from pallas_kernels.dynamic_conv import cases as dynamic
from pallas_kernels.dynamic_conv import dynamic_conv
from pallas_kernels.proof import interpret, lowering, numerics
from pallas_kernels.tiles import using
from tests.kernels.kernel_cases import close, documents, values
from tests.kernels.proof.poison import must_fail

OPS = {"causal_conv": static, "dynamic_conv": dynamic}
EXACT = {"dtype": jnp.float32, "small": True, "tolerance": 2e-6}
CASES = {case.name: case for cases in OPS.values() for case in cases.CASES}


def small_tiles(op, columns=128, unroll=1):
    stack = ExitStack()
    stack.enter_context(compat.interpreted())
    for key in ("forward", "backward"):
        stack.enter_context(using(op, key, Tiles(8, columns, unroll)))
    return stack


def random_ids(seed: int, B: int, T: int, n: int) -> np.ndarray:
    """Documents 1..n of any length, 0 included, in row order, with padding anywhere between them."""
    rng = np.random.default_rng([seed, B, T, n])
    ids = np.zeros((B, T), np.int32)
    for row in ids:
        for s, (begin, end) in enumerate(np.sort(rng.integers(0, T + 1, 2 * n)).reshape(n, 2)):
            row[begin:end] = s + 1
    return ids


def compared(case, seed: int, ids=None, repeat=False, **tiles):
    """A small case on numbers of this seed, on these documents."""
    if ids is not None:
        made = case.inputs
        case = replace(case, inputs=lambda key: {**made(key), "segment_ids": jnp.asarray(ids)})
    with small_tiles(case.op, **tiles):
        numerics.compare_case(case, "mosaic_gpu", seed, repeat=repeat).require(case.tolerance)


@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients_agree_with_the_reference_on_random_documents(op, seed):
    """Two blocks of tokens and a document that reaches over their boundary by more than the filter, shorter ones, NaN on padding."""
    cases = OPS[op]
    case = cases.case("random", 1, 13, 128, (1,) * 4, gradients=cases.GRADIENTS, **EXACT)
    ids = np.array([[0] * 5 + [3] * 7 + [4]], np.int32)
    ids[:, :5] = random_ids(seed, 1, 5, 2)
    compared(case, seed % 1000, ids)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_calls_of_every_kind_agree_with_the_reference_and_repeat(op, seed):
    """Without ids, state, bias or activation; other filters; bfloat16; rows shorter than the filter; wider tiles."""
    cases = OPS[op]
    both = {**EXACT, "gradients": cases.GRADIENTS}
    linear = cases.case("linear", 1, 12, 128, (7, 5), k=2, options={"activation": None}, **both)
    compared(linear, seed, random_ids(seed, 1, 12, 2))
    # Two blocks of channels.
    compared(cases.case("longer than the row", 1, 4, 256, (2, 1), k=6, **both), seed)
    rounded = {**EXACT, "dtype": jnp.bfloat16, "tolerance": 1e-2, "gradients": cases.GRADIENTS}
    wide = cases.case("bfloat16", 1, 16, 256, (1,) * 4, **rounded)
    compared(wide, seed, random_ids(seed, 1, 16, 4), repeat=True, columns=256, unroll=4)
    if op == "dynamic_conv":
        return
    compared(cases.case("one document", 2, 9, 128, None, **both), seed)
    bare = cases.case("training", 1, 12, 128, (1,) * 4, gradients=("x", "weight"), **EXACT)
    made = bare.inputs
    bare = replace(
        bare,
        inputs=lambda key: {name: v for name, v in made(key).items() if name in ("x", "weight")},
        unspecified=lambda arrays: cases.unspecified(arrays)[:1],
    )
    compared(bare, seed, random_ids(seed, 1, 12, 4))


@pytest.mark.slow
def test_every_document_of_a_packed_row_is_convolved_alone_in_float64():
    ids = random_ids(3, 2, 20, 4)
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 20, 128), "weight": (4, 128), "bias": (128,), "initial_state": (2, 4, 3, 128)}
    a = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    with small_tiles("causal_conv"):
        y, state = values(causal_conv, {**a, "segment_ids": ids}, implementation="mosaic_gpu")
    left = a["initial_state"].copy()
    for row, s, at in documents(ids):
        u = np.concatenate([left[row, s - 1], a["x"][row, at]]).astype(np.float64)
        length = at.stop - at.start
        made = a["bias"] + sum(a["weight"][j] * u[j : j + length] for j in range(4))
        close(y[row, at], made / (1 + np.exp(-made)), 1e-6)
        left[row, s - 1] = u[length:]
    np.testing.assert_array_equal(state, left)


@pytest.mark.parametrize(
    "split",
    [pytest.param(at, marks=pytest.mark.slow if at == 2 else pytest.mark.nightly) for at in (1, 2, 9)],
)
def test_a_row_cut_anywhere_and_resumed_is_the_whole_row(split):
    a: dict[str, Any] = static._inputs(2, 17, 128, 4, None, jnp.float32, jax.random.key(split))
    state = a.pop("initial_state")

    def run(part, state):
        # A single token is a call for XLA.
        name = "xla" if part.stop - part.start == 1 else "mosaic_gpu"
        return causal_conv(**{**a, "x": a["x"][:, part]}, initial_state=state, implementation=name)

    with small_tiles("causal_conv"):
        y, last = run(slice(0, 17), state)
        first, middle = run(slice(0, split), state)
        second, end = run(slice(split, 17), middle)
    close(jnp.concatenate([first, second], axis=1), y, 1e-6)
    np.testing.assert_array_equal(end, last)


def poisoned(gradients=()):
    inputs = static.case("poisoned", 1, 9, 128, (4, 5), gradients=gradients, **EXACT)
    return replace(inputs, padding=None, unspecified=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "wrong", "gradients"),
    [
        (mosaic_forward, "sigmoid", lambda y: 1.0 / (1.0 + jnp.exp(-1.01 * y)), ()),
        (mosaic_backward, "sigmoid", lambda y: 1.0 / (1.0 + jnp.exp(-1.01 * y)), static.GRADIENTS),
        (mosaic_gpu, "state_gradient", lambda found, given: 2.0 * found, static.GRADIENTS),
    ],
)
def test_a_wrong_kernel_is_noticed(monkeypatch, module, name, wrong, gradients):
    with small_tiles("causal_conv"):
        must_fail(monkeypatch, module, name, wrong, poisoned(gradients), "mosaic_gpu")


@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this JAX does not see every race")
@pytest.mark.parametrize("op", OPS)
def test_there_is_no_race(op):
    cases = OPS[op]
    case = cases.case("races", 1, 20, 128, (2, 9, 5), gradients=cases.GRADIENTS, **EXACT)
    with using(op, "forward", Tiles(8, 128, 1)), using(op, "backward", Tiles(8, 128, 1)):
        interpret.run(case.call("mosaic_gpu"), jax.jit(case.inputs)(jax.random.key(1)), races=True)


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_lower_and_xla_only_gathers_final_states(name):
    case = CASES[name]
    text = lowering.lower_cuda(case.call("mosaic_gpu"), case.avals())
    for part in ("forward", "backward") if case.gradients else ("forward",):
        lowering.require_kernel(text, "mosaic_gpu", f"{case.op}_{part}")
    found = lowering.outside(text)
    assert (found.dots, found.sorts) == (0, 0)
    # The last inputs of each document, new ones and those of its initial state.
    assert found.gathers == (case.avals()["initial_state"].size,) * 2


def test_training_lowers_to_kernels_only():
    case = static.case("training", 1, 1000, 384, (600, 2, 300), gradients=("x", "weight", "bias"))
    made = case.inputs
    case = replace(case, inputs=lambda key: {n: v for n, v in made(key).items() if n != "initial_state"})
    assert lowering.outside(lowering.lower_cuda(case.call("mosaic_gpu"), case.avals())).gathers == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": (1, 8, 120)}, "channels in multiples of 128, not 120"),
        ({"weight": (9, 128)}, "2 to 8 taps, not 9"),
        ({"weight": (1, 128)}, "2 to 8 taps, not 1"),
        ({"x": (1, 1, 128)}, "single tokens are one fusion of XLA"),
    ],
)
def test_a_call_that_the_kernel_cannot_run_is_refused(change, reason):
    shapes = {"x": (1, 8, 128), "weight": (4, 128), **change}
    arrays: dict[str, Any] = {
        "x": jnp.zeros(shapes["x"]),
        "weight": jnp.zeros((shapes["weight"][0], shapes["x"][2])),
    }
    with compat.interpreted(), pytest.raises(ValueError, match=reason):
        causal_conv(**arrays, implementation="mosaic_gpu")


def test_other_dtypes_wider_kernels_and_other_devices_are_refused():
    x, kernels = jnp.zeros((1, 8, 128)), jnp.zeros((1, 8, 7, 128))
    with compat.interpreted():
        with pytest.raises(ValueError, match="2 to 6 taps, not 7"):
            dynamic_conv(x, kernels, implementation="mosaic_gpu")
        with pytest.raises(ValueError, match="bfloat16 or float32, not float16"):
            dynamic_conv(x.astype(jnp.float16), kernels[:, :, :4], implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="mosaic_gpu: it needs a Hopper GPU, not cpu"):
        dynamic_conv(x, kernels[:, :, :4], implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 12}, "rows=12: expected a multiple of 8"),
        ({"columns": 192}, "columns=192: expected 128, 256 or 512"),
        ({"rows": 24, "unroll": 5}, "unroll=5: expected a divisor of 24"),
    ],
)
def test_tiles_that_no_kernel_has_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**change)

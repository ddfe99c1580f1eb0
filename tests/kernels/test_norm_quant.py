"""RMSNorm and rounding in one: against float64, against its two ops, between projections, and the kernel without a GPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import compat, tiles
from pallas_kernels.norm_quant import mosaic_gpu, mosaic_kernel, norm_quant
from pallas_kernels.norm_quant.cases import CASES, case
from pallas_kernels.norm_quant.tiles import Tiles
from pallas_kernels.proof import interpret, lowering, numerics
from pallas_kernels.quantized_matmul import (
    dequantize_rows,
    dequantize_weight,
    quantize_rows,
    quantize_weight,
    quantized_matmul,
)
from tests.kernels.kernel_cases import close, normal
from tests.kernels.proof.poison import must_fail

SMALL = {case.name: case for case in CASES if case.small}
KINDS = {"int8": np.int8, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
EPS = 1e-5


def draw(M: int, K: int, dtype: Any = jnp.bfloat16, residual: bool = True) -> dict[str, Any]:
    """Rows of very different sizes; the sums need rounding."""
    size = 10.0 ** np.linspace(-2, 3, M)[:, None]
    arrays = {"x": normal(1, M, K) * size, "weight": 1 + 0.3 * normal(2, K)}
    arrays |= {"residual": normal(3, M, K) * 0.3 * size} if residual else {}
    return {name: jnp.asarray(v, dtype) for name, v in arrays.items()}


@partial(jax.jit, static_argnames=("group", "clip", "code_dtype", "eps", "implementation"))
def run(x, weight, residual=None, **options):
    return norm_quant(x, weight, residual=residual, **options)


@partial(jax.jit, static_argnames=("group", "code_dtype"))
def one_after_the_other(x, weight, residual=None, *, group=None, code_dtype=jnp.int8):
    """The composition that the op stands for, through ``quantize_rows``."""
    info = jnp.finfo(x.dtype)
    u = x.astype(jnp.float32) + (0 if residual is None else residual.astype(jnp.float32))
    u = jax.lax.reduce_precision(u, info.nexp, info.nmant)
    y = u * jax.lax.rsqrt(jnp.mean(jnp.square(u), axis=-1, keepdims=True) + EPS) * weight.astype(jnp.float32)
    return quantize_rows(y, group=group, code_dtype=code_dtype), u.astype(x.dtype)


def exact(x, weight, residual=None, *, group=None, clip=1.0, kind=np.int8):
    """Sum, scales and codes before rounding, in float64, by another's bfloat16."""
    held, wide = np.asarray(x), np.asarray(weight, np.float64)
    if residual is not None:
        held = (held.astype(np.float32) + np.asarray(residual, np.float32)).astype(held.dtype)
    u = held.astype(np.float64)
    y = u / np.sqrt(np.mean(u**2, axis=1, keepdims=True) + EPS) * wide
    size = group or u.shape[1]
    top = 127 if kind == np.int8 else float(ml_dtypes.finfo(kind).max)
    scale = np.maximum(np.abs(y.reshape(len(y), -1, size)).max(axis=2), 1e-5) * clip / top
    return held, scale, y / np.repeat(scale, size, axis=1)


def ordinals(codes: np.ndarray) -> np.ndarray:
    """Codes numbered in the order of their values."""
    if codes.dtype == np.int8:
        return codes.astype(np.int64)
    bits = codes.view(np.uint8).astype(np.int64)
    return np.where(bits > 127, 128 - bits, bits)


def agrees(got, arrays, share: float = 1e-3, **options) -> None:
    """Codes next to those of float64 at most, and few of them; scales and sums the same."""
    rows, total = got
    held, scale, steps = exact(**arrays, **options)
    kind = options.get("kind", np.int8)
    codes = np.asarray(rows.codes)
    assert codes.dtype == kind and rows.scale.dtype == jnp.float32 and codes.shape == arrays["x"].shape
    np.testing.assert_allclose(rows.scale, scale, rtol=1e-6)
    top = 127 if kind == np.int8 else float(ml_dtypes.finfo(kind).max)
    wanted = np.clip(np.round(steps), -top - 1, top) if kind == np.int8 else np.clip(steps, -top, top)
    off = np.abs(ordinals(codes) - ordinals(wanted.astype(np.float32).astype(kind)))
    assert off.max() <= 1 and np.mean(off) <= share
    if "residual" in arrays:
        np.testing.assert_array_equal(np.asarray(total).view(np.uint8), held.view(np.uint8))
    else:
        assert total is None


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@given(data=st.data())
def test_it_is_norm_and_rounding_in_float64(implementation, data):
    group = data.draw(st.sampled_from([None, 32, 64, 128]))
    K = (group or 1) * data.draw(st.integers(1, 4)) * data.draw(st.sampled_from([1, 3]))
    dtype = data.draw(st.sampled_from([jnp.bfloat16, jnp.float32]))
    arrays = draw(data.draw(st.integers(1, 4)), K, dtype, data.draw(st.booleans()))
    kind = KINDS[data.draw(st.sampled_from(list(KINDS)))]
    clip = data.draw(st.sampled_from([1.0, 0.9]))
    got = run(**arrays, group=group, clip=clip, code_dtype=kind, implementation=implementation)
    # Of few codes one near a tie is a large share.
    agrees(got, arrays, max(1e-3, 2 / arrays["x"].size), group=group, clip=clip, kind=kind)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 64])
def test_it_is_its_two_ops_to_the_bit(implementation, kind, group):
    arrays = draw(5, 256)
    wanted, sums = one_after_the_other(**arrays, group=group, code_dtype=KINDS[kind])
    rows, total = run(**arrays, group=group, code_dtype=KINDS[kind], implementation=implementation)
    for got, ours in ((rows.codes, wanted.codes), (rows.scale, wanted.scale), (total, sums)):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(ours).view(np.uint8))


def test_leading_dimensions_become_rows_of_codes():
    arrays = draw(6, 64)
    rows, total = run(**arrays)
    folded = {name: v.reshape(2, 3, 64) if v.ndim == 2 else v for name, v in arrays.items()}
    again, sums = run(**folded)
    assert again.codes.shape == (6, 64) and sums.shape == (2, 3, 64)
    np.testing.assert_array_equal(again.codes, rows.codes)
    np.testing.assert_array_equal(sums.reshape(6, 64), total)
    one, none = run(arrays["x"][0], arrays["weight"])
    assert one.codes.shape == (1, 64) and none is None


def strange(K: int = 256) -> dict[str, Any]:
    """NaN, infinities, squares past float32, zeros: a row each, and an ordinary one last."""
    x = normal(5, 6, K)
    x[0, 3], x[1, 3], x[1, K - 1], x[2], x[3], x[4, 7] = np.nan, np.inf, -np.inf, 1e25, 0, -np.inf
    return {"x": jnp.asarray(x), "weight": jnp.asarray(1 + 0.3 * normal(2, K))}


@pytest.mark.parametrize("implementation", ["xla", "reference", "mosaic_gpu"])
@pytest.mark.parametrize(("kind", "group"), [("int8", None), ("e4m3", 128)])
def test_rows_of_no_numbers_are_as_their_two_ops_leave_them(implementation, kind, group):
    arrays = strange()
    wanted, _ = one_after_the_other(**arrays, group=group, code_dtype=KINDS[kind])
    with compat.interpreted():
        rows, _ = run(**arrays, group=group, code_dtype=KINDS[kind], implementation=implementation)
    np.testing.assert_array_equal(np.isnan(rows.scale), np.isnan(wanted.scale))
    assert np.isnan(rows.scale).any(axis=1).tolist() == [True, True, False, False, True, False]
    np.testing.assert_allclose(rows.scale, wanted.scale, rtol=1e-6)
    good = ~np.repeat(np.isnan(np.asarray(wanted.scale)), group or 256, axis=1)
    off = np.abs(ordinals(np.asarray(rows.codes)) - ordinals(np.asarray(wanted.codes)))
    assert off[good].max() <= 1 and off[good].mean() <= 1e-3
    assert not np.asarray(rows.codes, np.float32)[2:4].any()


@pytest.mark.parametrize("implementation", ["xla", "reference", "mosaic_gpu"])
def test_rows_do_not_know_each_other(implementation):
    arrays = draw(3, 256, jnp.float32)
    poisoned = {**arrays, "x": arrays["x"].at[1].set(jnp.nan)}
    with compat.interpreted():
        whole = run(**arrays, implementation=implementation)
        rest = run(**poisoned, implementation=implementation)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(rest), strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
@pytest.mark.parametrize("group", [None, 64])
def test_projections_share_the_rows(kind, group):
    """Two products of one result are those of rows rounded for each, and close to the products of the values."""
    arrays = draw(5, 128)
    code_dtype = KINDS[kind]
    ws = [
        quantize_weight(jnp.asarray(normal(n, N, 128)), bits=8, group=group, code_dtype=code_dtype)
        for n, N in ((7, 64), (8, 96))
    ]
    shared, u = norm_quant(**arrays, group=group, code_dtype=code_dtype)
    y = np.asarray(exact(**arrays, group=group, kind=code_dtype)[2], np.float64)
    for w in ws:
        got = quantized_matmul(shared, w)
        alone, again = norm_quant(**arrays, group=group, code_dtype=code_dtype)
        np.testing.assert_array_equal(got, quantized_matmul(alone, w))
        np.testing.assert_array_equal(u, again)
        separately = quantize_rows(dequantize_rows(shared), group=group, code_dtype=code_dtype)
        close(got, quantized_matmul(separately, w), 1e-5)
        values = y * np.repeat(np.asarray(shared.scale, np.float64), group or 128, axis=1)
        close(got, values @ np.asarray(dequantize_weight(w), np.float64).T, 2e-2 if kind == "int8" else 6e-2)


@pytest.mark.parametrize("implementation", ["xla", "reference", "mosaic_gpu"])
def test_gradients_are_those_of_scales_and_sums(implementation):
    """Against central differences in float64."""
    arrays = draw(2, 128, jnp.float32)
    arrays["x"] = arrays["x"] / jnp.abs(arrays["x"]).max()
    weights = normal(11, 2, 1), normal(12, 2, 128)

    def loss(held):
        rows, total = norm_quant(**held, implementation=implementation)
        assert total is not None
        # Codes count for nothing, however large.
        return (
            jnp.vdot(rows.scale, weights[0])
            + jnp.vdot(total, weights[1])
            + 1e3 * rows.codes.astype(jnp.float32).sum()
        )

    with compat.interpreted():
        got = jax.jit(jax.grad(loss))(arrays)

    def of_float64(held):
        u = held["x"] + held["residual"]
        y = u / np.sqrt(np.mean(u**2, axis=1, keepdims=True) + EPS) * held["weight"]
        return np.vdot(np.abs(y).max(axis=1, keepdims=True) / 127, weights[0]) + np.vdot(u, weights[1])

    held = {name: np.asarray(v, np.float64) for name, v in arrays.items()}
    for name, value in held.items():
        wanted = np.zeros_like(value)
        for at in np.ndindex(value.shape):
            moved = [value.copy(), value.copy()]
            moved[0][at] += 1e-6
            moved[1][at] -= 1e-6
            up, down = (of_float64(held | {name: v}) for v in moved)
            wanted[at] = (up - down) / 2e-6
        close(got[name], wanted, 1e-5)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_float8_codes_have_no_gradient_either(kind):
    def loss(x):
        rows, _ = norm_quant(x, jnp.ones(32), code_dtype=KINDS[kind])
        return rows.codes.astype(jnp.float32).sum()

    assert not np.asarray(jax.grad(loss)(jnp.asarray(normal(1, 2, 32)))).any()


def in_kernel(arrays, config=None, **options):
    K = arrays["x"].shape[1]
    key = f"K{K} {arrays['x'].dtype.name} few"
    with compat.interpreted(), tiles.using("norm_quant", key, config or Tiles()):
        return jax.tree.map(
            np.asarray, jax.jit(lambda a: norm_quant(**a, **options, implementation="mosaic_gpu"))(arrays)
        )


@pytest.mark.parametrize(
    ("M", "K", "dtype", "group", "kind", "config"),
    [
        # The last row alone in its warpgroup; its last group alone in the second block.
        (3, 1152, jnp.bfloat16, None, "int8", Tiles(2, 2, 1)),
        (2, 2048, jnp.float32, 128, "e4m3", Tiles(blocks=1)),
        (3, 384, jnp.bfloat16, 64, "e5m2", Tiles(3, 1)),
        pytest.param(2, 2688, jnp.bfloat16, None, "int8", None, marks=pytest.mark.slow),
        pytest.param(2, 4096, jnp.float32, 32, "int8", Tiles(2, 2, 2), marks=pytest.mark.slow),
        # Two copies a row.
        pytest.param(1, 16384, jnp.bfloat16, 32, "e4m3", None, marks=pytest.mark.slow),
    ],
)
def test_the_interpreted_kernel_agrees_with_float64_and_repeats(M, K, dtype, group, kind, config):
    arrays = draw(M, K, dtype)
    options = {"group": group, "code_dtype": KINDS[kind]}
    found = in_kernel(arrays, config, **options)
    agrees(found, arrays, group=group, kind=KINDS[kind])
    again = in_kernel(arrays, config, **options)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        assert a.tobytes() == b.tobytes()


def test_how_rows_are_cut_changes_no_bit():
    arrays = draw(5, 384, jnp.float32, residual=False)
    wanted = in_kernel(arrays)
    for config in (Tiles(2, 2), Tiles(8, 1)):
        found = in_kernel(arrays, config)
        np.testing.assert_array_equal(found[0].codes, wanted[0].codes)
        np.testing.assert_array_equal(found[0].scale, wanted[0].scale)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * bool(SMALL[name].gradients)) for name in SMALL]
)
def test_small_cases_agree_with_the_reference(name, seed):
    one = SMALL[name]
    with compat.interpreted():
        numerics.compare_case(one, "mosaic_gpu", seed, repeat=False).require(one.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rounded", lambda steps, kind, top: jnp.trunc(steps).astype(kind)),
        ("LEAST", 1e3),
        ("_folded", lambda op, ref: ref[...][0]),
    ],
)
def test_a_wrong_kernel_is_noticed(monkeypatch, name, wrong):
    must_fail(monkeypatch, mosaic_kernel, name, wrong, SMALL["small M3 K384"], "mosaic_gpu")


@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this JAX does not see every race")
@pytest.mark.parametrize("config", [Tiles(2, 2, 1), Tiles(3, 1, 4)], ids=str)
def test_the_kernel_has_no_races(config):
    one = case("races", "", 3, 1152, residual=True, small=True)
    with tiles.using("norm_quant", "K1152 bfloat16 few", config):
        interpret.run(one.call("mosaic_gpu"), jax.jit(one.inputs)(jax.random.key(1)), races=True)


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_the_kernel_lowers_and_xla_does_nothing_large_beside_it(one):
    text = lowering.lower_cuda(one.call("mosaic_gpu"), one.avals())
    lowering.require_kernel(text, "mosaic_gpu", "norm_quant")
    assert lowering.outside(text) == lowering.Outside(0, 0, ())


@pytest.mark.parametrize("name", ["8B M16", "e5m2 8B M4096 group128"])
def test_xla_lowers_for_other_devices(name):
    one = next(each for each in CASES if each.name == name)
    for lower in (lowering.lower_cuda, lowering.lower_tpu):
        assert "custom_call" not in lower(one.call("xla"), one.avals())


def test_a_row_of_any_size_fits_the_shared_memory():
    """Of all that the kernel takes."""
    for group in (None, 32, 64, 128):
        for K in range(128, 16385, 128):
            plan = mosaic_kernel.Plan.of(K, group, Tiles())
            assert plan.groups * plan.width == K and 0 <= plan.padded - plan.groups < 1024 // plan.width
            assert plan.shared_bytes(4, 4, 2, 1) <= mosaic_kernel.SHARED_BYTES
            assert plan.rows <= 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 96)), "weight": jnp.ones(96)}, "K = 96 is not a multiple of 128 up to 16384"),
        ({"x": jnp.zeros((1, 16512)), "weight": jnp.ones(16512)}, "K = 16512 is not a multiple of 128"),
        ({"x": jnp.zeros((0, 128))}, "there are no rows"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(changes, message):
    given = {"x": jnp.zeros((2, 128)), "weight": jnp.ones(128)} | changes
    with compat.interpreted(), pytest.raises(ValueError, match=message):
        norm_quant(**given, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros(())}, r"x.shape=\(\): expected at least one dimension"),
        ({"x": jnp.zeros((2, 0)), "weight": jnp.ones(0)}, r"x.shape=\(2, 0\): expected K \(last\)"),
        (
            {"x": jnp.zeros((2, 64), jnp.float16)},
            r"x.dtype='float16': expected one of \('bfloat16', 'float32",
        ),
        ({"weight": jnp.zeros(64, jnp.float16)}, "weight.dtype='float16'"),
        ({"group": 128}, r"x.shape=\(2, 64\): expected K \(last\) a multiple of 128"),
        ({"group": 16}, r"group=16: expected one of \(32, 64, 128\), or None"),
        ({"weight": jnp.ones(32)}, r"weight.shape=\(32,\): expected \(64,\)"),
        ({"residual": jnp.zeros((1, 64))}, r"residual.shape=\(1, 64\): expected \(2, 64\)"),
        ({"residual": jnp.zeros((2, 64), jnp.bfloat16)}, "residual.dtype='bfloat16': expected float32"),
        ({"eps": -1e-6}, "eps=-1e-06: expected a finite number, at least 0"),
        ({"eps": "small"}, "eps='small'"),
        ({"clip": 0.0}, "clip=0.0: expected above 0 and at most 1"),
        ({"clip": 1.5}, "clip=1.5"),
        ({"code_dtype": jnp.int4}, "code_dtype='int4': expected one of"),
        ({"implementation": "triton"}, "implementation='triton'"),
        ({"implementation": "mosaic_gpu"}, "it needs a Hopper GPU, not cpu"),
    ],
)
def test_bad_arguments_are_named(own_checks, changes, message):
    given: dict[str, Any] = {"x": jnp.zeros((2, 64)), "weight": jnp.ones(64)} | changes
    with pytest.raises(ValueError, match=message):
        norm_quant(**given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"rows": 0}, "rows=0"), ({"stages": 3}, "stages=3"), ({"blocks": 5}, "blocks=5: expected 1 to 4")],
)
def test_bad_tiles_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**fields)


def test_a_gradient_through_the_kernel_is_one_kernel_and_xla():
    """What backward needs of the norm XLA computes anew."""
    one = SMALL["small gradients"]
    text = lowering.lower_cuda(one.call("mosaic_gpu"), one.avals())
    assert sum(lowering.MOSAIC in line for line in text.splitlines()) == 1
    assert mosaic_gpu.BESIDE.endswith("gradients")

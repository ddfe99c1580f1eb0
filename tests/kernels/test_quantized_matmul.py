"""Quantised products against every value written out in float64, and products of codes against int64, bit for bit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.proof import numerics
from pallas_kernels.quantized_matmul import QuantizedRows, QuantizedWeight, quantized_matmul, xla
from tests.kernels.kernel_cases import close


def draw(seed, M, N, K, *, group, bits=4, offset=False, dtype=np.float32):
    """x[M, K] and random codes with random scales, nothing of the quantiser involved."""
    rng = np.random.default_rng([seed, M, N, K])
    high = 2 ** (bits - 1)
    codes = rng.integers(-high, high, (N, K))
    packed = codes.astype(np.int8)
    if bits == 4:
        packed = np.zeros((N, K // 2), np.uint8)
        for k in range(K):
            packed[:, k // 2] |= ((codes[:, k] + 8) << (4 * (k % 2))).astype(np.uint8)
    scale = (rng.uniform(0.5, 2, (K // group, N)) / high).astype(dtype)
    shift = rng.normal(size=scale.shape).astype(dtype) if offset else None
    x = rng.normal(size=(M, K)).astype(np.float32)
    packed, scale, shift = (None if v is None else jnp.asarray(v) for v in (packed, scale, shift))
    return x, QuantizedWeight(packed, scale, shift, bits), codes


def exact(w, codes):
    """f64[N, K], value by value."""
    group = codes.shape[1] // w.scale.shape[0]
    out = np.zeros(codes.shape)
    for g in range(w.scale.shape[0]):
        columns = slice(g * group, (g + 1) * group)
        out[:, columns] = codes[:, columns] * np.asarray(w.scale[g], np.float64)[:, None]
        if w.offset is not None:
            out[:, columns] += np.asarray(w.offset[g], np.float64)[:, None]
    return out


def run(x, w, **options):
    """One program, traced anew."""
    return jax.jit(lambda x, w: quantized_matmul(x, w, **options))(x, w)


@pytest.fixture(params=["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def blocks(request, monkeypatch):
    """Blocks of 16 outputs of which the last overlaps the one before; or one block, as small weights always are."""
    if request.param == "blocks":
        monkeypatch.setattr(xla, "_BLOCK_BYTES", 1)


SHAPES = [
    {"M": 1, "N": 40, "K": 128, "group": 128},
    {"M": 7, "N": 37, "K": 192, "group": 64, "offset": True},
    {"M": 9, "N": 16, "K": 96, "group": 32, "dtype": np.float16},
    {"M": 3, "N": 50, "K": 160, "group": 160, "offset": True},
    {"M": 5, "N": 33, "K": 128, "group": 64, "bits": 8},
    {"M": 2, "N": 20, "K": 64, "group": 32, "bits": 8, "offset": True},
]


def shapes(*fast):
    """All of them, those not named with the slow tests."""
    marks = [() if i in fast else (pytest.mark.slow,) for i in range(len(SHAPES))]
    name = "M{M} N{N} K{K} g{group}"
    return [pytest.param(s, id=name.format(**s), marks=m) for s, m in zip(SHAPES, marks, strict=True)]


@pytest.mark.parametrize("shape", shapes(1, 4))
def test_products_are_those_of_the_values_and_so_are_gradients(blocks, shape):
    x, w, codes = draw(0, **shape)
    values = exact(w, codes)
    g = np.random.default_rng(1).normal(size=(shape["M"], shape["N"])).astype(np.float32)
    dw = g.astype(np.float64).T @ x.astype(np.float64)

    def of_groups(v):
        return v.reshape(shape["N"], -1, shape["group"]).sum(axis=2).T

    for implementation in ("xla", "reference"):

        def product(x, scale, offset, implementation=implementation):
            full = dataclasses.replace(w, scale=scale, offset=offset)
            return quantized_matmul(x, full, implementation=implementation)

        y, pull = jax.vjp(jax.jit(product), x, w.scale, w.offset)
        dx, ds, do = pull(jnp.asarray(g))
        close(y, x.astype(np.float64) @ values.T, 2e-6)
        close(dx, g.astype(np.float64) @ values, 2e-6)
        low = 1e-3 if w.scale.dtype == jnp.float16 else 5e-6
        close(ds, of_groups(dw * codes), low)
        if w.offset is not None:
            close(do, of_groups(dw), low)


@given(
    seed=st.integers(0, 2**31),
    M=st.integers(1, 20),
    N=st.integers(1, 70),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 128]),
    offset=st.booleans(),
    bits=st.sampled_from([4, 8]),
)
def test_random_shapes(seed, M, N, groups, group, offset, bits):
    x, w, codes = draw(seed, M, N, groups * group, group=group, bits=bits, offset=offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_BLOCK_BYTES", 1)
        close(run(x, w), x.astype(np.float64) @ exact(w, codes).T, 2e-6)


@pytest.mark.parametrize("offset", [False, True])
def test_every_code_at_either_place_of_a_byte(offset):
    """One input at a time: each output is the value of one code, exactly."""
    low, high = np.meshgrid(np.arange(16), np.arange(16), indexing="ij")
    packed = np.tile((low + 16 * high).reshape(256, 1).astype(np.uint8), (1, 16))
    scale = jnp.asarray(2.0 ** (np.arange(256) % 7 - 3), jnp.float16)[None]
    w = QuantizedWeight(jnp.asarray(packed), scale, jnp.full_like(scale, 0.75) if offset else None)
    for dtype in (jnp.float32, jnp.bfloat16):
        y = np.asarray(run(jnp.eye(32, dtype=dtype), w, out_dtype=jnp.float32))
        for place, nibble in ((0, low), (1, high)):
            wanted = (nibble.reshape(-1) - 8) * np.asarray(scale[0], np.float32) + 0.75 * offset
            np.testing.assert_array_equal(y[place::2], np.tile(wanted, (16, 1)))


def test_every_code_of_eight_bits():
    codes = np.tile(np.arange(-128, 128).astype(np.int8)[:, None], (1, 32))
    w = QuantizedWeight(jnp.asarray(codes), jnp.full((1, 256), 0.5), None, 8)
    y = run(jnp.eye(32), w)
    np.testing.assert_array_equal(y, codes.T * 0.5)


@pytest.mark.parametrize("own_scales", [False, True], ids=["scale a row", "scale a group"])
@pytest.mark.parametrize("shape", shapes(1, 4))
def test_products_of_codes_are_exact(blocks, shape, own_scales):
    """Sums in int64, and the scaling repeated in float32: not one bit differs where one group is all."""
    _, w, codes = draw(2, **shape)
    rng = np.random.default_rng(3)
    M, K, group = (shape[name] for name in ("M", "K", "group"))
    # The extremes too: 128 * 128 in every place.
    rows = rng.integers(-128, 128, (M, K)).astype(np.int8)
    rows[0] = -128
    scale = rng.uniform(0.5, 2, (M, K // group if own_scales else 1)).astype(np.float32)
    y = run(QuantizedRows(jnp.asarray(rows), jnp.asarray(scale)), w)
    assert y.dtype == jnp.float32
    parts = [v.astype(np.int64).reshape(len(v), -1, group) for v in (rows, codes)]
    sums = np.einsum("mgk,ngk->gmn", *parts)
    wide = np.broadcast_to(scale.T, (K // group, M))
    wanted = np.einsum("gmn,gm,gn->mn", sums, wide.astype(np.float64), np.asarray(w.scale, np.float64))
    if w.offset is not None:
        each = parts[0].sum(axis=2).T * wide.astype(np.float64)
        wanted += np.einsum("gm,gn->mn", each, np.asarray(w.offset, np.float64))
    close(y, wanted, 1e-6)
    if group == K and w.offset is None:
        by_hand = sums[0].astype(np.float32) * (scale[:, :1] * np.asarray(w.scale[0], np.float32))
        np.testing.assert_array_equal(y, by_hand)


def test_integer_sums_are_exact_far_past_float32():
    K = 16384
    rng = np.random.default_rng(0)
    # Large and odd: sums in float32 would round on their way, not only at its end.
    rows, codes = (rng.integers(100, 128, (n, K)).astype(np.int8) for n in (8, 16))
    w = QuantizedWeight(jnp.asarray(codes), jnp.ones((1, 16)), None, 8)
    y = run(QuantizedRows(jnp.asarray(rows), jnp.ones((8, 1))), w)
    sums = rows.astype(np.int64) @ codes.astype(np.int64).T
    assert abs(sums).max() > 2**27
    np.testing.assert_array_equal(y, sums.astype(np.float32))


def test_scales_of_quantised_rows_have_gradients():
    _, w, codes = draw(4, 3, 8, 64, group=32)
    rows = np.random.default_rng(0).integers(-127, 128, (3, 64)).astype(np.int8)
    scale = jnp.asarray([[0.5], [1.0], [2.0]])
    found = jax.jit(jax.grad(lambda s: quantized_matmul(QuantizedRows(jnp.asarray(rows), s), w).sum()))(scale)
    close(found[:, 0], (rows.astype(np.float64) @ exact(w, codes).T).sum(axis=1), 1e-6)


def test_bfloat16_rows_round_values_and_cotangents_alike():
    x, w, codes = draw(5, 9, 48, 256, group=128, offset=True)
    values = np.asarray(jnp.asarray(exact(w, codes), jnp.bfloat16), np.float64)
    x = jnp.asarray(x, jnp.bfloat16)
    y, pull = jax.vjp(jax.jit(lambda x: quantized_matmul(x, w)), x)
    assert y.dtype == jnp.bfloat16
    close(y, np.asarray(x, np.float64) @ values.T, 2**-8)
    (dx,) = pull(jnp.ones_like(y))
    assert dx.dtype == jnp.bfloat16
    close(dx, np.ones(y.shape) @ values, 2**-8)
    full = run(x, w, out_dtype=jnp.float32)
    close(full, np.asarray(x, np.float64) @ values.T, 2e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_a_number_stays_where_it_belongs(bits, blocks):
    """A row of x touches its own row only, a scale its own output: nothing is read from padding or neighbours."""
    x, w, _ = draw(6, 5, 37, 64, group=32, bits=bits, offset=True)
    clean = run(x, w)
    x[3] = np.nan
    poisoned = dataclasses.replace(
        w, scale=w.scale.at[1, 4].set(np.nan), offset=w.offset.at[0, 36].set(np.nan)
    )
    y = np.asarray(run(x, poisoned))
    rows, columns = np.delete(np.arange(5), 3), np.delete(np.arange(37), [4, 36])
    assert np.isnan(y[3]).all() and np.isnan(y[:, [4, 36]]).all()
    np.testing.assert_array_equal(y[np.ix_(rows, columns)], np.asarray(clean)[np.ix_(rows, columns)])


def test_a_second_run_has_the_same_bits():
    x, w, _ = draw(7, 6, 70, 256, group=64)
    arrays = {"x": x, "codes": w.codes, "scale": w.scale}

    def op(x, codes, scale, implementation):
        return quantized_matmul(x, QuantizedWeight(codes, scale), implementation=implementation)

    numerics.compare(op, arrays, implementation="xla", gradients=("x", "scale")).require(1e-5)


def test_no_rows_at_all():
    _, w, _ = draw(8, 1, 40, 64, group=32)
    assert run(jnp.zeros((0, 64)), w).shape == (0, 40)
    rows = QuantizedRows(jnp.zeros((0, 64), jnp.int8), jnp.zeros((0, 1)))
    assert run(rows, w).shape == (0, 40)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_never_holds_the_whole_weight(bits):
    """As the compiler tells it: no more arithmetic than the plain product, and a few blocks of memory."""
    M, N, K = 16, 2048, 1024
    _, w, _ = draw(9, M, N, K, group=128, bits=bits)
    x = jnp.zeros((M, K))
    compiled: Any = jax.jit(quantized_matmul).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < N * K * 4 / 2
    plain: Any = jax.jit(lambda x, w: x @ w.T).lower(x, jnp.zeros((N, K))).compile()
    body = compiled.cost_analysis()["flops"] / plain.cost_analysis()["flops"]
    # The loop's body is counted once, the blocks that it runs are eight; values cost little beside the products.
    assert body * (N // xla.block_outputs(w, 4)) < 1.5


def bad(**changes: Any) -> dict[str, Any]:
    x, w, _ = draw(0, 4, 8, 64, group=32, offset=True)
    arguments = {"x": jnp.asarray(x)} | changes
    fields = {name[2:]: arguments.pop(name) for name in list(arguments) if name.startswith("w_")}
    return arguments | {"w": dataclasses.replace(w, **fields)}


def rows(codes=(4, 64), scale=(4, 1), kind=jnp.int8, scale_kind=jnp.float32):
    return QuantizedRows(jnp.zeros(codes, kind), jnp.zeros(scale, scale_kind))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((4, 63))}, r"x.shape=\(4, 63\): expected K \(second\) to be 64"),
        ({"x": jnp.zeros((2, 4, 64))}, "reshape the leading ones"),
        ({"x": jnp.zeros((4, 64), jnp.int8)}, "x.dtype='int8': .* or QuantizedRows"),
        ({"w_bits": 3}, "w.bits=3: expected 4 or 8"),
        ({"w_bits": 8}, "w.codes.dtype='uint8': expected int8 or .* with 8 bits, one code a byte"),
        ({"w_codes": jnp.zeros((8, 32), jnp.int8)}, "w.codes.dtype='int8': expected uint8 .* see pack_codes"),
        ({"w_codes": jnp.zeros(8, jnp.uint8)}, "w.codes.shape"),
        ({"w_scale": jnp.zeros((8, 2))}, r"w.scale.shape=\(8, 2\): .* transpose it if need be"),
        ({"w_scale": jnp.zeros((4, 8))}, "the group one of"),
        ({"w_scale": jnp.zeros((0, 8))}, "the group one of"),
        ({"w_scale": jnp.zeros(8)}, "w.scale.shape=.*two dimensions"),
        ({"w_scale": jnp.zeros((2, 8), jnp.int8)}, "w.scale.dtype='int8'"),
        ({"w_offset": jnp.zeros((1, 8))}, "w.offset.shape"),
        ({"w_offset": jnp.zeros((2, 8), jnp.int8)}, "w.offset.dtype='int8'"),
        ({"operand_dtype": jnp.int8}, "operand_dtype='int8'"),
        ({"out_dtype": jnp.int8}, "out_dtype='int8'"),
        ({"implementation": "cudnn"}, "implementation='cudnn'"),
        ({"operand_dtype": jnp.bfloat16, "implementation": "reference"}, "computes in float32"),
        ({"x": rows(), "operand_dtype": jnp.bfloat16}, "operand_dtype='bfloat16': expected None"),
        ({"x": rows(kind=jnp.uint8)}, "x.codes.dtype='uint8': expected int8 or .*; see quantize_rows"),
        ({"x": rows(scale=(4, 3))}, r"x.scale.shape=\(4, 3\): expected \(4, 1\) or \(4, 2\)"),
        ({"x": rows(scale=(4,))}, r"x.scale.shape=\(4,\): expected two dimensions"),
        ({"x": rows(scale_kind=jnp.float16)}, "x.scale.dtype='float16'"),
    ],
)
def test_bad_arguments_are_named(own_checks, change, message):
    with pytest.raises(ValueError, match=message):
        quantized_matmul(**bad(**change))


def test_sums_that_could_overflow_are_refused():
    K = 2**17
    w = QuantizedWeight(jnp.zeros((1, K), jnp.int8), jnp.ones((1, 1)), None, 8)
    with pytest.raises(ValueError, match="below 131072, for int32 sums are exact no further; use groups"):
        quantized_matmul(rows((1, K), (1, 1)), w)

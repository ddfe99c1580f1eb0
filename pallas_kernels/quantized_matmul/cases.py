"""Cases of the quantised product: small ones for the interpreter, and projections of the presets in decode and prefill."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import Arrays, Case
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.codes import QuantizedRows, QuantizedWeight


def call(*, x: Any, codes: Any, scale: Any, offset: Any = None, bits: int, implementation: str) -> Any:
    """``quantized_matmul`` of named arrays, its result in float32 so that all of its digits are compared."""
    w = QuantizedWeight(codes, scale, offset, bits)
    return quantized_matmul(x, w, out_dtype=jnp.float32, implementation=implementation)


def _inputs(M: int, N: int, K: int, group: int, offset: bool, key: PRNGKeyArray) -> Arrays:
    draw = jax.random.split(key, 4)
    arrays = {
        "x": jax.random.normal(draw[0], (M, K), jnp.bfloat16),
        "codes": jax.random.bits(draw[1], (N, K // 2), jnp.uint8),
        "scale": jax.random.uniform(draw[2], (K // group, N), jnp.float16, 0.01, 0.1),
    }
    if offset:
        arrays["offset"] = jax.random.normal(draw[3], (K // group, N), jnp.float16) * 0.1
    return arrays


def case(
    name: str, stands_for: str, M: int, N: int, K: int, *, group: int = 128, offset: bool = False, **more: Any
) -> Case:
    """W4A16 at one shape."""
    scales = 2 * (1 + offset) * N * K // group
    # Codes are exact and nothing is rounded before the sums.
    more = {"tolerance": 1e-5} | more
    return Case(
        name=name,
        op="quantized_matmul",
        function=call,
        inputs=partial(_inputs, M, N, K, group, offset),
        options={"bits": 4},
        stands_for=stands_for,
        flops=2.0 * M * N * K,
        bytes_moved=N * K / 2 + scales + 2 * M * (N + K),
        **more,
    )


def call_nvfp4(*, x: Any, codes: Any, scale: Any, tensor_scale: Any, implementation: str) -> Any:
    """:func:`call` of NVFP4, its scales given as the bytes that they are."""
    scale = jax.lax.bitcast_convert_type(scale, jnp.float8_e4m3fn)
    w = QuantizedWeight(codes, scale, tensor_scale=tensor_scale)
    return quantized_matmul(x, w, out_dtype=jnp.float32, implementation=implementation)


def _inputs_of_nvfp4(M: int, N: int, K: int, key: PRNGKeyArray) -> Arrays:
    draw = jax.random.split(key, 3)
    # Every byte but the two that are no numbers.
    scale = jax.random.randint(draw[2], (K // 16, N), 0, 254, jnp.uint8)
    return {
        "x": jax.random.normal(draw[0], (M, K), jnp.bfloat16),
        "codes": jax.random.bits(draw[1], (N, K // 2), jnp.uint8),
        "scale": jnp.where(scale >= 127, scale + jnp.uint8(1), scale),
        "tensor_scale": jnp.float32(2e-3),
    }


def case_of_nvfp4(name: str, stands_for: str, M: int, N: int, K: int, **more: Any) -> Case:
    """NVFP4 weights at one shape."""
    # Values are exact.
    more = {"tolerance": 1e-5} | more
    return Case(
        name=name,
        op="quantized_matmul",
        function=call_nvfp4,
        inputs=partial(_inputs_of_nvfp4, M, N, K),
        stands_for=stands_for,
        flops=2.0 * M * N * K,
        bytes_moved=N * K * (1 / 2 + 1 / 16) + 2 * M * (N + K),
        **more,
    )


def call_codes(
    *, x: Any, x_scale: Any, codes: Any, scale: Any, kind: str, out_dtype: str, implementation: str
) -> Any:
    """``quantized_matmul`` of codes of 8 bits, given as the bytes that they are: an oracle takes no float8 for float32."""
    x, codes = (jax.lax.bitcast_convert_type(v, jnp.dtype(kind)) for v in (x, codes))
    rows, w = QuantizedRows(x, x_scale), QuantizedWeight(codes, scale, None, 8)
    return quantized_matmul(rows, w, out_dtype=jnp.dtype(out_dtype), implementation=implementation)


def _codes(kind: str, key: PRNGKeyArray, rows: int, K: int) -> Any:
    """i8[rows, K], the bytes of codes as a quantiser leaves them, about 3 standard deviations within the range."""
    if kind == "int8":
        return jax.random.randint(key, (rows, K), -128, 128, jnp.int8)
    top = float(jnp.finfo(kind).max)
    values = jnp.clip(jax.random.normal(key, (rows, K)) * (top / 3), -top, top)
    return jax.lax.bitcast_convert_type(values.astype(kind), jnp.int8)


def _inputs_of_codes(M: int, N: int, K: int, group: int | None, kind: str, key: PRNGKeyArray) -> Arrays:
    draw = jax.random.split(key, 4)
    groups = 1 if group is None else K // group
    most = 2.0**-7 if kind == "int8" else 1 / float(jnp.finfo(kind).max)
    return {
        "x": _codes(kind, draw[0], M, K),
        "x_scale": jax.random.uniform(draw[1], (M, groups), jnp.float32, 0.5, 2) * most,
        "codes": _codes(kind, draw[2], N, K),
        "scale": jax.random.uniform(draw[3], (groups, N), jnp.bfloat16, 0.5, 2) * jnp.bfloat16(most),
    }


def call_packed(*, x: Any, x_scale: Any, codes: Any, scale: Any, out_dtype: str, implementation: str) -> Any:
    """``quantized_matmul`` of rows of int8 and weights in 4 bits."""
    rows, w = QuantizedRows(x, x_scale), QuantizedWeight(codes, scale)
    return quantized_matmul(rows, w, out_dtype=jnp.dtype(out_dtype), implementation=implementation)


def _inputs_of_packed(M: int, N: int, K: int, row_bits: int, grouped: bool, key: PRNGKeyArray) -> Arrays:
    draw = jax.random.split(key, 4)
    groups, most = K // 128, 1 << (row_bits - 1)
    return {
        "x": jax.random.randint(draw[0], (M, K), -most, most, jnp.int8),
        "x_scale": jax.random.uniform(draw[1], (M, groups if grouped else 1), jnp.float32, 0.5, 2) / most,
        "codes": jax.random.bits(draw[2], (N, K // 2), jnp.uint8),
        "scale": jax.random.uniform(draw[3], (groups, N), jnp.float16, 0.01, 0.1),
    }


def case_of_packed(
    name: str,
    stands_for: str,
    M: int,
    N: int,
    K: int,
    *,
    row_bits: int = 8,
    grouped: bool = True,
    **more: Any,
) -> Case:
    """W4A8, or W4A4 whose rows lie one code to a byte, at one shape; small ones leave in float32."""
    small = bool(more.get("small"))
    groups, width = K // 128, 4 if small else 2
    more = {"tolerance": 1e-6 if small else 4e-3} | more
    return Case(
        name=name,
        op="quantized_matmul",
        function=call_packed,
        inputs=partial(_inputs_of_packed, M, N, K, row_bits, grouped),
        options={"out_dtype": "float32" if small else "bfloat16"},
        stands_for=stands_for,
        flops=2.0 * M * N * K,
        bytes_moved=1.0 * M * K
        + N * K / 2
        + 2 * groups * N
        + 4 * M * (groups if grouped else 1)
        + width * M * N,
        **more,
    )


def case_of_codes(
    name: str,
    stands_for: str,
    M: int,
    N: int,
    K: int,
    *,
    group: int | None = None,
    kind: str = "int8",
    **more: Any,
) -> Case:
    """W8A8 at one shape: a scale a row and output, or for each group of inputs; small ones leave in float32."""
    groups = 1 if group is None else K // group
    width = 4 if more.get("small") else 2
    # Integers are exact, of groups but for the order of float32 sums; preset shapes leave in bfloat16. Of float8 a GPU
    # keeps about 14 bits of the sum of a step, cut off and not rounded; the interpreter keeps those of float32.
    more = {"tolerance": 2e-2 if kind != "int8" else 1e-6 if width == 4 else 4e-3} | more
    return Case(
        name=name,
        op="quantized_matmul",
        function=call_codes,
        inputs=partial(_inputs_of_codes, M, N, K, group, kind),
        options={"kind": kind, "out_dtype": "float32" if width == 4 else "bfloat16"},
        stands_for=stands_for,
        flops=2.0 * M * N * K,
        bytes_moved=1.0 * (M + N) * K + groups * (4 * M + 2 * N) + width * M * N,
        **more,
    )


CASES = [
    case("small M5", "fewer rows than a tile", 5, 128, 512, small=True),
    case("small M40 group64 offset", "asymmetric", 40, 256, 320, group=64, offset=True, small=True),
    case("small M130 group64", "two tiles of rows, the last one padded", 130, 128, 128, group=64, small=True),
    case(
        "small gradients",
        "gradients of a kernel's product",
        *(3, 128, 128),
        group=64,
        offset=True,
        small=True,
        gradients=("x", "scale", "offset"),
        # Of values rounded to bfloat16.
        tolerance=1e-2,
    ),
    case("8B up M16", "nemotron-h-8b, up projection, decode of 16", 16, 21504, 4096),
    case("8B down M256 offset", "nemotron-h-8b, down projection, windows", 256, 4096, 21504, offset=True),
    case(
        "Nano expert M128 group64", "nemotron-3-nano, down projection of experts", 128, 2688, 1856, group=64
    ),
    case_of_nvfp4("small nvfp4 M40", "three steps of four scales", 40, 128, 192, small=True),
    case_of_nvfp4(
        "small nvfp4 gradients",
        "gradients of a kernel's product",
        *(3, 128, 128),
        small=True,
        gradients=("x", "tensor_scale"),
        tolerance=1e-2,
    ),
    case_of_nvfp4("nvfp4 8B up M16", "nemotron-h-8b, up projection, decode of 16", 16, 21504, 4096),
    case_of_nvfp4("nvfp4 Nano expert M128", "nemotron-3-nano, down projection of experts", 128, 2688, 1856),
    case_of_codes("small int8 M137", "ragged second tiles of rows and of columns", 137, 192, 192, small=True),
    case_of_codes("small int8 M5", "few rows: turned, in shares of integers", 5, 192, 192, small=True),
    case_of_codes("small int8 M5 group64", "a scale for each group", 5, 192, 192, group=64, small=True),
    case_of_codes(
        "small int8 gradients",
        "gradients by the scales",
        *(3, 128, 128),
        group=64,
        small=True,
        gradients=("x_scale", "scale"),
        # The scales' own dtype.
        tolerance=4e-3,
    ),
    *(
        case_of_codes(f"int8 {name} M{M}", f"{stands_for}, {phase}", M, N, K)
        for name, stands_for, N, K in (
            ("8B up", "nemotron-h-8b, up projection", 21504, 4096),
            ("Nano shared expert down", "nemotron-3-nano, down projection of the shared expert", 2688, 3712),
            ("Jet up", "jet-nemotron-2b, up projection", 8960, 1536),
        )
        for M, phase in ((16, "decode of 16"), (4096, "prefill"))
    ),
    case_of_codes("int8 8B up M16 group128", "nemotron-h-8b, decode, groups", 16, 21504, 4096, group=128),
    case_of_codes(
        "int8 8B up M4096 group128", "nemotron-h-8b, prefill, groups", 4096, 21504, 4096, group=128
    ),
    case_of_codes("small e4m3 M5 group64", "float8", 5, 192, 192, group=64, kind="float8_e4m3fn", small=True),
    case_of_codes("small e5m2 M137", "float8, many rows", 137, 192, 192, kind="float8_e5m2", small=True),
    *(
        case_of_codes(
            f"{name} 8B up M{M}", f"nemotron-h-8b, up projection, {phase}", M, 21504, 4096, kind=kind
        )
        for name, kind in (("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2"))
        for M, phase in ((16, "decode of 16"), (4096, "prefill"))
    ),
    case_of_packed("small W4A8 M5", "few rows, a scale a row", 5, 128, 384, grouped=False, small=True),
    case_of_packed("small W4A4 M40", "a scale for each group", 40, 128, 256, row_bits=4, small=True),
    case_of_packed(
        "small W4A8 gradients",
        "gradients by the scales",
        *(3, 128, 256),
        small=True,
        gradients=("x_scale", "scale"),
        # The scales' own dtype.
        tolerance=4e-3,
    ),
    *(
        case_of_packed(
            f"{name} {where} M{M}", f"{stands_for}, {phase}", M, N, K, row_bits=bits, grouped=grouped
        )
        for name, bits, grouped in (("W4A8", 8, False), ("W4A4", 4, True))
        for where, stands_for, N, K in (
            ("8B up", "nemotron-h-8b, up projection", 21504, 4096),
            ("8B down", "nemotron-h-8b, down projection", 4096, 21504),
        )
        for M, phase in ((16, "decode of 16"), (4096, "prefill"))
    ),
    case_of_packed(
        "W4A8 Nano expert M128",
        "nemotron-3-nano, down projection of the shared expert, rows of one",
        *(128, 2688, 3712),
    ),
]

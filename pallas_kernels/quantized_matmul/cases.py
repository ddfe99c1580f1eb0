"""Cases of the quantised product: small ones for the interpreter, and projections of the presets in decode and prefill."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import Arrays, Case
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.codes import QuantizedWeight


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
]

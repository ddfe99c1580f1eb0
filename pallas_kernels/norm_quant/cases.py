"""Cases of RMSNorm and rounding: small ones for the interpreter, and the widths of the presets in decode and prefill."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import Arrays, Case
from pallas_kernels.norm_quant.api import norm_quant

# One code is so much of the largest one, and a little for the rest: a value near a tie may go either way.
_ONE_CODE = {"int8": 1.01 / 127, "float8_e4m3fn": 1.01 * 32 / 448, "float8_e5m2": 1.01 * 8192 / 57344}


def call(*, code_dtype: str, **arrays: Any) -> Any:
    """``norm_quant`` of named arrays: codes, scales and the new residual."""
    return norm_quant(**arrays, code_dtype=jnp.dtype(code_dtype))


def call_and_measure(*, x: Any, weight: Any, residual: Any = None, code_dtype: str, **options: Any) -> Any:
    """How far codes lie from what they stand for, the farthest of each row, with scales and the new residual.

    In halves of a step of int8, and of float8 relative to the value (to that of the least normal number below it): so
    rounding the other way at a tie is no difference, and rounding any other way is a large one.
    """
    kind = jnp.dtype(code_dtype)
    rows, total = norm_quant(x, weight, residual=residual, code_dtype=kind, **options)
    u = (x if residual is None else x + residual).astype(jnp.float32)
    y = u * jax.lax.rsqrt(jnp.mean(u * u, axis=1, keepdims=True) + 1e-5) * weight.astype(jnp.float32)
    steps = y / jnp.repeat(rows.scale, x.shape[1] // rows.scale.shape[1], axis=1)
    least = 0.5 if kind == jnp.int8 else float(jnp.finfo(kind).smallest_normal)
    size = least if kind == jnp.int8 else jnp.maximum(jnp.abs(steps), least)
    farthest = jnp.max(jnp.abs(rows.codes.astype(jnp.float32) - steps) / size, axis=1)
    return farthest, rows.scale, total


def _inputs(M: int, K: int, residual: bool, dtype: DTypeLike, key: PRNGKeyArray) -> Arrays:
    """Rows of 32nds, whose sums bfloat16 holds exactly: the oracle, in float32, rounds none of them either."""
    draw = jax.random.split(key, 3)

    def some(key: PRNGKeyArray) -> Any:
        return (jnp.round(jnp.clip(jax.random.normal(key, (M, K)), -1.97, 1.97) * 32) / 32).astype(dtype)

    arrays = {
        "x": some(draw[0]),
        "weight": (1 + 0.2 * jax.random.normal(draw[1], (K,))).astype(dtype),
    }
    return arrays | ({"residual": some(draw[2])} if residual else {})


def case(
    name: str,
    stands_for: str,
    M: int,
    K: int,
    *,
    residual: bool = False,
    group: int | None = None,
    kind: str = "int8",
    dtype: DTypeLike = jnp.bfloat16,
    **more: Any,
) -> Case:
    """A case of M rows; the bytes are those of x and codes, of a residual in and out, of the weight and the scales."""
    small = bool(more.get("small"))
    size = jnp.dtype(dtype).itemsize
    more = {"tolerance": 2e-3 if small else _ONE_CODE[kind]} | more
    return Case(
        name=name,
        op="norm_quant",
        function=call_and_measure if small else call,
        inputs=partial(_inputs, M, K, residual, dtype),
        options={"group": group, "code_dtype": kind},
        stands_for=stands_for,
        oracle="reference" if small else "xla",
        flops=8.0 * M * K,
        bytes_moved=float(
            M * (K * (1 + size * (3 if residual else 1)) + 4 * (1 if group is None else K // group))
            + size * K
        ),
        registers=144,
        **more,
    )


CASES = [
    case("small M3 K384", "a row that ends within a block", 3, 384, small=True),
    case(
        "small e4m3 residual group64",
        "groups, and a new residual",
        *(2, 1152),
        residual=True,
        group=64,
        kind="float8_e4m3fn",
        small=True,
    ),
    case("small e5m2 group32", "many groups", 2, 256, group=32, kind="float8_e5m2", small=True),
    case(
        "small gradients",
        "gradients by the scales and the new residual",
        *(3, 256),
        residual=True,
        group=128,
        dtype=jnp.float32,
        small=True,
        gradients=("x", "weight", "residual"),
    ),
    *(
        case(f"{name} M{M}", f"{stands_for}, {phase}", M, K, residual=True)
        for name, stands_for, K in (
            ("8B", "nemotron-h-8b", 4096),
            ("Nano", "nemotron-3-nano", 2688),
            ("Jet", "jet-nemotron-2b", 1536),
        )
        for M, phase in ((16, "decode of 16"), (4096, "prefill"))
    ),
    case("8B M4096 without residual", "nemotron-h-8b, the first layer, prefill", 4096, 4096),
    case("8B M4096 group128", "nemotron-h-8b, prefill, groups", 4096, 4096, residual=True, group=128),
    case("Nano M16 group64", "nemotron-3-nano, decode, groups", 16, 2688, residual=True, group=64),
    *(
        case(
            f"{name} 8B M{M} group128",
            f"nemotron-h-8b, {phase}",
            M,
            4096,
            residual=True,
            group=128,
            kind=kind,
        )
        for name, kind in (("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2"))
        for M, phase in ((16, "decode of 16"), (4096, "prefill"))
    ),
    case("K16384", "the widest rows, one scale for each", 64, 16384, residual=True),
    case("K16384 float32 group32", "the widest rows", 64, 16384, residual=True, group=32, dtype=jnp.float32),
]

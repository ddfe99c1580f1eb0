"""Cases of the gated delta rule: small ones for the interpreter, and the shapes of the presets."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels.attention.cases import packed
from pallas_kernels.cases import Arrays, Case
from pallas_kernels.gated_delta.api import gated_delta

TOKENWISE = ("q", "k", "v", "g", "beta")
ALL = (*TOKENWISE, "initial_state")
CHUNK = 64
# Keys of 256 channels: half of the registers hold the state.
WIDE_SPILL = 900
# Backward, SSD's kernels beside sums over 128 keys, and a cotangent of 256 keys.
SOME_SPILL, WIDE_BACKWARD_SPILL = 150, 1300


def unit(x):
    """``x`` at Euclidean length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def _inputs(
    B: int,
    T: int,
    H: int,
    Hv: int,
    dk: int,
    dv: int,
    documents: tuple[int, ...] | None,
    states: int | None,
    key: PRNGKeyArray,
) -> Arrays:
    draw = jax.random.split(key, 6)
    q, k = (unit(jax.random.normal(d, (B, T, H, dk))) for d in draw[:2])
    arrays = {
        "q": (q * dk**-0.5).astype(jnp.bfloat16),
        "k": k.astype(jnp.bfloat16),
        "v": jax.random.normal(draw[2], (B, T, Hv, dv), jnp.bfloat16),
        "g": -jax.nn.softplus(jax.random.normal(draw[3], (B, T, Hv)) - 3),
        "beta": jax.nn.sigmoid(jax.random.normal(draw[4], (B, T, Hv))),
    }
    if states is not None:
        arrays["initial_state"] = jax.random.normal(draw[5], (B, states, Hv, dk, dv))
    if documents is not None:
        arrays["segment_ids"] = packed(B, T, documents)[0]
    return arrays


def _padding(arrays: Arrays) -> Arrays:
    if "segment_ids" not in arrays:
        return {}
    dead = arrays["segment_ids"] == 0
    return {name: dead.reshape(*dead.shape, *[1] * (arrays[name].ndim - 2)) for name in TOKENWISE}


def _unspecified(arrays: Arrays) -> Any:
    """o means nothing on padding."""
    some = [jnp.zeros((), bool)]
    if "segment_ids" in arrays:
        some[0] = (arrays["segment_ids"] == 0)[..., None, None]
    if "initial_state" in arrays:
        some.append(jnp.zeros((), bool))
    return some


def case(
    name: str,
    B: int,
    T: int,
    H: int,
    Hv: int,
    dk: int,
    dv: int,
    documents: tuple[int, ...] | None = None,
    *,
    states: int | None = None,
    gradients: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Case:
    """A case of packed rows, with ``states`` initial states a row; FLOPs count the pairs of a chunk that are not late."""
    forward = 2.0 * B * T * Hv * (CHUNK * dk + 1.5 * CHUNK * dv + 3 * dk * dv)
    return Case(
        name=name,
        op="gated_delta",
        function=gated_delta,
        inputs=partial(_inputs, B, T, H, Hv, dk, dv, documents, states),
        options={"operand_dtype": jnp.bfloat16, "chunk_size": CHUNK, **(options or {})},
        gradients=gradients,
        padding=_padding,
        unspecified=_unspecified,
        oracle_options={"operand_dtype": None},
        flops=forward * (3.5 if gradients else 1),
        bytes_moved=4.0 * B * T * (H * dk + Hv * dv) * (3 if gradients else 1),
        **more,
    )


CASES = [
    case("tiny documents", 1, 140, 1, 2, 64, 64, (3, 70, 1, 60), states=5, small=True),
    case("tiny open", 1, 130, 1, 1, 96, 128, (60, 57), states=1, options={"open_ends": True}, small=True),
    case("Jet 2B packed 8k", 1, 8192, 12, 12, 96, 256, (4096, 1024, 2048, 512, 500), oracle="xla"),
    case("Jet 4B train 4k", 2, 4096, 16, 16, 128, 256, oracle="xla"),
    case("Jet 4B prefill 8k", 1, 8192, 16, 16, 128, 256, (5000, 3000), states=2, oracle="xla"),
    case("wide keys 4k", 1, 4096, 4, 8, 256, 128, oracle="xla", spill_bytes=WIDE_SPILL),
    case(
        "tiny documents backward", 1, 140, 1, 2, 64, 64, (3, 70, 1, 60), states=5, gradients=ALL, small=True
    ),
    case(
        "Jet 2B backward 4k", 1, 4096, 12, 12, 96, 256, (2048, 500, 1500), gradients=TOKENWISE, oracle="xla"
    ),
    case(
        "Jet 4B backward 4k",
        2,
        4096,
        16,
        16,
        128,
        256,
        gradients=TOKENWISE,
        oracle="xla",
        spill_bytes=SOME_SPILL,
    ),
    case(
        "wide keys backward 4k",
        1,
        4096,
        4,
        8,
        256,
        128,
        gradients=TOKENWISE,
        oracle="xla",
        spill_bytes=WIDE_BACKWARD_SPILL,
    ),
]

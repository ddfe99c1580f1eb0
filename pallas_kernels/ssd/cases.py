"""Cases of SSD: small ones for the interpreter, and the shapes of the presets."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels.attention.cases import packed
from pallas_kernels.cases import Arrays, Case
from pallas_kernels.ssd.api import ssd

TOKENWISE = ("x", "dt", "B", "C")
GRADIENTS = (*TOKENWISE, "A", "D", "initial_state")
# The gradients of x and B: two sums and three tiles of 64 pairs do not quite fit the registers of a warpgroup.
SPILL = 160


def _inputs(
    B: int,
    T: int,
    H: int,
    G: int,
    P: int,
    N: int,
    documents: tuple[int, ...] | None,
    states: int | None,
    key: PRNGKeyArray,
) -> Arrays:
    draw = jax.random.split(key, 7)
    arrays = {
        "x": jax.random.normal(draw[0], (B, T, H, P), jnp.bfloat16),
        "dt": jax.nn.softplus(jax.random.normal(draw[1], (B, T, H)) - 2),
        "A": -jnp.exp(jax.random.normal(draw[2], (H,))),
        "B": jax.random.normal(draw[3], (B, T, G, N), jnp.bfloat16),
        "C": jax.random.normal(draw[4], (B, T, G, N), jnp.bfloat16) * N**-0.5,
        "D": jax.random.normal(draw[5], (H,)),
    }
    if states is not None:
        arrays["initial_state"] = jax.random.normal(draw[6], (B, states, H, P, N))
    if documents is not None:
        arrays["segment_ids"] = packed(B, T, documents)[0]
    return arrays


def _padding(arrays: Arrays) -> Arrays:
    if "segment_ids" not in arrays:
        return {}
    dead = arrays["segment_ids"] == 0
    return {name: dead.reshape(*dead.shape, *[1] * (arrays[name].ndim - 2)) for name in TOKENWISE}


def _unspecified(arrays: Arrays) -> Any:
    """y means nothing on padding."""
    some = {"y": jnp.zeros((), bool)}
    if "segment_ids" in arrays:
        some["y"] = (arrays["segment_ids"] == 0)[..., None, None]
    if "initial_state" in arrays:
        some["z"] = jnp.zeros((), bool)
    return list(some.values())


def case(
    name: str,
    B: int,
    T: int,
    H: int,
    G: int,
    P: int,
    N: int,
    documents: tuple[int, ...] | None = None,
    *,
    states: int | None = None,
    gradients: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Case:
    """A case of packed rows, with ``states`` initial states a row; FLOPs count the pairs of a chunk that are not late."""
    own = {"operand_dtype": jnp.bfloat16, "chunk_size": 128, **(options or {})}
    Q = own["chunk_size"]
    forward = 2.0 * B * T * H * (Q / 2 * (N + P) + 2 * P * N)
    moved = 2.0 * B * T * (2 * H * P + 2 * G * N)
    return Case(
        name=name,
        op="ssd",
        function=ssd,
        inputs=partial(_inputs, B, T, H, G, P, N, documents, states),
        options=own,
        gradients=gradients,
        padding=_padding,
        unspecified=_unspecified,
        oracle_options={"operand_dtype": None},
        flops=forward * (3.5 if gradients else 1),
        bytes_moved=moved * (3 if gradients else 1),
        spill_bytes=SPILL if gradients else 0,
        **more,
    )


CASES = [
    case("tiny documents", 1, 140, 2, 1, 64, 64, (3, 70, 1, 60), states=5, gradients=GRADIENTS, small=True),
    case(
        "tiny open",
        2,
        130,
        2,
        2,
        64,
        128,
        (60, 57),
        states=1,
        gradients=GRADIENTS,
        options={"open_ends": True},
        small=True,
    ),
    case(
        "Nano packed 8k",
        1,
        8192,
        64,
        8,
        64,
        128,
        (4096, 1024, 2048, 512, 500),
        gradients=GRADIENTS[:-1],
        oracle="xla",
    ),
    case("8B train 4k", 2, 4096, 128, 8, 64, 128, gradients=GRADIENTS[:-1], oracle="xla"),
]

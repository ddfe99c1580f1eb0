"""Cases of the decode step: the widths of presets; small ones are made by the tests."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import Arrays, Case, unread_by_step
from pallas_kernels.ssd.step.api import ssd_step


def _inputs(rows: int, S: int, H: int, G: int, P: int, N: int, dtype: DTypeLike, key: PRNGKeyArray) -> Arrays:
    """Slots of a random order; the last row is idle, and the first begins its document."""
    draw = jax.random.split(key, 8)
    normal = jax.random.normal
    slots = jax.random.permutation(draw[0], S)[:rows].at[rows - 1].set(-1)
    return {
        "x": normal(draw[1], (rows, H, P), dtype),
        "dt": jax.nn.softplus(normal(draw[2], (rows, H)) - 2),
        "A": -jnp.exp(normal(draw[3], (H,))),
        "B": normal(draw[4], (rows, G, N), dtype),
        "C": normal(draw[5], (rows, G, N), dtype) * N**-0.5,
        "D": normal(draw[6], (H,)),
        "pool": normal(draw[7], (S, H, P, N)),
        "slots": slots.astype(jnp.int32),
        "fresh": jnp.arange(rows) == 0,
    }


def case(
    name: str,
    rows: int,
    S: int,
    H: int,
    G: int,
    P: int,
    N: int,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    **more: Any,
) -> Case:
    """A case of ``rows`` rows in S slots; the bytes are those of the states, in and out, and of the rows."""
    size = jnp.dtype(dtype).itemsize
    return Case(
        name=name,
        op="ssd.step",
        function=ssd_step,
        inputs=partial(_inputs, rows, S, H, G, P, N, dtype),
        padding=partial(unread_by_step, ("x", "dt", "B", "C")),
        flops=5.0 * rows * H * P * N,
        bytes_moved=float(rows * (8 * H * P * N + 2 * size * (H * P + G * N))),
        registers=128 if N <= 128 else 200,
        **more,
    )


CASES = [
    case("8B decode 64", 64, 128, 128, 8, 64, 128, oracle="xla", stands_for="Nemotron-H 8B, decode"),
    case("Nano decode 128", 128, 256, 64, 8, 64, 128, oracle="xla", stands_for="Nemotron 3 Nano, decode"),
    case("N256 decode 64", 64, 64, 24, 1, 128, 256, oracle="xla", stands_for="the widest states"),
]

"""Cases of the decode step: the widths of presets; small ones are made by the tests."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import Arrays, Case, unread_by_step
from pallas_kernels.gated_delta.cases import unit
from pallas_kernels.gated_delta.step.api import gated_delta_step


def _inputs(
    rows: int, S: int, H: int, Hv: int, dk: int, dv: int, dtype: DTypeLike, key: PRNGKeyArray
) -> Arrays:
    """Slots of a random order; the last row is idle, and the first begins its document."""
    draw = jax.random.split(key, 7)
    normal = jax.random.normal
    slots = jax.random.permutation(draw[0], S)[:rows].at[rows - 1].set(-1)
    return {
        "q": unit(normal(draw[1], (rows, H, dk))) * dk**-0.5,
        "k": unit(normal(draw[2], (rows, H, dk))),
        "v": normal(draw[3], (rows, Hv, dv), dtype),
        "g": -jax.nn.softplus(normal(draw[4], (rows, Hv)) - 2),
        "beta": 2 * jax.nn.sigmoid(normal(draw[5], (rows, Hv))),
        "pool": normal(draw[6], (S, Hv, dk, dv)),
        "slots": slots.astype(jnp.int32),
        "fresh": jnp.arange(rows) == 0,
    }


def case(
    name: str,
    rows: int,
    S: int,
    H: int,
    Hv: int,
    dk: int,
    dv: int,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    **more: Any,
) -> Case:
    """A case of ``rows`` rows in S slots, values in ``dtype``, queries and keys in float32, as mixers make them."""
    size = jnp.dtype(dtype).itemsize
    return Case(
        name=name,
        op="gated_delta.step",
        function=gated_delta_step,
        inputs=partial(_inputs, rows, S, H, Hv, dk, dv, dtype),
        padding=partial(unread_by_step, ("q", "k", "v", "g", "beta")),
        flops=7.0 * rows * Hv * dk * dv,
        registers=128 if dk <= 128 else 232,
        bytes_moved=float(rows * (8 * Hv * dk * dv + 2 * size * Hv * dv + 8 * H * dk)),
        **more,
    )


CASES = [
    case("Jet 2B decode 64", 64, 128, 12, 12, 96, 256, oracle="xla", stands_for="Jet-Nemotron 2B, decode"),
    case("Jet 4B decode 128", 128, 256, 16, 16, 128, 256, oracle="xla", stands_for="Jet-Nemotron 4B, decode"),
    case("dk256 decode 64", 64, 64, 4, 8, 256, 128, oracle="xla", stands_for="the widest keys"),
]

"""Cases of the decode step: the width of a preset; small ones are made by the tests."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import Arrays, Case
from pallas_kernels.causal_conv.step.api import causal_conv_step


def _inputs(B: int, S: int, D: int, k: int, dtype: DTypeLike, key: PRNGKeyArray) -> Arrays:
    """Slots of a random order; the last row is idle."""
    draw = jax.random.split(key, 5)
    slots = jax.random.permutation(draw[0], S)[:B].at[B - 1].set(-1)
    shapes = {"x": (B, D), "weight": (k, D), "bias": (D,), "pool": (S, k - 1, D)}
    arrays = {
        name: jax.random.normal(one, shape, dtype) for one, (name, shape) in zip(draw[1:], shapes.items())
    }
    return {**arrays, "slots": slots.astype(jnp.int32)}


def _padding(arrays: Arrays) -> Arrays:
    return {"x": (arrays["slots"] < 0)[:, None]}


def case(
    name: str, B: int, S: int, D: int, *, k: int = 4, dtype: DTypeLike = jnp.bfloat16, **more: Any
) -> Case:
    """A case of B rows in S slots; the bytes are those of the windows, in and out, and of the rows."""
    return Case(
        name=name,
        op="causal_conv.step",
        function=causal_conv_step,
        inputs=partial(_inputs, B, S, D, k, dtype),
        padding=_padding,
        flops=2.0 * k * B * D,
        bytes_moved=float(2 * k * B * D * jnp.dtype(dtype).itemsize),
        registers=64,
        **more,
    )


CASES = [case("8B decode 128", 128, 256, 10240, oracle="xla", stands_for="Nemotron-H 8B, decode")]

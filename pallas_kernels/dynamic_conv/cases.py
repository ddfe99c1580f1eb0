"""Cases of the convolution with a kernel per token: JetBlock's width; small ones are made by the tests."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import Arrays, Case
from pallas_kernels.causal_conv.cases import ids_and_state, padded, unspecified
from pallas_kernels.dynamic_conv.api import dynamic_conv

GRADIENTS = ("x", "kernels", "initial_state")


def _inputs(
    B: int, T: int, D: int, k: int, documents: tuple[int, ...] | None, dtype: DTypeLike, key: PRNGKeyArray
) -> Arrays:
    one, other = jax.random.split(key)
    kernels = jax.random.normal(one, (B, T, k, D), dtype)
    return {"kernels": kernels, **ids_and_state(B, T, D, k, documents, dtype, other)}


def _padding(arrays: Arrays) -> Arrays:
    at = padded(arrays)[..., None]
    return {"x": at, "kernels": at[..., None]}


def case(
    name: str,
    B: int,
    T: int,
    D: int,
    documents: tuple[int, ...] | None,
    *,
    k: int = 4,
    dtype: DTypeLike = jnp.bfloat16,
    gradients: tuple[str, ...] = (),
    **more: Any,
) -> Case:
    """A case of packed rows; beside the bytes of the static convolution k for each read of a kernel, k for its gradient."""
    size = jnp.dtype(dtype).itemsize * B * T * D
    return Case(
        name=name,
        op="dynamic_conv",
        function=dynamic_conv,
        inputs=partial(_inputs, B, T, D, k, documents, dtype),
        gradients=gradients,
        padding=_padding,
        unspecified=unspecified,
        flops=2.0 * k * B * T * D * (4 if gradients else 1),
        bytes_moved=float(size * (5 + 3 * k if gradients else 2 + k)),
        registers=96,
        **more,
    )


CASES = [
    case(
        "Jet 2B packed 4k",
        2,
        4096,
        3072,
        (2048, 3, 1024, 1, 1000),
        gradients=GRADIENTS,
        oracle="xla",
        stands_for="Jet-Nemotron 2B, training on packed documents",
    ),
]

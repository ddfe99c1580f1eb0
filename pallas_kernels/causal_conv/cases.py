"""Cases of the causal convolution: the widths of the presets; small ones are made by the tests."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from pallas_kernels.attention.cases import packed
from pallas_kernels.cases import Arrays, Case
from pallas_kernels.causal_conv.api import causal_conv

GRADIENTS = ("x", "weight", "bias", "initial_state")


def ids_and_state(
    B: int, T: int, D: int, k: int, documents: tuple[int, ...] | None, dtype: DTypeLike, key: PRNGKeyArray
) -> Arrays:
    """Inputs, documents of these lengths (None: no ids) and what stands before each of them."""
    draw = jax.random.split(key)
    n = len(documents or (T,))
    arrays: Arrays = {
        "x": jax.random.normal(draw[0], (B, T, D), dtype),
        "initial_state": jax.random.normal(draw[1], (B, n, k - 1, D), dtype),
    }
    if documents is not None:
        arrays["segment_ids"] = packed(B, T, documents)[0]
    return arrays


def _inputs(
    B: int, T: int, D: int, k: int, documents: tuple[int, ...] | None, dtype: DTypeLike, key: PRNGKeyArray
) -> Arrays:
    one, two, three = jax.random.split(key, 3)
    weight, bias = jax.random.normal(one, (k, D), dtype), jax.random.normal(two, (D,), dtype)
    return {"weight": weight, "bias": bias, **ids_and_state(B, T, D, k, documents, dtype, three)}


def padded(arrays: Arrays) -> Array:
    """bool[B, T]: padding."""
    x, ids = arrays["x"], arrays.get("segment_ids")
    return jnp.zeros(x.shape[:2], bool) if ids is None else ids == 0


def _padding(arrays: Arrays) -> Arrays:
    return {"x": padded(arrays)[..., None]}


def unspecified(arrays: Arrays) -> tuple[Array, Array]:
    """Outputs of padding mean nothing."""
    return padded(arrays)[..., None], jnp.zeros((1, 1, 1, 1), bool)


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
    """A case of packed rows; the bytes are those of the tokens: forward reads and writes one number, backward two and one."""
    size = jnp.dtype(dtype).itemsize * B * T * D
    return Case(
        name=name,
        op="causal_conv",
        function=causal_conv,
        inputs=partial(_inputs, B, T, D, k, documents, dtype),
        gradients=gradients,
        padding=_padding,
        unspecified=unspecified,
        flops=2.0 * k * B * T * D * (4 if gradients else 1),
        bytes_moved=float(size * (5 if gradients else 2)),
        registers=96,
        **more,
    )


CASES = [
    case(
        "Nano packed 8k",
        1,
        8192,
        6144,
        (4096, 1024, 2, 2048, 1, 512, 500),
        gradients=GRADIENTS,
        oracle="xla",
        stands_for="Nemotron 3 Nano, training on packed documents",
    ),
    case("8B chunk 2k", 4, 2048, 10240, None, oracle="xla", stands_for="Nemotron-H 8B, a chunk of prefill"),
]

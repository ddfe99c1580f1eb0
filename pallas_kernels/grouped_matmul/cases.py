"""Cases of the grouped product: small ones for the interpreter, and the experts of the presets in decode and training."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import Arrays, Case
from pallas_kernels.grouped_matmul.api import grouped_matmul


def call(*, x: Any, w: Any, sizes: Any, implementation: str) -> Any:
    """``grouped_matmul`` of named arrays."""
    return grouped_matmul(x, w, sizes, implementation=implementation)


def _inputs(
    M: int, K: int, N: int, E: int, sizes: tuple[int, ...] | None, masters: bool, key: PRNGKeyArray
) -> Arrays:
    draw = jax.random.split(key, 4)
    if sizes is None:
        # Popularity falls with the rank of an expert, as it does in trained routers.
        rank = jnp.arange(1, E + 1, dtype=jnp.float32)
        ids = jax.random.categorical(
            draw[2], jax.random.permutation(draw[3], -0.5 * jnp.log(rank)), shape=(M,)
        )
        sizes_of = jnp.bincount(ids, length=E).astype(jnp.int32)
    else:
        sizes_of = jnp.asarray(sizes, jnp.int32)
    w = (jax.random.normal(draw[1], (E, K, N)) * K**-0.5).astype(jnp.bfloat16)
    return {
        "x": jax.random.normal(draw[0], (M, K), jnp.bfloat16),
        "w": w.astype(jnp.float32) if masters else w,
        "sizes": sizes_of,
    }


def _tail(arrays: Arrays) -> Arrays:
    """The rows of no expert."""
    x = arrays["x"]
    return {"x": jnp.broadcast_to((jnp.arange(len(x)) >= jnp.sum(arrays["sizes"]))[:, None], x.shape)}


def case(
    name: str,
    stands_for: str,
    M: int,
    K: int,
    N: int,
    E: int,
    *,
    sizes: tuple[int, ...] | None = None,
    masters: bool = False,
    gradients: tuple[str, ...] = (),
    **more: Any,
) -> Case:
    """Rows in bfloat16, and weights unless they are ``masters`` in float32; rows by expert as given, or drawn."""
    times = 3 if gradients else 1
    busy = min(M, E)
    return Case(
        name=name,
        op="grouped_matmul",
        function=call,
        inputs=partial(_inputs, M, K, N, E, sizes, masters),
        gradients=gradients,
        stands_for=stands_for,
        oracle="reference" if "small" in more else "xla",
        padding=_tail if "small" in more else None,
        # Of results rounded to bfloat16.
        tolerance=1e-2,
        flops=2.0 * M * K * N * times,
        bytes_moved=2.0 * times * (M * (K + N) + busy * K * N),
        **more,
    )


BOTH = ("x", "w")
CASES = [
    case(
        "small borders",
        "experts that meet within tiles, one over three of them, one without rows, rows of nobody",
        *(200, 64, 192, 5),
        sizes=(3, 130, 0, 1, 40),
        masters=True,
        gradients=BOTH,
        small=True,
    ),
    case(
        "small decode", "fewer rows than a tile", 6, 128, 64, 9, sizes=(0, 3, 0, 0, 1, 0, 0, 2, 0), small=True
    ),
    case("Nano up decode 16", "nemotron-3-nano, 16 tokens, top 6 of 128", 96, 2688, 1856, 128),
    case("Nano up 8k", "nemotron-3-nano, training of 8192 tokens", 49152, 2688, 1856, 128, gradients=BOTH),
    case("Nano down 8k", "nemotron-3-nano, training of 8192 tokens", 49152, 1856, 2688, 128, gradients=BOTH),
    case("Super latent decode 64", "nemotron-3-super, 64 tokens, top 22 of 512", 1408, 1024, 2688, 512),
    case("8B-like 8 experts 4k", "eight experts of 4096 inputs, top 2", 8192, 4096, 14336, 8, gradients=BOTH),
]

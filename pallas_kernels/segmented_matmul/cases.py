"""Cases of many adapters: small ones for the interpreter, and linear layers of the presets in decode and training."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import Arrays, Case
from pallas_kernels.segmented_matmul.api import segmented_matmul


def call(*, x: Any, a: Any, b: Any, scaling: Any, slots: Any, implementation: str) -> Any:
    """``segmented_matmul`` of named arrays."""
    return segmented_matmul(x, a, b, scaling, slots, implementation=implementation)


def _inputs(
    M: int, K: int, N: int, rank: int, S: int, slots: tuple[int, ...] | None, key: PRNGKeyArray
) -> Arrays:
    draw = jax.random.split(key, 5)
    drawn = jax.random.randint(draw[3], (M,), 1, S) if slots is None else jnp.asarray(slots, jnp.int32)
    return {
        "x": jax.random.normal(draw[0], (M, K), jnp.bfloat16),
        "a": (jax.random.normal(draw[1], (S, K, rank)) * K**-0.5).astype(jnp.bfloat16),
        "b": (jax.random.normal(draw[2], (S, rank, N)) * rank**-0.5).astype(jnp.bfloat16),
        "scaling": jnp.exp(jax.random.normal(draw[4], (S,))),
        "slots": drawn,
    }


def _unread(arrays: Arrays) -> Arrays:
    """Rows of no adapter; slot 0 and slots without rows."""
    slots = arrays["slots"]
    idle = jnp.ones(len(arrays["scaling"]), bool).at[slots].set(False).at[0].set(True)
    found = {"x": slots == 0, "a": idle, "b": idle, "scaling": idle}
    return {
        name: jnp.broadcast_to(who.reshape(-1, *[1] * (arrays[name].ndim - 1)), arrays[name].shape)
        for name, who in found.items()
    }


def case(
    name: str,
    stands_for: str,
    M: int,
    K: int,
    N: int,
    rank: int,
    S: int = 33,
    *,
    slots: tuple[int, ...] | None = None,
    gradients: tuple[str, ...] = (),
    **more: Any,
) -> Case:
    """Rows and factors in bfloat16; slots as given, or drawn evenly from those of adapters."""
    # Backward multiplies twice as often as forward.
    times = 3 if gradients else 1
    busy = min(M, S - 1)
    return Case(
        name=name,
        op="segmented_matmul",
        function=call,
        inputs=partial(_inputs, M, K, N, rank, S, slots),
        gradients=gradients,
        stands_for=stands_for,
        oracle="reference" if "small" in more else "xla",
        padding=_unread if "small" in more else None,
        # Of results rounded to bfloat16.
        tolerance=1e-2,
        flops=2.0 * M * (K + N) * rank * times,
        bytes_moved=2.0 * times * (M + busy * rank) * (K + N),
        **more,
    )


ALL = ("x", "a", "b", "scaling")
# Slot 4 begins and ends within tiles, slot 1 is one row, slot 2 has none; rows of no adapter among them.
_BORDERS = (0, 3, 1, 3, 0, *([4] * 66), 3, 5, 5, 0)
CASES = [
    case(
        "small borders rank 8",
        "adapters that meet within tiles, one over two of them, one without rows, rows of none",
        *(75, 64, 192, 8, 6),
        slots=_BORDERS,
        gradients=ALL,
        small=True,
    ),
    case(
        "small decode rank 64",
        "rows of another adapter each",
        *(5, 128, 64, 64, 9),
        slots=(7, 0, 2, 8, 2),
        small=True,
    ),
    case("8B decode 32 rank 16", "a 4096 x 4096 layer, 32 rows of 32 adapters", 32, 4096, 4096, 16),
    case("8B train 8k rank 16", "the same, trained", 8192, 4096, 4096, 16, gradients=ALL),
    case("Jet down 8k rank 128", "jet-nemotron-2b's 11008 x 2048 layer", 8192, 11008, 2048, 128),
    case("Nano shared up 8k rank 8", "nemotron-3-nano's shared expert, 2688 x 3712", 8192, 2688, 3712, 8),
]

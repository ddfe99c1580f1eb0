"""Contract 6: one linear. ``linear(x, w, ctx)`` where ``w`` is an array or a weight that knows how to apply itself."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxllm.axes import Axes
from jaxllm.config import Precision
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.precision import contract
from parallel.context.scattered import Scattered
from parallel.sharding import Placement


@dataclass(frozen=True)
class Context:
    """What a call carries beside its arrays; everything but ``ended`` and ``rng`` is static.

    Attributes:
        precision: dtypes of the run.
        taps: names of what layers shall report in ``aux`` (contract 7).
        remat: "none", "layer" (keep layer inputs only) or "dots" (keep matrix products as well).
        kv_bound: cached positions that attention reads (a bucket over every row's length); None: all.
        fresh: no slot of this call holds a token yet.
        ended: bool[B, n], segments whose prompt ends with this call (cache policies may evict then); None: none.
        drafting: what this call adds to the cache may be rolled back.
        implementation: of the kernels; "auto" lets the dispatcher choose.
        rng: key for stochastic weights.
        placement: of a step that several devices share: the call is under ``shard_map``, rows and parameters are this
            device's shares (:mod:`jaxllm.model.shares`). None: everything is here.
        scattered: rows are this device's slots of blocks, whose documents go on in the slots of others
            (:mod:`parallel.context.scattered`). None: rows are whole.
        skipped: letters whose sub-blocks are constants in backward (:func:`parallel.failover.degraded.skip`).
    """

    precision: Precision = field(default_factory=Precision)
    taps: frozenset[str] = frozenset()
    remat: str = "none"
    kv_bound: int | None = None
    fresh: bool = False
    ended: Any = None
    drafting: bool = False
    implementation: str = "auto"
    rng: Any = None
    placement: Placement | None = None
    scattered: Scattered | None = None
    skipped: frozenset[str] = frozenset()


@runtime_checkable
class Weight(Protocol):
    """A pytree that stands where a weight array could: quantised, adapted, low rank."""

    def apply(self, x: jax.Array, ctx: Context) -> jax.Array:
        """``x [..., in]`` times the logical weight: ``[..., out]``."""
        ...

    def axes(self) -> Axes:
        """Axes of the logical weight."""
        ...

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """(in, out)."""
        ...


@runtime_checkable
class GroupedWeight(Protocol):
    """A pytree that stands where the weights of all experts could."""

    def apply_grouped(self, x: jax.Array, sizes: jax.Array, ctx: Context) -> jax.Array:
        """Rows [M, in], sorted by expert, each times its expert's logical weight: [M, out]."""
        ...


def linear(
    x: Float[Array, "B T i"], w: Any, ctx: Context, out_dtype: DTypeLike | None = None
) -> Float[Array, "B T o"]:
    """``x @ w`` in the run's precision, accumulated in float32.

    Args:
        x: activations.
        w: plain weights [in, out], or a :class:`Weight`.
        ctx: precision, rng.
        out_dtype: of the result; None takes that of ``x``.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if isinstance(w, Weight):
        return w.apply(x, ctx).astype(out_dtype)
    if ctx.precision.operand is None:
        w = w.astype(x.dtype)
    return contract("bti,io->bto", x, w, operand_dtype=ctx.precision.operand, out_dtype=out_dtype)


def grouped_linear(
    x: Float[Array, "M i"], w: Any, sizes: Int[Array, " E"], ctx: Context
) -> Float[Array, "M o"]:
    """``x[m] @ w[e]`` for the rows of expert e, which stand together; as :func:`linear`.

    Args:
        x: rows sorted by expert.
        w: plain weights [E, in, out], or a :class:`GroupedWeight`.
        sizes: rows of each expert.
        ctx: precision, implementation.
    """
    if isinstance(w, GroupedWeight):
        return w.apply_grouped(x, sizes, ctx)
    options = {"operand_dtype": ctx.precision.operand, "implementation": ctx.implementation}
    return grouped_matmul(x, w, sizes, **options)

"""What the recurrent mixers share: a causal convolution, then a recurrence whose memory of a document has a fixed size."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.batch import PackedBatch
from jaxllm.cache.recurrent import MatrixState, read_rows, write_rows
from jaxllm.cache.window import RecurrentWindow, accepted_nodes, window_ancestors
from jaxllm.linear import Context
from pallas_kernels.causal_conv.step import causal_conv_step
from pallas_kernels.causal_conv.window import causal_conv_commit
from parallel.context.scattered import Scattered

# (outputs, what is kept of them): the states of documents, or what a window adds to one.
Pass = Callable[..., tuple[Array, Any]]


class Ops(NamedTuple):
    """A mixer's kernels: over packed documents, along the paths of a window, and the state after one path.

    The ``scattered`` ones take documents whose blocks lie on several devices (:mod:`parallel.context`). The ``step``
    ones take the arrays of the others, of one token a row, and ``pool``, ``live`` and ``implementation``; they return
    the pool after it. None: there is no such kernel, and a token goes the way of any chunk.
    """

    conv: Pass
    conv_window: Callable[..., Array]
    scan: Pass
    scan_window: Pass
    scan_commit: Callable[..., Array]
    conv_scattered: Callable[..., Array]
    scan_scattered: Pass
    conv_step: Pass | None = None
    scan_step: Pass | None = None


def conv_step(inputs: Float[Array, "B 1 C"], *parameters: Any, **options: Any) -> tuple[Array, Array]:
    """:func:`causal_conv_step` as ``Ops.conv_step``."""
    y, pool = causal_conv_step(inputs[:, 0], *parameters, **options)
    return y[:, None], pool


class Recurrent(nnx.Module):
    """A mixer with the kernels ``ops``; :meth:`mix` takes its tokens through them, whatever they go on from."""

    ops: ClassVar[Ops]
    chunk_size: int

    def mix(self, x: Array, conv: Pass, scan: Pass, ctx: Context) -> tuple[Array, Any, Any]:
        """(y, what ``conv`` kept, what ``scan`` kept).

        Args:
            x: [B, T, D].
            conv: takes raw inputs [B, T, C] and the parameters of ``ops.conv``.
            scan: takes the arrays of ``ops.scan``.
            ctx: as everywhere.
        """
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B T D"], batch: PackedBatch, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Training: every segment starts from a zero state and keeps nothing."""
        if ctx.scattered is not None:
            return self._scattered(x, ctx, ctx.scattered), {}
        packed = {"segment_ids": batch.segment_ids, "implementation": ctx.implementation}
        scan = partial(self.ops.scan, **packed, **self._options(ctx))
        return self.mix(x, partial(self.ops.conv, **packed), scan, ctx)[0], {}

    def _scattered(self, x: Array, ctx: Context, scattered: Scattered) -> Array:
        """:meth:`mix` over this device's slots; which token follows which is in the plan's lanes."""
        where = {"implementation": ctx.implementation, **scattered.where}

        def conv(inputs: Array, *parameters: Any) -> tuple[Array, None]:
            return self.ops.conv_scattered(inputs, *parameters, **where), None

        scan = partial(self.ops.scan_scattered, **where, **self._options(ctx))
        return self.mix(x, conv, scan, ctx)[0]

    def _options(self, ctx: Context) -> dict[str, Any]:
        return {"chunk_size": self.chunk_size, "operand_dtype": ctx.precision.operand}

    def extend(
        self, x: Float[Array, "B T D"], batch: PackedBatch, state: MatrixState, ctx: Context
    ) -> tuple[Float[Array, "B T D"], MatrixState, dict[str, Any]]:
        """Prefill chunk or decode: each segment goes on from its slot's state."""
        conv = _going_on(self.ops.conv, self.ops.conv_step, state.conv, batch, ctx)
        scan = _going_on(self.ops.scan, self.ops.scan_step, state.matrix, batch, ctx, **self._options(ctx))
        y, conv_pool, matrix_pool = self.mix(x, conv, scan, ctx)
        return y, MatrixState(conv_pool, matrix_pool), {}

    def window(
        self, x: Float[Array, "B W D"], batch: PackedBatch, state: MatrixState, ctx: Context
    ) -> tuple[Float[Array, "B W D"], RecurrentWindow, dict[str, Any]]:
        """Convolution and recurrence along the path to each node, from the slot's state."""
        conv_before, before = _before(state, batch)
        tree = {"ancestors": window_ancestors(batch), "implementation": ctx.implementation}

        def conv(inputs: Array, *parameters: Any) -> tuple[Array, Array]:
            return self.ops.conv_window(inputs, *parameters, initial_state=conv_before, **tree), inputs

        scan = partial(self.ops.scan_window, initial_state=before, **tree)
        y, inputs, factors = self.mix(x, conv, scan, ctx)
        return y, RecurrentWindow(state, batch, inputs, factors), {}

    def commit(self, window: RecurrentWindow, path: Int[Array, "B m"], n: Int[Array, " B"]) -> MatrixState:
        """The slot's states after each row's first ``n`` nodes of ``path``."""
        state, batch = window.state, window.batch
        conv_before, before = _before(state, batch)
        accepted, ancestors = accepted_nodes(batch, path, n), window_ancestors(batch)
        conv = causal_conv_commit(window.inputs, ancestors, accepted, conv_before)
        matrix = self.ops.scan_commit(window.factors, accepted, before)
        return MatrixState(
            write_rows(state.conv, batch, conv[:, None]), write_rows(state.matrix, batch, matrix[:, None])
        )


def _before(state: MatrixState, batch: PackedBatch) -> tuple[Array, Array]:
    """The states that the rows of a window go on from, one segment a row."""
    return read_rows(state.conv, batch)[:, 0], read_rows(state.matrix, batch)[:, 0]


def _going_on(
    op: Pass, step: Pass | None, pool: Array, batch: PackedBatch, ctx: Context, **options: Any
) -> Pass:
    """``op`` from the states of the batch's segments on; what it keeps is the pool after them.

    Decode takes ``step``: one token a row, each in the row's own slot. With slots named, one of -1 may still have a
    token, which starts from zeros and has an output; to ``step`` such a row is idle.
    """
    if step is not None and batch.slots is None and batch.shape[1] == 1:
        live = batch.segment_ids[:, 0] > 0
        return partial(step, pool=pool, live=live, implementation=ctx.implementation)

    def through(*arrays: Any) -> tuple[Array, Array]:
        y, after = op(
            *arrays,
            segment_ids=batch.segment_ids,
            initial_state=read_rows(pool, batch),
            implementation=ctx.implementation,
            **options,
        )
        return y, write_rows(pool, batch, after)

    return through

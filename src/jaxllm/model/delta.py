"""What the mixers of the delta rule share: unit keys, log decays, the rule over packed documents, the norm of heads."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxllm.axes import AnyAxis
from jaxllm.batch import PackedBatch
from jaxllm.cache.state import DeltaState, read_rows, write_rows
from jaxllm.cache.window import DeltaWindow, accepted_nodes, window_ancestors
from jaxllm.linear import Context
from jaxllm.model.layers import parameter
from pallas_kernels.causal_conv.window import causal_conv_commit
from pallas_kernels.gated_delta import gated_delta
from pallas_kernels.gated_delta.window import Factors, gated_delta_commit, gated_delta_window

UNIT_EPS = 1e-6


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """``x`` at Euclidean length 1, float32; the epsilon is inside the root and added to the sum, not to the mean."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + UNIT_EPS)


def log_decay(
    a: Float[Array, "B T H"], A_log: Float[Array, "H"], dt_bias: Float[Array, "H"]
) -> Float[Array, "B T H"]:
    """``-exp(A_log) softplus(a + dt_bias)``, at most 0, float32."""
    step = jax.nn.softplus(a.astype(jnp.float32) + dt_bias.astype(jnp.float32))
    return -jnp.exp(A_log.astype(jnp.float32)) * step


def delta_rule(
    q: Float[Array, "B T H dk"],
    k: Float[Array, "B T H dk"],
    v: Float[Array, "B T Hv dv"],
    g: Float[Array, "B T Hv"],
    beta: Float[Array, "B T Hv"],
    batch: PackedBatch,
    state: Float[Array, "B n Hv dk dv"] | None,
    chunk_size: int,
    ctx: Context,
) -> tuple[Float[Array, "B T Hv dv"], Float[Array, "B n Hv dk dv"] | None]:
    """The gated delta rule with unit keys and unit queries over sqrt(dk), per document of ``batch``."""
    return gated_delta(
        unit(q) * q.shape[-1] ** -0.5,
        unit(k),
        v,
        g,
        beta.astype(jnp.float32),
        segment_ids=batch.segment_ids,
        initial_state=state,
        chunk_size=chunk_size,
        operand_dtype=ctx.precision.operand,
        implementation=ctx.implementation,
    )


def delta_rule_window(
    q: Float[Array, "B W H dk"],
    k: Float[Array, "B W H dk"],
    v: Float[Array, "B W Hv dv"],
    g: Float[Array, "B W Hv"],
    beta: Float[Array, "B W Hv"],
    ancestors: Bool[Array, "B W W"],
    state: Float[Array, "B Hv dk dv"],
    ctx: Context,
) -> tuple[Float[Array, "B W Hv dv"], Factors]:
    """:func:`delta_rule` along the path to every node of a window."""
    return gated_delta_window(
        unit(q) * q.shape[-1] ** -0.5,
        unit(k),
        v,
        g,
        beta.astype(jnp.float32),
        ancestors=ancestors,
        initial_state=state,
        implementation=ctx.implementation,
    )


def commit(window: DeltaWindow, path: Int[Array, "B m"], n: Int[Array, " B"]) -> DeltaState:
    """The slot's states after each row's first ``n`` nodes of ``path``."""
    state, batch = window.state, window.batch
    accepted, ancestors = accepted_nodes(batch, path, n), window_ancestors(batch)
    conv = causal_conv_commit(window.inputs, ancestors, accepted, read_rows(state.conv, batch)[:, 0])
    matrix = gated_delta_commit(window.factors, accepted, read_rows(state.matrix, batch)[:, 0])
    return DeltaState(
        write_rows(state.conv, batch, conv[:, None]), write_rows(state.matrix, batch, matrix[:, None])
    )


class HeadNorm(nnx.Module):
    """RMSNorm over each head with one weight for all, THEN the gate: the other order than Mamba-2's.

    ``cast`` as in :class:`jaxllm.model.layers.RMSNorm`: "first" rounds before the weight (Qwen3-Next), "last" after the
    gate (Jet-Nemotron).
    """

    def __init__(self, axis: AnyAxis, *, eps: float, cast: str, dtype: str, rngs: nnx.Rngs):
        self.weight = parameter((axis,), jax.nn.initializers.ones, rngs, dtype)
        self.eps = eps
        self.cast = cast

    def __call__(self, o: Float[Array, "B T H d"], z: Float[Array, "B T H d"]) -> Float[Array, "B T H d"]:
        u = o.astype(jnp.float32)
        u = u * jax.lax.rsqrt(jnp.mean(jnp.square(u), axis=-1, keepdims=True) + self.eps)
        if self.cast == "first":
            u = (u.astype(z.dtype) * self.weight[...].astype(z.dtype)).astype(jnp.float32)
        else:
            u = u * self.weight[...].astype(jnp.float32)
        return (u * jax.nn.silu(z.astype(jnp.float32))).astype(z.dtype)

"""JetBlock mixer (Jet-Nemotron, arXiv 2508.15884): the gated delta rule with a convolution that the input writes."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.axes import Axis, Product
from jaxllm.batch import PackedBatch
from jaxllm.cache.state import DeltaState, read_rows, write_rows
from jaxllm.cache.window import DeltaWindow, window_ancestors
from jaxllm.config import ModelConfig
from jaxllm.linear import Context
from jaxllm.model.delta import HeadNorm, commit, delta_rule, delta_rule_window, log_decay
from jaxllm.model.initial import a_log, dt_bias
from jaxllm.model.layers import Linear, parameter
from pallas_kernels.dynamic_conv import dynamic_conv
from pallas_kernels.dynamic_conv.window import dynamic_conv_window

# The published range of A starts at 0, whose logarithm is not a number to train.
A_MIN = 1e-4


class KernelGenerator(nnx.Module):
    """``w2 silu(w1 x) + b2``: k taps for every token and channel, the oldest tap of all channels first.

    It starts with w2 = 0, so that the block begins as a static convolution with the taps b2. The published code zeroes
    w1 as well, where its generic initialiser does not overwrite it; with both at zero neither would ever have a
    gradient.
    """

    def __init__(self, cfg: ModelConfig, channels: Product, *, rngs: nnx.Rngs):
        j = cfg.jet
        assert j is not None
        dtype = cfg.precision.param
        hidden = Axis("generator", j.generator_size)
        taps = Product("taps", (Axis("conv_width", j.conv_kernel), channels))
        linear = partial(Linear, dtype=dtype, rngs=rngs)
        self.w1 = linear(Axis("embed", cfg.hidden_size), hidden, bias=False, std=cfg.init_std)
        self.w2 = linear(hidden, taps, bias=True, std=0.0)
        self.w2.bias = parameter((taps,), jax.nn.initializers.normal(cfg.init_std), rngs, dtype)
        self.taps = j.conv_kernel

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T k C"]:
        flat = self.w2(jax.nn.silu(self.w1(x, ctx)), ctx)
        return flat.reshape(*x.shape[:2], self.taps, -1)


class Jet(nnx.Module):
    """q, k (silu, no convolution), v (generated convolution, silu), delta rule, norm of heads, gate, projection.

    Shapes: H heads, dk and dv their widths. What is kept between tokens is v before its convolution.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        j = cfg.jet
        assert j is not None
        self.cfg = j
        dtype = cfg.precision.param
        heads, key_dim = Axis("key_heads", j.num_heads), Axis("key_head_dim", j.key_head_dim)
        value_dim = Axis("value_head_dim", j.value_head_dim)
        key, value = Product("key", (heads, key_dim)), Product("value", (heads, value_dim))
        embed = Axis("embed", cfg.hidden_size)
        project = partial(Linear, embed, bias=False, std=cfg.init_std, dtype=dtype, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj = project(key), project(key), project(value)
        self.b_proj, self.a_proj, self.g_proj = project(heads), project(heads), project(value)
        self.generator = KernelGenerator(cfg, value, rngs=rngs)
        # Decays are exponentials of these: they stay float32 whatever the precision.
        self.A_log = parameter((heads,), a_log(A_MIN), rngs, "float32")
        self.dt_bias = parameter((heads,), dt_bias, rngs, "float32")
        self.o_norm = HeadNorm(value_dim, eps=j.norm_eps, cast="last", dtype=dtype, rngs=rngs)
        residual_std = cfg.init_std / len(cfg.pattern) ** 0.5
        self.o_proj = Linear(value, embed, bias=False, std=residual_std, dtype=dtype, rngs=rngs)

    def _mix(
        self, x: Array, batch: PackedBatch, ctx: Context, conv: Array | None, matrix: Array | None
    ) -> tuple[Array, Array | None, Array | None]:
        """(y, new conv state, new matrix); states are [B, n, ...] per segment, None in training."""
        v, conv = dynamic_conv(
            self.v_proj(x, ctx),
            self.generator(x, ctx),
            segment_ids=batch.segment_ids,
            initial_state=conv,
            implementation=ctx.implementation,
        )
        o, matrix = delta_rule(*self._rule_inputs(x, v, ctx), batch, matrix, self.cfg.chunk_size, ctx)
        return self._out(o, x, ctx), conv, matrix

    def _rule_inputs(self, x: Array, v: Array, ctx: Context) -> tuple[Array, Array, Array, Array, Array]:
        """q, k, v, g, beta as the delta rule takes them."""
        j, leading = self.cfg, x.shape[:2]
        q, k = (
            jax.nn.silu(project(x, ctx)).reshape(*leading, j.num_heads, j.key_head_dim)
            for project in (self.q_proj, self.k_proj)
        )
        return (
            q,
            k,
            v.reshape(*leading, j.num_heads, j.value_head_dim),
            log_decay(self.a_proj(x, ctx), self.A_log[...], self.dt_bias[...]),
            jax.nn.sigmoid(self.b_proj(x, ctx)),
        )

    def _out(self, o: Array, x: Array, ctx: Context) -> Array:
        o = self.o_norm(o, self.g_proj(x, ctx).reshape(o.shape))
        return self.o_proj(o.reshape(*x.shape[:2], self.cfg.value_size), ctx)

    def __call__(
        self, x: Float[Array, "B T D"], batch: PackedBatch, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Training: every segment starts from a zero state and keeps nothing."""
        y, _, _ = self._mix(x, batch, ctx, None, None)
        return y, {}

    def extend(
        self, x: Float[Array, "B T D"], batch: PackedBatch, state: DeltaState, ctx: Context
    ) -> tuple[Float[Array, "B T D"], DeltaState, dict[str, Any]]:
        """Prefill chunk or decode: each segment goes on from its slot's state."""
        kept = read_rows(state.conv, batch), read_rows(state.matrix, batch)
        y, conv, matrix = self._mix(x, batch, ctx, *kept)
        assert conv is not None and matrix is not None
        return y, DeltaState(write_rows(state.conv, batch, conv), write_rows(state.matrix, batch, matrix)), {}

    def window(
        self, x: Float[Array, "B W D"], batch: PackedBatch, state: DeltaState, ctx: Context
    ) -> tuple[Float[Array, "B W D"], DeltaWindow, dict[str, Any]]:
        """Convolution and delta rule along the path to each node, from the slot's state."""
        ancestors, inputs = window_ancestors(batch), self.v_proj(x, ctx)
        v = dynamic_conv_window(
            inputs,
            self.generator(x, ctx),
            ancestors=ancestors,
            initial_state=read_rows(state.conv, batch)[:, 0],
            implementation=ctx.implementation,
        )
        kept = read_rows(state.matrix, batch)[:, 0]
        o, factors = delta_rule_window(*self._rule_inputs(x, v, ctx), ancestors, kept, ctx)
        return self._out(o, x, ctx), DeltaWindow(state, batch, inputs, factors), {}

    def commit(self, window: DeltaWindow, path: Int[Array, "B m"], n: Int[Array, " B"]) -> DeltaState:
        """The slot's states after each row's first ``n`` nodes of ``path``."""
        return commit(window, path, n)

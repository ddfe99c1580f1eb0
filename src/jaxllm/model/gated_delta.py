"""Gated DeltaNet mixer (arXiv 2412.06464): Qwen3-Next's and OLMo-Hybrid's are settings of it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.axes import Axis, Concat, Product
from jaxllm.batch import PackedBatch
from jaxllm.cache.state import DeltaState, read_rows, write_rows
from jaxllm.cache.window import DeltaWindow, window_ancestors
from jaxllm.config import ModelConfig
from jaxllm.linear import Context
from jaxllm.model.delta import HeadNorm, commit, delta_rule, delta_rule_window, log_decay
from jaxllm.model.initial import a_log, dt_bias
from jaxllm.model.layers import Linear, parameter
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.causal_conv.window import causal_conv_window

# Below Qwen3-Next's own 0.01 nothing is gained, and the logarithm of 0 is not a number to train.
A_MIN = 0.01


class GatedDelta(nnx.Module):
    """Fused projection q | k | v | z, causal convolution over q, k and v, delta rule, norm of heads, gate, projection.

    Shapes: H key heads, Hv = H * E value heads, dk and dv their widths. Write strengths and decays have a projection of
    their own, beta | decay.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d = cfg.delta
        assert d is not None
        self.cfg = d
        dtype = cfg.precision.param
        key_heads, key_dim = Axis("key_heads", d.num_heads), Axis("key_head_dim", d.key_head_dim)
        per_key = Axis("value_heads_per_key_head", d.value_heads // d.num_heads)
        heads = Product("value_heads", (key_heads, per_key))
        value_dim = Axis("value_head_dim", d.value_head_dim)
        q, k = Product("q", (key_heads, key_dim)), Product("k", (key_heads, key_dim))
        v, z = Product("v", (heads, value_dim)), Product("z", (heads, value_dim))
        self.conv_axis = Concat("qkv", (q, k, v))
        self.in_axis = Concat("in_proj", (self.conv_axis, z))
        self.gate_axis = Concat("gate_proj", (Product("beta", (heads,)), Product("decay", (heads,))))
        embed = Axis("embed", cfg.hidden_size)
        self.in_proj = Linear(embed, self.in_axis, bias=False, std=cfg.init_std, dtype=dtype, rngs=rngs)
        self.gate_proj = Linear(embed, self.gate_axis, bias=False, std=cfg.init_std, dtype=dtype, rngs=rngs)
        uniform = jax.nn.initializers.uniform(2 * d.conv_kernel**-0.5)

        def centred(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
            return uniform(key, shape, dtype) - jnp.asarray(d.conv_kernel**-0.5, dtype)

        width = Axis("conv_width", d.conv_kernel)
        self.conv_weight = parameter((width, self.conv_axis), centred, rngs, dtype)
        # Decays are exponentials of these: they stay float32 whatever the precision.
        self.A_log = parameter((heads,), a_log(A_MIN), rngs, "float32")
        self.dt_bias = parameter((heads,), dt_bias, rngs, "float32")
        eps = cfg.norm_eps if d.norm_eps is None else d.norm_eps
        self.norm = HeadNorm(value_dim, eps=eps, cast="first", dtype=dtype, rngs=rngs)
        residual_std = cfg.init_std / len(cfg.pattern) ** 0.5
        self.out_proj = Linear(v, embed, bias=False, std=residual_std, dtype=dtype, rngs=rngs)

    def _mix(
        self, u: Array, batch: PackedBatch, ctx: Context, conv: Array | None, matrix: Array | None
    ) -> tuple[Array, Array | None, Array | None]:
        """(y, new conv state, new matrix); states are [B, n, ...] per segment, None in training."""
        qkv, z = self.in_axis.split(self.in_proj(u, ctx))
        qkv, conv = causal_conv(
            qkv,
            self.conv_weight[...].astype(qkv.dtype),
            segment_ids=batch.segment_ids,
            initial_state=conv,
            implementation=ctx.implementation,
        )
        o, matrix = delta_rule(*self._rule_inputs(u, qkv, ctx), batch, matrix, self.cfg.chunk_size, ctx)
        return self._out(o, z, ctx), conv, matrix

    def _rule_inputs(self, u: Array, qkv: Array, ctx: Context) -> tuple[Array, Array, Array, Array, Array]:
        """q, k, v, g, beta as the delta rule takes them."""
        d, leading = self.cfg, u.shape[:2]
        beta, decay = self.gate_axis.split(self.gate_proj(u, ctx))
        q, k, v = self.conv_axis.split(qkv)
        return (
            q.reshape(*leading, d.num_heads, d.key_head_dim),
            k.reshape(*leading, d.num_heads, d.key_head_dim),
            v.reshape(*leading, d.value_heads, d.value_head_dim),
            log_decay(decay, self.A_log[...], self.dt_bias[...]),
            jax.nn.sigmoid(beta) * (2 if d.allow_neg_eigval else 1),
        )

    def _out(self, o: Array, z: Array, ctx: Context) -> Array:
        o = self.norm(o, z.reshape(o.shape))
        return self.out_proj(o.reshape(*z.shape[:2], self.cfg.value_size), ctx)

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
        ancestors = window_ancestors(batch)
        inputs, z = self.in_axis.split(self.in_proj(x, ctx))
        qkv = causal_conv_window(
            inputs,
            self.conv_weight[...].astype(inputs.dtype),
            ancestors=ancestors,
            initial_state=read_rows(state.conv, batch)[:, 0],
            implementation=ctx.implementation,
        )
        kept = read_rows(state.matrix, batch)[:, 0]
        o, factors = delta_rule_window(*self._rule_inputs(x, qkv, ctx), ancestors, kept, ctx)
        return self._out(o, z, ctx), DeltaWindow(state, batch, inputs, factors), {}

    def commit(self, window: DeltaWindow, path: Int[Array, "B m"], n: Int[Array, " B"]) -> DeltaState:
        """The slot's states after each row's first ``n`` nodes of ``path``."""
        return commit(window, path, n)

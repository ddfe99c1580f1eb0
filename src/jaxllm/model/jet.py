"""JetBlock mixer (Jet-Nemotron, arXiv 2508.15884): the gated delta rule with a convolution that the input writes."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.axes import Axis, Product
from jaxllm.config import ModelConfig
from jaxllm.linear import Context
from jaxllm.model.delta import HeadNorm, scan_inputs, scan_step
from jaxllm.model.initial import a_log, dt_bias
from jaxllm.model.layers import Linear, parameter
from jaxllm.model.recurrent import Ops, Pass, Recurrent
from pallas_kernels.causal_conv.window import causal_conv_window
from pallas_kernels.dynamic_conv import dynamic_conv
from pallas_kernels.gated_delta import gated_delta
from pallas_kernels.gated_delta.window import gated_delta_commit, gated_delta_window
from parallel.context import halo, recurrence

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


class Jet(Recurrent):
    """q, k (silu, no convolution), v (generated convolution, silu), delta rule, norm of heads, gate, projection.

    Shapes: H heads, dk and dv their widths. What is kept between tokens is v before its convolution.
    """

    ops = Ops(
        dynamic_conv,
        causal_conv_window,
        gated_delta,
        gated_delta_window,
        gated_delta_commit,
        conv_scattered=halo.dynamic_conv,
        scan_scattered=recurrence.gated_delta,
        scan_step=scan_step,
    )

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        j = cfg.jet
        assert j is not None
        self.cfg, self.chunk_size = j, j.chunk_size
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
        self.o_proj = Linear(value, embed, bias=False, std=cfg.residual_std, dtype=dtype, rngs=rngs)

    def _scan_inputs(self, x: Array, v: Array, ctx: Context) -> tuple[Array, ...]:
        """q, k, v, g, beta as the delta rule takes them."""
        j, leading = self.cfg, x.shape[:2]
        q, k = (
            jax.nn.silu(project(x, ctx)).reshape(*leading, -1, j.key_head_dim)
            for project in (self.q_proj, self.k_proj)
        )
        return scan_inputs(
            q,
            k,
            v.reshape(*leading, -1, j.value_head_dim),
            self.a_proj(x, ctx),
            jax.nn.sigmoid(self.b_proj(x, ctx)),
            self.A_log[...],
            self.dt_bias[...],
        )

    def mix(self, x: Array, conv: Pass, scan: Pass, ctx: Context) -> tuple[Array, Any, Any]:
        """As :meth:`jaxllm.model.recurrent.Recurrent.mix`."""
        v, conv_kept = conv(self.v_proj(x, ctx), self.generator(x, ctx))
        o, scan_kept = scan(*self._scan_inputs(x, v, ctx))
        o = self.o_norm(o, self.g_proj(x, ctx).reshape(o.shape))
        return self.o_proj(o.reshape(v.shape), ctx), conv_kept, scan_kept

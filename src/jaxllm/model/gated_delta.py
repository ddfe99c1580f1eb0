"""Gated DeltaNet mixer (arXiv 2412.06464): Qwen3-Next's and OLMo-Hybrid's are settings of it."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from jaxllm.axes import Axis, Concat, Product
from jaxllm.config import ModelConfig
from jaxllm.linear import Context
from jaxllm.model.delta import HeadNorm, scan_inputs, scan_step
from jaxllm.model.initial import a_log, centred, dt_bias
from jaxllm.model.layers import Linear, parameter
from jaxllm.model.recurrent import Ops, Pass, Recurrent, conv_step
from jaxllm.model.shares import split
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.causal_conv.window import causal_conv_window
from pallas_kernels.gated_delta import gated_delta
from pallas_kernels.gated_delta.window import gated_delta_commit, gated_delta_window
from parallel.context import halo, recurrence

# Below Qwen3-Next's own 0.01 nothing is gained, and the logarithm of 0 is not a number to train.
A_MIN = 0.01


class GatedDelta(Recurrent):
    """Fused projection q | k | v | z, causal convolution over q, k and v, delta rule, norm of heads, gate, projection.

    Shapes: H key heads, Hv = H * E value heads, dk and dv their widths. Write strengths and decays have a projection of
    their own, beta | decay.
    """

    ops = Ops(
        causal_conv,
        causal_conv_window,
        gated_delta,
        gated_delta_window,
        gated_delta_commit,
        conv_scattered=halo.causal_conv,
        scan_scattered=recurrence.gated_delta,
        conv_step=conv_step,
        scan_step=scan_step,
    )

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d = cfg.delta
        assert d is not None
        self.cfg, self.chunk_size = d, d.chunk_size
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
        taps = centred(d.conv_kernel**-0.5)
        self.conv_weight = parameter((Axis("conv_width", d.conv_kernel), self.conv_axis), taps, rngs, dtype)
        # Decays are exponentials of these: they stay float32 whatever the precision.
        self.A_log = parameter((heads,), a_log(A_MIN), rngs, "float32")
        self.dt_bias = parameter((heads,), dt_bias, rngs, "float32")
        eps = cfg.norm_eps if d.norm_eps is None else d.norm_eps
        self.norm = HeadNorm(value_dim, eps=eps, cast="first", dtype=dtype, rngs=rngs)
        self.out_proj = Linear(v, embed, bias=False, std=cfg.residual_std, dtype=dtype, rngs=rngs)

    def _scan_inputs(self, x: Array, qkv: Array, ctx: Context) -> tuple[Array, ...]:
        """q, k, v, g, beta as the delta rule takes them."""
        d, leading = self.cfg, x.shape[:2]
        beta, decay = split(self.gate_axis, self.gate_proj(x, ctx), ctx)
        q, k, v = split(self.conv_axis, qkv, ctx)
        return scan_inputs(
            q.reshape(*leading, -1, d.key_head_dim),
            k.reshape(*leading, -1, d.key_head_dim),
            v.reshape(*leading, -1, d.value_head_dim),
            decay,
            jax.nn.sigmoid(beta) * (2 if d.allow_neg_eigval else 1),
            self.A_log[...],
            self.dt_bias[...],
        )

    def mix(self, x: Array, conv: Pass, scan: Pass, ctx: Context) -> tuple[Array, Any, Any]:
        """As :meth:`jaxllm.model.recurrent.Recurrent.mix`."""
        qkv, z = split(self.in_axis, self.in_proj(x, ctx), ctx)
        qkv, conv_kept = conv(qkv, self.conv_weight[...].astype(qkv.dtype))
        o, scan_kept = scan(*self._scan_inputs(x, qkv, ctx))
        o = self.norm(o, z.reshape(o.shape))
        return self.out_proj(o.reshape(z.shape), ctx), conv_kept, scan_kept

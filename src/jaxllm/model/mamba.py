"""Mamba-2 mixer (arXiv 2405.21060) in the layout of Nemotron-H (arXiv 2504.03624)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxllm.axes import Axis, Concat, Product
from jaxllm.config import ModelConfig
from jaxllm.linear import Context
from jaxllm.model.initial import a_log, centred, dt_bias
from jaxllm.model.layers import GatedRMSNorm, Linear, parameter
from jaxllm.model.recurrent import Ops, Pass, Recurrent, conv_step
from jaxllm.model.shares import split
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.causal_conv.window import causal_conv_window
from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.step import ssd_step
from pallas_kernels.ssd.window import ssd_commit, ssd_window
from parallel.context import halo, recurrence


def _scan_step(
    x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, **options: Any
) -> tuple[Array, Array]:
    """:func:`ssd_step` as ``Ops.scan_step``."""
    y, pool = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, **options)
    return y[:, None], pool


class Mamba(Recurrent):
    """Fused projection z | x | B | C | dt, causal convolution over x, B and C, scan, gated norm, projection.

    Shapes: H heads, P head dim, N state size, G groups; d_in = H * P.
    """

    ops = Ops(
        causal_conv,
        causal_conv_window,
        ssd,
        ssd_window,
        ssd_commit,
        conv_scattered=halo.causal_conv,
        scan_scattered=recurrence.ssd,
        conv_step=conv_step,
        scan_step=_scan_step,
    )

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        m = cfg.mamba
        assert m is not None
        self.cfg, self.chunk_size = m, m.chunk_size
        dtype = cfg.precision.param
        groups, state = Axis("ssm_groups", m.n_groups), Axis("ssm_state", m.state_size)
        heads = Product("ssm_heads", (groups, Axis("ssm_heads_per_group", m.num_heads // m.n_groups)))
        inner = Product("ssm_inner", (heads, Axis("ssm_head_dim", m.head_dim)))
        x, b, c = Product("x", (inner,)), Product("B", (groups, state)), Product("C", (groups, state))
        self.conv_axis = Concat("xBC", (x, b, c))
        self.in_axis = Concat("in_proj", (Product("z", (inner,)), self.conv_axis, Product("dt", (heads,))))
        embed = Axis("embed", cfg.hidden_size)
        self.in_proj = Linear(embed, self.in_axis, bias=m.proj_bias, std=cfg.init_std, dtype=dtype, rngs=rngs)
        width, taps = Axis("conv_width", m.conv_kernel), centred(m.conv_kernel**-0.5)
        self.conv_weight = parameter((width, self.conv_axis), taps, rngs, dtype)
        self.conv_bias = parameter((self.conv_axis,), taps, rngs, dtype) if m.conv_bias else None
        # Decays are exponentials of these: they stay float32 whatever the precision.
        self.A_log = parameter((heads,), a_log(1.0), rngs, "float32")
        self.D = parameter((heads,), jax.nn.initializers.ones, rngs, "float32")
        self.dt_bias = parameter((heads,), dt_bias, rngs, "float32")
        self.norm = GatedRMSNorm(inner, groups=m.gate_groups, eps=cfg.norm_eps, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(inner, embed, bias=m.proj_bias, std=cfg.residual_std, dtype=dtype, rngs=rngs)

    def _scan_inputs(self, xBC: Array, dt: Array, ctx: Context) -> tuple[Array, ...]:
        """x, dt, A, B, C, D as the scan takes them."""
        m = self.cfg
        leading = dt.shape[:2]
        x, B, C = split(self.conv_axis, xBC, ctx)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        if m.dt_limit != (0.0, float("inf")):
            dt = jnp.clip(dt, *m.dt_limit)
        return (
            x.reshape(*leading, -1, m.head_dim),
            dt,
            -jnp.exp(self.A_log[...].astype(jnp.float32)),
            B.reshape(*leading, -1, m.state_size),
            C.reshape(*leading, -1, m.state_size),
            self.D[...].astype(jnp.float32),
        )

    def mix(self, x: Array, conv: Pass, scan: Pass, ctx: Context) -> tuple[Array, Any, Any]:
        """As :meth:`jaxllm.model.recurrent.Recurrent.mix`."""
        z, xBC, dt = split(self.in_axis, self.in_proj(x, ctx), ctx)
        bias = None if self.conv_bias is None else self.conv_bias[...].astype(xBC.dtype)
        xBC, conv_kept = conv(xBC, self.conv_weight[...].astype(xBC.dtype), bias)
        y, scan_kept = scan(*self._scan_inputs(xBC, dt, ctx))
        return self.out_proj(self.norm(y.reshape(z.shape), z, ctx), ctx), conv_kept, scan_kept

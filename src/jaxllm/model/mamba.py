"""Mamba-2 mixer (arXiv 2405.21060) in the layout of Nemotron-H (arXiv 2504.03624)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.axes import Axis, Concat, Product
from jaxllm.batch import PackedBatch
from jaxllm.cache.state import MambaState, read_rows, write_rows
from jaxllm.cache.window import MambaWindow, accepted_nodes, window_ancestors
from jaxllm.config import ModelConfig
from jaxllm.linear import Context
from jaxllm.model.initial import a_log, dt_bias
from jaxllm.model.layers import GatedRMSNorm, Linear, parameter
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.causal_conv.window import causal_conv_commit, causal_conv_window
from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.window import ssd_commit, ssd_window


class Mamba(nnx.Module):
    """Fused projection z | x | B | C | dt, causal convolution over x, B and C, scan, gated norm, projection.

    Shapes: H heads, P head dim, N state size, G groups; d_in = H * P.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        m = cfg.mamba
        assert m is not None
        self.cfg = m
        dtype = cfg.precision.param
        groups, state = Axis("ssm_groups", m.n_groups), Axis("ssm_state", m.state_size)
        heads = Product("ssm_heads", (groups, Axis("ssm_heads_per_group", m.num_heads // m.n_groups)))
        inner = Product("ssm_inner", (heads, Axis("ssm_head_dim", m.head_dim)))
        x, b, c = Product("x", (inner,)), Product("B", (groups, state)), Product("C", (groups, state))
        self.conv_axis = Concat("xBC", (x, b, c))
        self.in_axis = Concat("in_proj", (Product("z", (inner,)), self.conv_axis, Product("dt", (heads,))))
        embed = Axis("embed", cfg.hidden_size)
        self.in_proj = Linear(embed, self.in_axis, bias=m.proj_bias, std=cfg.init_std, dtype=dtype, rngs=rngs)
        bound = m.conv_kernel**-0.5
        uniform = jax.nn.initializers.uniform(2 * bound)
        width = Axis("conv_width", m.conv_kernel)

        def centred(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
            return uniform(key, shape, dtype) - jnp.asarray(bound, dtype)

        self.conv_weight = parameter((width, self.conv_axis), centred, rngs, dtype)
        self.conv_bias = parameter((self.conv_axis,), centred, rngs, dtype) if m.conv_bias else None
        # Decays are exponentials of these: they stay float32 whatever the precision.
        self.A_log = parameter((heads,), a_log(1.0), rngs, "float32")
        self.D = parameter((heads,), jax.nn.initializers.ones, rngs, "float32")
        self.dt_bias = parameter((heads,), dt_bias, rngs, "float32")
        self.norm = GatedRMSNorm(inner, groups=m.gate_groups, eps=cfg.norm_eps, dtype=dtype, rngs=rngs)
        residual_std = cfg.init_std / len(cfg.pattern) ** 0.5
        self.out_proj = Linear(inner, embed, bias=m.proj_bias, std=residual_std, dtype=dtype, rngs=rngs)

    def _conv_parameters(self, dtype: Any) -> tuple[Array, Array | None]:
        bias = None if self.conv_bias is None else self.conv_bias[...].astype(dtype)
        return self.conv_weight[...].astype(dtype), bias

    def _scan_inputs(self, xBC: Array, dt: Array) -> tuple[Array, ...]:
        """x, dt, A, B, C, D as the scan takes them."""
        m = self.cfg
        leading = dt.shape[:2]
        x, B, C = self.conv_axis.split(xBC)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        if m.dt_limit != (0.0, float("inf")):
            dt = jnp.clip(dt, *m.dt_limit)
        return (
            x.reshape(*leading, m.num_heads, m.head_dim),
            dt,
            -jnp.exp(self.A_log[...].astype(jnp.float32)),
            B.reshape(*leading, m.n_groups, m.state_size),
            C.reshape(*leading, m.n_groups, m.state_size),
            self.D[...].astype(jnp.float32),
        )

    def _mix(
        self, u: Array, batch: PackedBatch, ctx: Context, conv: Array | None, ssm: Array | None
    ) -> tuple[Array, Array | None, Array | None]:
        """(y, new conv state, new ssm state); states are [B, n, ...] per segment, None in training."""
        m = self.cfg
        rows, length = batch.shape
        z, xBC, dt = self.in_axis.split(self.in_proj(u, ctx))
        xBC, conv = causal_conv(
            xBC,
            *self._conv_parameters(xBC.dtype),
            segment_ids=batch.segment_ids,
            initial_state=conv,
            implementation=ctx.implementation,
        )
        y, ssm = ssd(
            *self._scan_inputs(xBC, dt),
            segment_ids=batch.segment_ids,
            initial_state=ssm,
            chunk_size=m.chunk_size,
            operand_dtype=ctx.precision.operand,
            implementation=ctx.implementation,
        )
        y = self.norm(y.reshape(rows, length, m.inner_size), z)
        return self.out_proj(y, ctx), conv, ssm

    def __call__(
        self, x: Float[Array, "B T D"], batch: PackedBatch, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Training: every segment starts from a zero state and keeps nothing."""
        y, _, _ = self._mix(x, batch, ctx, None, None)
        return y, {}

    def extend(
        self, x: Float[Array, "B T D"], batch: PackedBatch, state: MambaState, ctx: Context
    ) -> tuple[Float[Array, "B T D"], MambaState, dict[str, Any]]:
        """Prefill chunk or decode: each segment goes on from its slot's state."""
        y, conv, ssm = self._mix(x, batch, ctx, read_rows(state.conv, batch), read_rows(state.ssm, batch))
        assert conv is not None and ssm is not None
        return y, MambaState(write_rows(state.conv, batch, conv), write_rows(state.ssm, batch, ssm)), {}

    def window(
        self, x: Float[Array, "B W D"], batch: PackedBatch, state: MambaState, ctx: Context
    ) -> tuple[Float[Array, "B W D"], MambaWindow, dict[str, Any]]:
        """Convolution and scan along the path to each node, from the slot's state."""
        rows, length = batch.shape
        ancestors = window_ancestors(batch)
        z, inputs, dt = self.in_axis.split(self.in_proj(x, ctx))
        tree = {"ancestors": ancestors, "implementation": ctx.implementation}
        xBC = causal_conv_window(
            inputs,
            *self._conv_parameters(inputs.dtype),
            initial_state=read_rows(state.conv, batch)[:, 0],
            **tree,
        )
        y, factors = ssd_window(
            *self._scan_inputs(xBC, dt), initial_state=read_rows(state.ssm, batch)[:, 0], **tree
        )
        y = self.norm(y.reshape(rows, length, self.cfg.inner_size), z)
        return self.out_proj(y, ctx), MambaWindow(state, batch, inputs, factors), {}

    def commit(self, window: MambaWindow, path: Int[Array, "B m"], n: Int[Array, " B"]) -> MambaState:
        """The slot's states after each row's first ``n`` nodes of ``path``."""
        state, batch = window.state, window.batch
        accepted = accepted_nodes(batch, path, n)
        conv = causal_conv_commit(
            window.inputs, window_ancestors(batch), accepted, read_rows(state.conv, batch)[:, 0]
        )
        ssm = ssd_commit(window.factors, accepted, read_rows(state.ssm, batch)[:, 0])
        return MambaState(
            write_rows(state.conv, batch, conv[:, None]), write_rows(state.ssm, batch, ssm[:, None])
        )

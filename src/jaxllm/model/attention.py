"""Grouped-query attention mixer, full (``*``) or sliding window (``W``)."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.axes import Axis, Product
from jaxllm.batch import PackedBatch
from jaxllm.cache.state import AttentionState, read_kv, write_kv
from jaxllm.cache.window import AttentionWindow, accepted_nodes, read_committed, window_ancestors
from jaxllm.config import ModelConfig
from jaxllm.linear import Context
from jaxllm.model.layers import Linear, RMSNorm
from jaxllm.model.rope import apply_rope
from pallas_kernels.attention import attention, merge


class Attention(nnx.Module):
    """q, k, v projections, optional qk-norm and RoPE, attention by (segment, position), output projection."""

    def __init__(self, cfg: ModelConfig, *, window: int | None, rngs: nnx.Rngs):
        a = cfg.attention
        assert a is not None
        self.cfg = a
        self.sliding_window = window
        dtype = cfg.precision.param
        embed, head_dim = Axis("embed", cfg.hidden_size), Axis("head_dim", a.head_dim)
        kv_heads = Axis("kv_heads", a.num_kv_heads)
        group = Axis("q_heads_per_kv_head", a.num_heads // a.num_kv_heads)
        q, kv = Product("q", (kv_heads, group, head_dim)), Product("kv", (kv_heads, head_dim))
        project = partial(Linear, embed, bias=a.qkv_bias, std=cfg.init_std, dtype=dtype, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj = project(q), project(kv), project(kv)
        self.o_proj = Linear(q, embed, bias=a.out_bias, std=cfg.residual_std, dtype=dtype, rngs=rngs)
        norm = partial(RMSNorm, head_dim, eps=cfg.norm_eps, cast=cfg.norm_cast, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = (norm(), norm()) if a.qk_norm else (None, None)

    def _qkv(self, x: Array, batch: PackedBatch, ctx: Context) -> tuple[Array, Array, Array]:
        rows, length = batch.shape
        q_BTHd = self.q_proj(x, ctx).reshape(rows, length, -1, self.cfg.head_dim)
        k_BTKd = self.k_proj(x, ctx).reshape(rows, length, -1, self.cfg.head_dim)
        v_BTKd = self.v_proj(x, ctx).reshape(rows, length, -1, self.cfg.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHd, k_BTKd = self.q_norm(q_BTHd), self.k_norm(k_BTKd)
        if self.cfg.rope is not None:
            q_BTHd = apply_rope(q_BTHd, batch.positions, self.cfg.rope)
            k_BTKd = apply_rope(k_BTKd, batch.positions, self.cfg.rope)
        return q_BTHd, k_BTKd, v_BTKd

    def _out(self, y_BTHd: Array, ctx: Context) -> Array:
        rows, length = y_BTHd.shape[:2]
        return self.o_proj(y_BTHd.reshape(rows, length, -1), ctx)

    def __call__(
        self, x: Float[Array, "B T D"], batch: PackedBatch, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Training: the row's own keys and values."""
        q, k, v = self._qkv(x, batch, ctx)
        y = attention(
            q,
            k,
            v,
            q_positions=batch.positions,
            kv_positions=batch.positions,
            q_segment_ids=batch.segment_ids,
            kv_segment_ids=batch.segment_ids,
            window=self.sliding_window,
            operand_dtype=ctx.precision.operand,
            implementation=ctx.implementation,
        )
        return self._out(y, ctx), {}

    def extend(
        self, x: Float[Array, "B T D"], batch: PackedBatch, state: AttentionState, ctx: Context
    ) -> tuple[Float[Array, "B T D"], AttentionState, dict[str, Any]]:
        """Prefill chunk or decode: write this chunk's keys and values, then read the slots."""
        q, k, v = self._qkv(x, batch, ctx)
        state = write_kv(state, batch, k, v)
        k_BKLd, v_BKLd, kv_positions, kv_segment_ids = read_kv(state, batch, ctx.kv_bound)
        y = attention(
            q,
            k_BKLd,
            v_BKLd,
            q_positions=batch.positions,
            kv_positions=kv_positions,
            q_segment_ids=batch.segment_ids,
            kv_segment_ids=kv_segment_ids,
            window=self.sliding_window,
            kv_layout="BKTD",
            operand_dtype=ctx.precision.operand,
            implementation=ctx.implementation,
        )
        return self._out(y, ctx), state, {}

    def window(
        self, x: Float[Array, "B W D"], batch: PackedBatch, state: AttentionState, ctx: Context
    ) -> tuple[Float[Array, "B W D"], AttentionWindow, dict[str, Any]]:
        """Read on without writing: the slot's committed keys, and of the window's the node's own and its ancestors'."""
        q, k, v = self._qkv(x, batch, ctx)
        ancestors = window_ancestors(batch)
        k_BKLd, v_BKLd, kv_positions, kv_segment_ids = read_committed(state, batch, ancestors, ctx.kv_bound)
        # As the slot would keep them, so that a window sees what later tokens will see.
        k, v = k.astype(k_BKLd.dtype), v.astype(v_BKLd.dtype)
        attend = partial(
            attention,
            # The parts are merged before the output is rounded.
            q.astype(jnp.float32),
            q_positions=batch.positions,
            q_segment_ids=batch.segment_ids,
            window=self.sliding_window,
            operand_dtype=ctx.precision.operand,
            return_lse=True,
            implementation=ctx.implementation,
        )
        before = attend(
            k_BKLd, v_BKLd, kv_positions=kv_positions, kv_segment_ids=kv_segment_ids, kv_layout="BKTD"
        )
        within = attend(k, v, kv_positions=batch.positions, kv_segment_ids=batch.segment_ids, mask=ancestors)
        y, _ = merge(before, within)
        return self._out(y.astype(x.dtype), ctx), AttentionWindow(state, batch, k, v), {}

    def commit(self, window: AttentionWindow, path: Int[Array, "B m"], n: Int[Array, " B"]) -> AttentionState:
        """The accepted keys and values join their slot at their positions; past the capacity they are dropped."""
        accepted = accepted_nodes(window.batch, path, n)
        batch = window.batch.replace(segment_ids=accepted.astype(jnp.int32))
        return write_kv(window.state, batch, window.k, window.v)

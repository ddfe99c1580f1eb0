"""Grouped-query attention mixer, full (``*``) or sliding window (``W``)."""

from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.axes import Axis, Product
from jaxllm.batch import PackedBatch
from jaxllm.cache import attend
from jaxllm.cache.attend import AttentionState, AttentionWindow
from jaxllm.cache.options import AttendOptions
from jaxllm.cache.window import accepted_nodes
from jaxllm.config import ModelConfig
from jaxllm.linear import Context
from jaxllm.model.layers import Linear, RMSNorm
from jaxllm.model.rope import apply_rope
from pallas_kernels.attention import attention


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
        """Training: the row's own keys and values, or those of its documents wherever they are."""
        q, k, v = self._qkv(x, batch, ctx)
        options = {
            "window": self.sliding_window,
            "operand_dtype": ctx.precision.operand,
            "implementation": ctx.implementation,
        }
        if ctx.scattered is not None:
            y = ctx.scattered.attention(q, k, v, batch.segment_ids, batch.positions, **options)
            return self._out(y, ctx), {}
        y = attention(
            q,
            k,
            v,
            q_positions=batch.positions,
            kv_positions=batch.positions,
            q_segment_ids=batch.segment_ids,
            kv_segment_ids=batch.segment_ids,
            **options,
        )
        return self._out(y, ctx), {}

    def extend(
        self, x: Float[Array, "B T D"], batch: PackedBatch, state: AttentionState, ctx: Context
    ) -> tuple[Float[Array, "B T D"], AttentionState, dict[str, Any]]:
        """Prefill chunk or decode: the chunk joins its slots, and reads what they hold."""
        y, state, reports = attend.extend(state, *self._qkv(x, batch, ctx), batch, self._options(ctx))
        return self._out(y, ctx), state, reports

    def window(
        self, x: Float[Array, "B W D"], batch: PackedBatch, state: AttentionState, ctx: Context
    ) -> tuple[Float[Array, "B W D"], AttentionWindow, dict[str, Any]]:
        """Read on without writing: what the slot has committed, and of the window the node itself and its ancestors."""
        y, window = attend.window(state, *self._qkv(x, batch, ctx), batch, self._options(ctx))
        return self._out(y, ctx), window, {}

    def commit(self, window: AttentionWindow, path: Int[Array, "B m"], n: Int[Array, " B"]) -> AttentionState:
        """The accepted keys and values join their slot."""
        return attend.commit(window, accepted_nodes(window.batch, path, n))

    def _options(self, ctx: Context) -> AttendOptions:
        return AttendOptions(
            window=self.sliding_window,
            operand=ctx.precision.operand,
            implementation=ctx.implementation,
            bound=ctx.kv_bound,
            fresh=ctx.fresh,
            ended=ctx.ended,
            drafting=ctx.drafting,
            taps=ctx.taps,
        )

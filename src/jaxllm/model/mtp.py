"""Multi-token prediction: blocks that carry a hidden state one token further (Nemotron 3, arXiv 2512.20856).

Depth k = 1 .. K starts from the hidden state of depth k - 1 (depth 0 is the model's own, after its last norm) and the
embedding of the token k steps ahead, and gives the hidden state whose logits predict the token after that.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.axes import Axis, Concat, Product
from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig
from jaxllm.linear import Context
from jaxllm.model.layers import Linear, RMSNorm


class MTP(nnx.Module):
    """One prediction block; the embedding and the head are the model's."""

    def __init__(self, cfg: ModelConfig, blocks: Sequence[nnx.Module], *, rngs: nnx.Rngs):
        """Blocks are residual sub-blocks, one per letter of ``cfg.mtp.pattern``."""
        dtype = cfg.precision.param
        embed = Axis("embed", cfg.hidden_size)
        pair = Concat("eh_proj", (Product("embedding", (embed,)), Product("hidden", (embed,))))

        def norm() -> RMSNorm:
            return RMSNorm(embed, eps=cfg.norm_eps, cast=cfg.norm_cast, dtype=dtype, rngs=rngs)

        self.enorm, self.hnorm = norm(), norm()
        self.eh_proj = Linear(pair, embed, bias=False, std=cfg.init_std, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(list(blocks))
        self.final_layernorm = norm()

    def __call__(
        self, h: Float[Array, "B T D"], e: Float[Array, "B T D"], batch: PackedBatch, ctx: Context
    ) -> tuple[Float[Array, "B T D"], list[Array], list[dict[str, Any]]]:
        """The next depth's hidden states, normed; the residual states, and what each sub-block reports.

        Args:
            h: hidden states of the depth before, normed.
            e: embeddings of the tokens that this depth reads, at the positions of ``h``.
            batch: segments and positions; attention is causal over the positions of this depth.
            ctx: as everywhere.
        """
        u = self.eh_proj(jnp.concatenate([self.enorm(e), self.hnorm(h)], axis=-1), ctx)
        states, reports = [u], []
        for block in self.layers:
            u, aux = block(u, batch, ctx)
            states.append(u)
            reports.append(aux)
        return self.final_layernorm(u), states, reports

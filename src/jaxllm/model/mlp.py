"""Dense feed-forward blocks: squared ReLU (Nemotron-H) and SwiGLU (Llama, Qwen)."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.axes import Axis
from jaxllm.batch import PackedBatch
from jaxllm.config import MLPConfig, ModelConfig
from jaxllm.linear import Context
from jaxllm.model.layers import Linear


class MLP(nnx.Module):
    """``relu2``: down(relu(up x)^2); ``swiglu``: down(silu(gate x) * up x). ``mlp`` stands for ``cfg.mlp``."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, mlp: MLPConfig | None = None):
        mlp = mlp or cfg.mlp
        assert mlp is not None
        dtype = cfg.precision.param
        embed, hidden = Axis("embed", cfg.hidden_size), Axis("mlp", mlp.intermediate_size)
        project = partial(Linear, embed, hidden, bias=mlp.bias, std=cfg.init_std, dtype=dtype, rngs=rngs)
        self.gate_proj = project() if mlp.activation == "swiglu" else None
        self.up_proj = project()
        residual_std = cfg.init_std / len(cfg.pattern) ** 0.5
        self.down_proj = Linear(hidden, embed, bias=mlp.bias, std=residual_std, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], batch: PackedBatch, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        up = self.up_proj(x, ctx)
        if self.gate_proj is None:
            hidden = jax.numpy.square(jax.nn.relu(up))
        else:
            hidden = jax.nn.silu(self.gate_proj(x, ctx)) * up
        return self.down_proj(hidden, ctx), {}

    def extend(
        self, x: Float[Array, "B T D"], batch: PackedBatch, state: None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], None, dict[str, Any]]:
        """Keeps nothing between tokens."""
        y, aux = self(x, batch, ctx)
        return y, None, aux

    def window(
        self, x: Float[Array, "B W D"], batch: PackedBatch, state: None, ctx: Context
    ) -> tuple[Float[Array, "B W D"], None, dict[str, Any]]:
        """Keeps nothing."""
        return self.extend(x, batch, state, ctx)

    def commit(self, window: None, path: Int[Array, "B m"], n: Int[Array, " B"]) -> None:
        """Nothing was kept."""

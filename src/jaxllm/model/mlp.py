"""Dense feed-forward blocks: squared ReLU (Nemotron-H) and SwiGLU (Llama, Qwen)."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.axes import Axis
from jaxllm.batch import PackedBatch
from jaxllm.config import MLPConfig, ModelConfig
from jaxllm.linear import Context
from jaxllm.model.layers import Linear
from jaxllm.model.stateless import Stateless


class MLP(Stateless):
    """``relu2``: down(relu(up x)^2); ``swiglu``: down(silu(gate x) * up x). ``mlp`` stands for ``cfg.mlp``."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, mlp: MLPConfig | None = None):
        mlp = mlp or cfg.mlp
        assert mlp is not None
        dtype = cfg.precision.param
        embed, hidden = Axis("embed", cfg.hidden_size), Axis("mlp", mlp.intermediate_size)
        project = partial(Linear, embed, hidden, bias=mlp.bias, std=cfg.init_std, dtype=dtype, rngs=rngs)
        self.gate_proj = project() if mlp.activation == "swiglu" else None
        self.up_proj = project()
        self.down_proj = Linear(hidden, embed, bias=mlp.bias, std=cfg.residual_std, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], batch: PackedBatch, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        up = self.up_proj(x, ctx)
        if self.gate_proj is None:
            hidden = jax.numpy.square(jax.nn.relu(up))
        else:
            hidden = jax.nn.silu(self.gate_proj(x, ctx)) * up
        return self.down_proj(hidden, ctx), {}

"""Mixture of experts: a router, sparse experts (in a latent width, if asked for) and a shared one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.axes import Axis, Concat, Product
from jaxllm.batch import PackedBatch
from jaxllm.config import MLPConfig, ModelConfig, MoEConfig
from jaxllm.linear import Context, grouped_linear
from jaxllm.model.layers import Linear, parameter
from jaxllm.model.mlp import MLP
from jaxllm.model.stateless import Stateless
from pallas_kernels.grouped_matmul import Plan, from_experts, plan, to_experts
from pallas_kernels.precision import contract
from parallel.context.scattered import Scattered
from parallel.experts import AXIS, through_experts


class Router(nnx.Module):
    """Scores in float32; the correction bias takes part in the choice only (DeepSeek-V3, arXiv 2412.19437)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        assert cfg.moe is not None
        self.cfg = cfg.moe
        experts, embed = Axis("experts", cfg.moe.num_experts), Axis("embed", cfg.hidden_size)
        normal = jax.nn.initializers.normal(cfg.init_std)
        self.weight = parameter((embed, experts), normal, rngs, cfg.precision.param)
        # float32 whatever the precision: bfloat16 would lose its small steps.
        zeros = jax.nn.initializers.zeros
        self.e_score_correction_bias = (
            parameter((experts,), zeros, rngs, "float32") if cfg.moe.correction_bias else None
        )

    def _eligible(self, choice: Array) -> Array:
        """Scores to choose by, minus infinity outside the best groups."""
        m = self.cfg
        groups = choice.reshape(*choice.shape[:-1], m.n_groups, m.group_size)
        best = jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1)
        _, chosen = jax.lax.top_k(best, m.topk_groups)
        allowed = jnp.any(chosen[..., None] == jnp.arange(m.n_groups), axis=-2)
        return jnp.where(allowed[..., None], groups, -jnp.inf).reshape(choice.shape)

    def __call__(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T E"], Int[Array, "B T k"], Float[Array, "B T k"]]:
        """(shares of the experts, which add up to one; the chosen ones; their weights)."""
        m = self.cfg
        weight = self.weight[...].astype(jnp.float32)
        logits = contract("btd,de->bte", x.astype(jnp.float32), weight)
        scores = jax.nn.sigmoid(logits) if m.router == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        choice = jax.lax.stop_gradient(scores)
        if self.e_score_correction_bias is not None:
            choice = choice + jax.lax.stop_gradient(self.e_score_correction_bias[...])
        if m.n_groups > 1:
            choice = self._eligible(choice)
        _, ids = jax.lax.top_k(choice, m.top_k)
        weights = jnp.take_along_axis(scores, ids, axis=-1)
        if m.norm_topk:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        shares = scores if m.router == "softmax" else scores / jnp.sum(scores, axis=-1, keepdims=True)
        return shares, ids, weights * m.scaling


class Experts(nnx.Module):
    """E feed-forward blocks over sorted rows: ``relu2`` has ``up_proj``, ``swiglu`` the fused ``gate_up_proj``."""

    def __init__(self, cfg: ModelConfig, width: Axis, *, rngs: nnx.Rngs):
        m = cfg.moe
        assert m is not None
        dtype = cfg.precision.param
        experts, hidden = Axis("experts", m.num_experts), Axis("mlp", m.intermediate_size)
        normal = jax.nn.initializers.normal
        gated = m.activation == "swiglu"
        both = Concat("gate_up", (Product("gate", (hidden,)), Product("up", (hidden,))))
        first = parameter((experts, width, both if gated else hidden), normal(cfg.init_std), rngs, dtype)
        self.gate_up_proj, self.up_proj = (first, None) if gated else (None, first)
        # Written to the residual stream directly, or through a latent projection that is scaled down instead.
        residual = width.name == "embed"
        std = cfg.residual_std if residual else cfg.init_std
        self.down_proj = parameter((experts, hidden, width), normal(std), rngs, dtype)

    def __call__(self, x: Float[Array, "M D"], sizes: Int[Array, "E"], ctx: Context) -> Float[Array, "M D"]:
        def product(x: Array, w: nnx.Param) -> Array:
            return grouped_linear(x, w.get_value(), sizes, ctx)

        if self.up_proj is not None:
            hidden = jnp.square(jax.nn.relu(product(x, self.up_proj)))
        else:
            assert self.gate_up_proj is not None
            gate, up = jnp.split(product(x, self.gate_up_proj), 2, axis=-1)
            hidden = jax.nn.silu(gate) * up
        return product(hidden, self.down_proj)


class MoE(Stateless):
    """``fc2(sum of the chosen experts of fc1(x)) + shared(x)``; fc1, fc2 and the shared expert may be absent.

    Dropless: every token meets its ``top_k`` experts. Padding meets none and counts nowhere.

    Taps: ``expert_counts`` i32[E], tokens that each expert was chosen by; ``balance_sequence`` f32[B], the balance loss
    of each row; ``balance_batch`` f32[], that of all rows together (:func:`balance`).
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        m = cfg.moe
        assert m is not None
        self.cfg: MoEConfig = m
        embed, dtype = Axis("embed", cfg.hidden_size), cfg.precision.param
        self.gate = Router(cfg, rngs=rngs)
        width = embed if m.latent_size is None else Axis("latent", m.latent_size)
        linear = partial(Linear, bias=False, dtype=dtype, rngs=rngs)
        latent = m.latent_size is not None
        self.fc1_latent_proj = linear(embed, width, std=cfg.init_std) if latent else None
        self.fc2_latent_proj = linear(width, embed, std=cfg.residual_std) if latent else None
        self.experts = Experts(cfg, width, rngs=rngs)
        shared = m.shared_intermediate_size
        self.shared_experts = (
            None if shared is None else MLP(cfg, mlp=MLPConfig(shared, m.activation), rngs=rngs)
        )

    def _routed(self, x: Array, places: Plan, weights: Array, ctx: Context) -> Array:
        z = x if self.fc1_latent_proj is None else self.fc1_latent_proj(x, ctx)
        rows = to_experts(z.reshape(-1, z.shape[-1]), places)
        devices = 1 if ctx.placement is None else ctx.placement.size(AXIS)
        if ctx.placement is None or devices == 1:
            y = self.experts(rows, places.sizes, ctx)
        else:
            compute = partial(self.experts, ctx=ctx)
            room = ctx.placement.capacity
            y = through_experts(rows, places.sizes, compute, devices=devices, capacity=room)
        y = from_experts(y, weights.reshape(-1, self.cfg.top_k), places).reshape(z.shape)
        y = y if ctx.placement is None else ctx.placement.sum_tensor(y)
        return y if self.fc2_latent_proj is None else self.fc2_latent_proj(y, ctx)

    def __call__(
        self, x: Float[Array, "B T D"], batch: PackedBatch, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        m, valid = self.cfg, (batch.segment_ids > 0)[..., None]
        x = jnp.where(valid, x, 0)
        shares, ids, weights = self.gate(x)
        ids = jnp.where(valid, ids, m.num_experts)
        places = plan(ids.reshape(-1, m.top_k), m.num_experts)
        y = self._routed(x, places, weights, ctx)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x, batch, ctx)[0]
        reports = {
            "expert_counts": lambda: places.sizes,
            "balance_sequence": lambda: balance(jnp.where(valid, shares, 0), ids, scattered=ctx.scattered),
            "balance_batch": lambda: balance(
                jnp.where(valid, shares, 0).reshape(1, -1, m.num_experts),
                ids.reshape(1, -1, m.top_k),
                None if ctx.placement is None else ctx.placement.sum_rows,
            )[0],
        }
        return y, {name: report() for name, report in reports.items() if name in ctx.taps}


def balance(
    shares: Float[Array, "B T E"],
    ids: Int[Array, "B T k"],
    total: Callable[[Array], Array] | None = None,
    *,
    scattered: Scattered | None = None,
) -> Float[Array, " rows"]:
    """``E sum_e f_e P_e`` of each row: 1 where all experts are chosen equally often, E / k where the same k always are.

    f_e is the share of the choices that fell on e, P_e the mean share that the router gave it. Sources: Switch (arXiv
    2101.03961), over a batch; DeepSeek-V3 (2412.19437), over each sequence. Gradients go through P.

    Args:
        shares: of the router, zero at padding.
        ids: chosen experts; E at padding.
        total: sums over the devices that have other tokens of the same rows; None: all are here.
        scattered: tokens of B slots belong to other rows, of which other devices have more.
    """
    rows, _, experts = shares.shape
    k = ids.shape[-1]
    if scattered is not None:
        chosen = jnp.sum(jax.nn.one_hot(ids, experts, dtype=jnp.int32), axis=2)
        counts, shared = scattered.sum_group((scattered.by_row(chosen), scattered.by_row(shares)))
    else:
        place = ids + jnp.arange(rows)[:, None, None] * (experts + 1)
        counts = jnp.bincount(place.reshape(-1), length=rows * (experts + 1))
        counts, shared = counts.reshape(rows, experts + 1)[:, :experts], jnp.sum(shares, axis=1)
    if total is not None:
        counts, shared = total(counts), total(shared)
    # A row without tokens has no loss.
    tokens = jnp.maximum(jnp.sum(counts, axis=1) / k, 1)
    return experts / k * jnp.sum(counts * shared, axis=1) / jnp.square(tokens)

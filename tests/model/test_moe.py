"""Mixture of experts: the router against NumPy, the layer against every expert computed, padding, taps, balance."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.batch import PackedBatch
from jaxllm.config import MambaConfig, ModelConfig, MoEConfig
from jaxllm.linear import Context
from jaxllm.model.functional import init_params, merge
from jaxllm.model.moe import MoE, balance

D, B, T = 12, 3, 7
MOE = MoEConfig(num_experts=8, top_k=3, intermediate_size=10, scaling=2.5)
VARIANTS = {
    "plain": MOE,
    "groups": replace(MOE, n_groups=4, topk_groups=2),
    "softmax": replace(MOE, router="softmax", correction_bias=False, norm_topk=False, scaling=1.0),
    "gated": replace(MOE, activation="swiglu", norm_topk=False),
    "shared and latent": replace(MOE, shared_intermediate_size=14, latent_size=5),
    "all": replace(MOE, top_k=8),
}


def config(moe: MoEConfig) -> ModelConfig:
    return ModelConfig(vocab_size=8, hidden_size=D, pattern="E", moe=moe)


def layer(moe: MoEConfig) -> MoE:
    """Parameters away from their small initial values."""
    module = MoE(config(moe), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    _, state = nnx.split(module, nnx.Param)
    moved = jax.tree.map(lambda v: v + 0.5 * rng.standard_normal(v.shape).astype(np.float32), state)
    nnx.update(module, moved)
    return module


def inputs(seed: int = 0) -> tuple[np.ndarray, PackedBatch]:
    """Two documents, padding on the left and on the right, one row of padding."""
    x = np.random.default_rng(seed).standard_normal((B, T, D)).astype(np.float32)
    segments = np.array([[0, 1, 1, 1, 2, 2, 0], [1] * 7, [0] * 7], np.int32)
    return x, PackedBatch(np.zeros((B, T), np.int32), segments, np.zeros((B, T), np.int32))


def by_hand(module: MoE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One token in float64, as transformers' loops have it: (output, chosen experts)."""
    m = module.cfg
    value = lambda p: np.asarray(p[...], np.float64)  # noqa: E731
    logits = x @ value(module.gate.weight)
    scores = 1 / (1 + np.exp(-logits)) if m.router == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    bias = module.gate.e_score_correction_bias
    choice = scores + (0 if bias is None else value(bias))
    groups = choice.reshape(m.n_groups, -1)
    best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(1))[: m.topk_groups]
    masked = np.full_like(groups, -np.inf)
    masked[best] = groups[best]
    ids = np.argsort(-masked.reshape(-1))[: m.top_k]
    weights = scores[ids]
    weights = m.scaling * (weights / weights.sum() if m.norm_topk else weights)

    def act(up: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
        return np.maximum(up, 0) ** 2 if gate is None else gate / (1 + np.exp(-gate)) * up

    z = x if module.fc1_latent_proj is None else x @ value(module.fc1_latent_proj.weight)
    y = np.zeros_like(z)
    for e, weight in zip(ids, weights):
        if module.experts.up_proj is not None:
            hidden = act(z @ value(module.experts.up_proj)[e], None)
        else:
            gate, up = np.split(z @ value(module.experts.gate_up_proj)[e], 2)
            hidden = act(up, gate)
        y = y + weight * (hidden @ value(module.experts.down_proj)[e])
    y = y if module.fc2_latent_proj is None else y @ value(module.fc2_latent_proj.weight)
    shared = module.shared_experts
    if shared is not None:
        gate = None if shared.gate_proj is None else x @ value(shared.gate_proj.weight)
        y = y + act(x @ value(shared.up_proj.weight), gate) @ value(shared.down_proj.weight)
    return y, ids


@pytest.mark.parametrize("name", VARIANTS)
def test_every_token_meets_its_experts(name: str) -> None:
    """Outputs and counts; padding, whatever it holds, changes neither."""
    module = layer(VARIANTS[name])
    x, batch = inputs()
    ctx = Context(taps=frozenset({"expert_counts"}))
    run = jax.jit(lambda x: module(x, batch, ctx))
    y, aux = run(x)
    counts = np.zeros(8, int)
    for row, column in np.argwhere(batch.segment_ids > 0):
        expected, ids = by_hand(module, x[row, column].astype(np.float64))
        np.testing.assert_allclose(y[row, column], expected, rtol=2e-4, atol=2e-4)
        counts[ids] += 1
    np.testing.assert_array_equal(aux["expert_counts"], counts)
    poisoned = np.where((batch.segment_ids > 0)[..., None], x, np.nan)
    again, aux = run(poisoned)
    np.testing.assert_array_equal(again, y)
    np.testing.assert_array_equal(aux["expert_counts"], counts)


def test_padding_reaches_no_gradient() -> None:
    module = layer(VARIANTS["shared and latent"])
    x, batch = inputs()
    valid = (batch.segment_ids > 0)[..., None]
    graph, params = nnx.split(module, nnx.Param)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y, _ = nnx.merge(graph, params)(x, batch, Context())
        return jnp.sum(jnp.where(valid, y, 0) ** 2)

    run = jax.jit(jax.grad(loss, (0, 1)))
    clean, poisoned = run(params, x), run(params, np.where(valid, x, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean[0], poisoned[0])
    np.testing.assert_array_equal(poisoned[1], np.where(valid, clean[1], 0))
    # The choice has no gradient, the weights of the chosen have.
    assert not np.any(clean[0]["gate"]["e_score_correction_bias"][...])
    _, ids, _ = module.gate(jnp.asarray(x))
    chosen = np.unique(np.asarray(ids)[valid[..., 0]])
    np.testing.assert_array_equal(np.flatnonzero(np.any(clean[0]["gate"]["weight"][...], axis=0)), chosen)


def test_a_latent_width_of_the_hidden_size_with_identities_is_the_plain_layer() -> None:
    plain, latent = layer(MOE), layer(replace(MOE, latent_size=D))
    for name in ("gate", "experts"):
        nnx.update(getattr(latent, name), nnx.state(getattr(plain, name), nnx.Param))
    for projection in (latent.fc1_latent_proj, latent.fc2_latent_proj):
        projection.weight.set_value(jnp.eye(D))
    x, batch = inputs()
    wanted, got = jax.jit(lambda x: [module(x, batch, Context())[0] for module in (plain, latent)])(x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_taps_are_stacked_over_the_layers_that_know_them() -> None:
    cfg = ModelConfig(11, D, "EMEE", mamba=MambaConfig(2, 6, 8), moe=MOE)
    batch = PackedBatch.from_rows(np.arange(20).reshape(2, 10) % 11, lengths=[10, 4])
    params = init_params(cfg)

    def tapped(names: tuple[str, ...], remat: str = "none") -> Any:
        model = merge(cfg, params)
        return jax.jit(lambda: model.hidden(batch, model.context(taps=frozenset(names), remat=remat)))()[1]

    aux = tapped(("expert_counts", "balance_sequence", "balance_batch", "hidden"))
    assert aux["expert_counts"].shape == (3, 8) and aux["hidden"].shape == (5, 2, 10, D)
    np.testing.assert_array_equal(jnp.sum(aux["expert_counts"], axis=1), [14 * 3] * 3)
    assert aux["balance_sequence"].shape == (3, 2) and aux["balance_batch"].shape == (3,)
    np.testing.assert_array_equal(tapped(("expert_counts",), "layer")["expert_counts"], aux["expert_counts"])
    assert tapped(()) == {}
    with pytest.raises(ValueError, match=r"taps=\['expert_count'\]: no layer"):
        tapped(("expert_count",))


def test_balance_is_one_at_an_even_load_and_its_most_when_the_same_experts_are_always_chosen() -> None:
    shares = jnp.full((2, 4, 8), 1 / 8)
    ids = jnp.stack([jnp.arange(8).reshape(4, 2), jnp.zeros((4, 2), int) + jnp.arange(2)])
    np.testing.assert_allclose(balance(shares, ids), [1, 1], rtol=1e-6)
    certain = jnp.zeros((2, 4, 8)).at[..., :2].set(0.5)
    np.testing.assert_allclose(balance(certain, ids), [1, 8 / 2], rtol=1e-6)
    # Half of the tokens are padding, in the second row all.
    ids = jnp.stack([jnp.array([[0, 1], [2, 3], [8, 8], [8, 8]]), jnp.full((4, 2), 8)])
    shares = jnp.where((ids < 8).all(-1)[..., None], jnp.full((2, 4, 8), 1 / 8), 0)
    np.testing.assert_allclose(balance(shares, ids), [1, 0], rtol=1e-6)


def test_bfloat16_keeps_the_router_in_float32() -> None:
    """Two experts whose scores bfloat16 cannot tell apart."""
    module = layer(replace(MOE, top_k=1, correction_bias=False))
    weight = np.zeros((D, 8), np.float32)
    weight[0, 3], weight[0, 5] = 1.0, 1.001
    module.gate.weight.set_value(jnp.asarray(weight))
    _, ids, _ = module.gate(jnp.ones((1, 1, D), jnp.bfloat16))
    assert int(ids[0, 0, 0]) == 5

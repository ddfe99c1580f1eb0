"""JetBlock against a float64 loop of its formula, and what its initialisation promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.batch import PackedBatch
from jaxllm.config import JetConfig, ModelConfig
from jaxllm.linear import Context
from jaxllm.model.jet import Jet
from tests.model.mixer_cases import QUICK, build

JET = JetConfig(2, key_head_dim=5, value_head_dim=6, generator_reduction=3, chunk_size=8, norm_eps=1e-3)
CFG = ModelConfig(16, 10, "J", jet=JET)
LENGTH = 21


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter away from its initial value, float64."""
    rng = np.random.default_rng(seed)
    flat = nnx.to_flat_state(nnx.eval_shape(lambda: nnx.state(Jet(CFG, rngs=nnx.Rngs(0)), nnx.Param)))
    return {
        ".".join(map(str, path)): rng.standard_normal(v.shape) * (0.6 if len(v.shape) == 2 else 0.9)
        for path, v in flat
    }


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def by_hand(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """One document, section 2 of the paper's sheet, token by token."""
    H, dk, dv, k = JET.num_heads, JET.key_head_dim, JET.value_head_dim, JET.conv_kernel
    u = np.concatenate([np.zeros((k - 1, H * dv)), x @ w["v_proj.weight"]])
    S, out = np.zeros((H, dk, dv)), []
    for t, token in enumerate(x):
        q, key = (silu(token @ w[f"{n}_proj.weight"]).reshape(H, dk) for n in "qk")
        q = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6) / np.sqrt(dk)
        key = key / np.sqrt((key * key).sum(-1, keepdims=True) + 1e-6)
        hidden = silu(token @ w["generator.w1.weight"])
        kernel = (hidden @ w["generator.w2.weight"] + w["generator.w2.bias"]).reshape(k, H * dv)
        v = silu(np.sum(kernel * u[t : t + k], axis=0)).reshape(H, dv)
        beta = 1 / (1 + np.exp(-token @ w["b_proj.weight"]))
        g = -np.exp(w["A_log"]) * np.log1p(np.exp(token @ w["a_proj.weight"] + w["dt_bias"]))
        S = np.exp(g)[:, None, None] * S
        write = beta[:, None] * (v - np.einsum("hkv,hk->hv", S, key))
        S = S + key[..., None] * write[:, None]
        o = np.einsum("hkv,hk->hv", S, q)
        o = o / np.sqrt((o * o).mean(-1, keepdims=True) + JET.norm_eps) * w["o_norm.weight"]
        o = o * silu(token @ w["g_proj.weight"]).reshape(H, dv)
        out.append(o.reshape(-1) @ w["o_proj.weight"])
    return np.stack(out)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_block_is_its_formula(implementation):
    w = weights()
    mixer = build(Jet, CFG, {name: v.astype(np.float32) for name, v in w.items()})
    x = np.random.default_rng(1).standard_normal((2, LENGTH, CFG.hidden_size)).astype(np.float32)
    batch = PackedBatch.from_rows(jnp.zeros(x.shape[:2], jnp.int32))
    run = jax.jit(
        lambda x: mixer(x, batch, Context(implementation=implementation))[0], compiler_options=QUICK
    )
    expected = np.stack([by_hand(w, row.astype(np.float64)) for row in x])
    np.testing.assert_allclose(run(x), expected, rtol=0, atol=2e-5 * expected.std())


def test_the_fresh_block_is_a_static_convolution_whose_generator_learns():
    """Where w1 and w2 were both zero, neither would ever have a gradient."""
    mixer = Jet(CFG, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 5, CFG.hidden_size))
    taps = mixer.generator(x, Context())
    np.testing.assert_array_equal(taps, jnp.broadcast_to(taps[:, :1], taps.shape))
    assert np.abs(taps).max() > 0
    batch = PackedBatch.from_rows(jnp.zeros((1, 5), jnp.int32))
    graph, params = nnx.split(mixer, nnx.Param)
    gradient = jax.jit(
        jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(x, batch, Context())[0] ** 2)), compiler_options=QUICK
    )(params)
    assert np.abs(gradient.generator.w2.weight.get_value()).max() > 0

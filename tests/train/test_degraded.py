"""Gradients of who does two jobs, of whole models, against projections of the exact ones and constants for what is skipped."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ConfigError
from jaxllm.linear import Weight
from jaxllm.model.functional import flatten, merge
from jaxllm.train.degraded import POLICY, Degraded, LowRankGrad, letter_of, make_refresh, ranks
from jaxllm.train.failover import FailoverSettings
from jaxllm.train.loss import cross_entropy
from jaxllm.train.step import StepSettings, batch_loss, gradients
from tests.train.sharded_worker import model, scattered
from tests.train.tiny import tiny_batch

SETTINGS = StepSettings(loss_chunk=64)
LOW_RANK = dict.fromkeys(POLICY, "low_rank")


@lru_cache
def prepared(pattern: str, **changes):
    """(config, parameters, batch, exact gradients by dotted path)."""
    cfg = model(pattern, **changes)
    params, batch = scattered(cfg), jax.tree.map(jnp.asarray, tiny_batch(4, 16, vocab=64))
    exact, _ = jax.jit(lambda p, b: gradients(cfg, p, b, SETTINGS))(params, batch)
    return cfg, params, batch, flatten(exact)


def degraded_gradients(cfg, params, batch, policy, rank, skipped=frozenset(), recompute=True):
    bases = make_refresh(cfg, policy, rank)(params)

    def take(params, batch, bases):
        return gradients(cfg, params, batch, SETTINGS, degraded=Degraded(skipped, bases, recompute))

    found, sums = jax.jit(take)(params, batch, bases)
    return flatten(found), bases, sums


def projected(exact, bases):
    """Exact gradients, and of those that have a basis their projection, in float64."""
    found = {}
    for name, gradient in exact.items():
        found[name] = np.asarray(gradient, np.float64)
        if name in bases:
            v = np.asarray(bases[name], np.float64)
            found[name] = np.einsum("...ir,...jr,...jo->...io", v, v, found[name])
    return found


def assert_close(ours, theirs, tolerance=2e-5):
    for name, expected in theirs.items():
        limit = tolerance * max(np.max(np.abs(expected)), 1e-6)
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=limit, err_msg=name)


def check_projection(pattern: str, **changes) -> None:
    cfg, params, batch, exact = prepared(pattern, **changes)
    ours, bases, _ = degraded_gradients(cfg, params, batch, LOW_RANK, 5)
    expected = projected(exact, bases)
    assert_close(ours, expected)
    for name in bases:
        lost = np.linalg.norm(expected[name] - exact[name]) / np.linalg.norm(exact[name])
        assert lost > 0.1, name


def test_gradients_are_projections_of_the_exact_ones():
    check_projection("-")


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param("M*", marks=pytest.mark.nightly),
        pytest.param("E", marks=pytest.mark.slow),
        pytest.param("GWJ", marks=pytest.mark.nightly),
    ],
)
def test_gradients_of_every_letter_are_projections(pattern):
    check_projection(pattern)


@pytest.mark.nightly
def test_gradients_of_stacked_layers_are_projections():
    check_projection("ME-ME-", scan_layers=True)


@pytest.mark.slow
def test_skipped_blocks_are_constants():
    """Against a loop over the blocks in which what a skipped one gives is a number."""
    cfg, params, batch, _ = prepared("*-")
    ours, _, sums = degraded_gradients(
        cfg, params, batch, dict.fromkeys(POLICY, "exact"), None, frozenset("*")
    )
    ctx = merge(cfg, params).context(taps=frozenset({"hidden"}))
    _, aux = jax.jit(lambda p: merge(cfg, p).hidden(batch, ctx))(params)
    branch = aux["hidden"][1] - aux["hidden"][0]

    def objective(params):
        lm, ctx = merge(cfg, params), merge(cfg, params).context()
        h = lm.embed(batch.tokens, ctx) + branch
        h, _ = lm.layers[1](h, batch, ctx)
        w = lm.lm_head.weight.get_value()
        return cross_entropy(lm.norm_f(h), w, batch.targets[..., 0], batch.loss_mask, tied=False)[0]

    value, expected = jax.jit(jax.value_and_grad(objective))(params)
    assert_close(ours, flatten(expected))
    np.testing.assert_allclose(sums.nats, value, rtol=1e-6)
    of_block = [name for name in ours if letter_of(cfg, name) == "*"]
    assert len(of_block) > 4 and not any(np.any(ours[name]) for name in of_block)


def test_all_of_the_rank_is_the_exact_gradient():
    cfg, params, batch, exact = prepared("-")
    ours, bases, _ = degraded_gradients(cfg, params, batch, LOW_RANK, "full")
    assert all(v.shape[-1] == v.shape[-2] for v in bases.values()) and len(bases) == 2
    assert_close(ours, exact, 1e-5)


def test_degraded_gradients_keep_less():
    cfg, params, batch, _ = prepared("*-")

    def kept(degraded):
        def residuals(params):
            _, back = jax.vjp(lambda p: batch_loss(cfg, p, batch, SETTINGS, degraded=degraded)[0], params)
            return jax.tree.leaves(back)

        return sum(x.size for x in jax.eval_shape(residuals, params))

    everything = kept(None)
    shapes = flatten(params)
    bases = {name: jnp.ones((*shapes[name].shape[:-1], r)) for name, r in ranks(cfg, POLICY, None).items()}
    skip = kept(Degraded(frozenset("*"), {}, recompute=False))
    both = kept(Degraded(frozenset("*"), bases, recompute=True))
    # What no rule touches: the head's gradient, which is taken forwards, and the parameters themselves.
    assert both < skip < everything
    tokens = batch.tokens.size
    assert everything - both > tokens * (cfg.mlp.intermediate_size + 2 * cfg.hidden_size)


def test_ranks():
    cfg = model("M*-E", hidden_size=64)
    found = ranks(cfg, POLICY, None)
    assert set(found.values()) == {4} and not any(".1.mixer" in name for name in found)
    assert {name.split("mixer.")[1] for name in found if ".3." in name} == {
        "experts.gate_up_proj",
        "experts.down_proj",
        "fc1_latent_proj.weight",
        "fc2_latent_proj.weight",
        "shared_experts.gate_proj.weight",
        "shared_experts.up_proj.weight",
        "shared_experts.down_proj.weight",
    }
    assert {name.split("mixer.")[1] for name in ranks(model("J"), POLICY, None)} == {
        f"{name}_proj.weight" for name in "qkvgo"
    }
    with pytest.raises(ConfigError, match=r"failover.rank=17: must be at most 16, the inputs of layers\.3"):
        ranks(cfg, POLICY, 17)


def test_weights_know_what_they_are():
    cfg, params, _, _ = prepared("-")
    name = "layers.0.mixer.up_proj.weight"
    shape = flatten(params)[name].shape
    weights = Degraded(frozenset(), {name: jnp.ones((shape[0], 5))}, True).weights(cfg, params)
    weight = merge(cfg, weights).layers[0].mixer.up_proj.weight.get_value()
    assert isinstance(weight, LowRankGrad) and isinstance(weight, Weight) and weight.logical_shape == shape
    assert [axis.name for axis in weight.axes()] == ["embed", "mlp"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(rank="all"), r'failover.rank=\'all\': must be an integer, "full" or None'),
        (dict(rank=0), r"failover.rank=0: must be an integer of at least 1"),
        (dict(refresh=0), r"failover.refresh=0"),
        (dict(policy={"X": "skip"}), r"failover.policy='X': letters are M, \*, W"),
        (dict(policy={"M": "drop"}), r"failover.policy\['M'\]='drop': skip, low_rank or exact"),
        (dict(policy={"-": "skip"}), r"failover.policy\['-'\]='skip': feed-forward blocks are not skipped"),
    ],
)
def test_bad_settings_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        FailoverSettings(**given)


def test_a_model_of_nothing_but_skipped_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"pattern='\*\*' would have no gradient"):
        FailoverSettings().skipped(model("**"))

"""The chunked loss against the plain one, its gradients and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import Precision
from jaxllm.train.loss import cross_entropy


def plain(h, w, targets, mask, tied, z_loss):
    logits = jnp.einsum("btd,vd->btv" if tied else "btd,dv->btv", h, w, precision="highest")
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    weights = jnp.where(targets >= 0, mask, 0)
    z = jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(weights * (nats + z_loss * z))


def inputs(rows, length, width, vocab, tied, seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    h = jax.random.normal(keys[0], (rows, length, width))
    w = jax.random.normal(keys[1], (vocab, width) if tied else (width, vocab))
    targets = jax.random.randint(keys[2], (rows, length), -1, vocab)
    return h, w, targets, jax.random.uniform(keys[3], (rows, length))


@settings(max_examples=4)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 13),
    vocab=st.integers(2, 40),
    chunk=st.integers(1, 40),
    tied=st.booleans(),
    z_loss=st.sampled_from([0.0, 0.1]),
)
def test_equals_plain_cross_entropy(rows, length, vocab, chunk, tied, z_loss):
    h, w, targets, mask = inputs(rows, length, 8, vocab, tied, length)

    def chunked(h, w):
        return 0.5 * cross_entropy(h, w, targets, mask, tied=tied, z_loss=z_loss, chunk=chunk)[0]

    value, grads = jax.value_and_grad(chunked, argnums=(0, 1))(h, w)
    expected, expected_grads = jax.value_and_grad(
        lambda h, w: 0.5 * plain(h, w, targets, mask, tied, z_loss), (0, 1)
    )(h, w)
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_sums():
    h, w, targets, mask = inputs(2, 7, 8, 11, True, 0)
    objective, sums = cross_entropy(h, w, targets, mask, tied=True, z_loss=0.25, chunk=3)
    logits = h @ w.T
    weights = jnp.where(targets >= 0, mask, 0)
    np.testing.assert_allclose(sums.weight, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.correct, jnp.sum(weights * (logits.argmax(-1) == targets)), rtol=1e-6)
    np.testing.assert_allclose(objective, sums.nats + 0.25 * sums.z, rtol=1e-6)
    np.testing.assert_allclose(sums.nats, plain(h, w, targets, mask, True, 0.0), rtol=1e-5)


def test_bfloat16_operands_stay_close():
    h, w, targets, mask = inputs(2, 16, 32, 50, True, 1)
    low = Precision(matmul="bfloat16")
    exact = jax.grad(lambda h: cross_entropy(h, w, targets, mask, tied=True)[0])(h)
    rounded = jax.grad(lambda h: cross_entropy(h, w, targets, mask, tied=True, precision=low)[0])(h)
    error = jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)
    assert 1e-5 < error < 3e-2


def test_all_masked_is_zero_with_zero_gradient():
    h, w, targets, mask = inputs(1, 5, 8, 11, True, 2)
    none = jnp.full_like(targets, -1)
    value, grad = jax.value_and_grad(lambda h: cross_entropy(h, w, none, mask, tied=True)[0])(h)
    assert float(value) == 0.0
    assert not np.any(grad)


@pytest.mark.parametrize("tied", [True, False])
def test_peak_memory_is_far_below_the_logits(tied):
    rows, length, width, vocab = 4, 256, 32, 2048
    h, w, targets, mask = inputs(rows, length, width, vocab, tied, 0)
    full = rows * length * vocab * 4

    def temporary(fn):
        return (
            jax.jit(jax.grad(fn, argnums=(0, 1))).lower(h, w).compile().memory_analysis().temp_size_in_bytes
        )

    ours = temporary(lambda h, w: cross_entropy(h, w, targets, mask, tied=tied, chunk=64)[0])
    assert ours < full / 4
    # The comparison is worth something only if the plain loss does need its logits.
    assert temporary(lambda h, w: plain(h, w, targets, mask, tied, 0.0)) > full


def test_wrong_arguments():
    h, w, targets, mask = inputs(1, 5, 8, 11, True, 2)
    with pytest.raises(ValueError, match="chunk=0"):
        cross_entropy(h, w, targets, mask, tied=True, chunk=0)
    with pytest.raises(ValueError, match=r"tied=False; expected \[D, V\]"):
        cross_entropy(h, w, targets, mask, tied=False)

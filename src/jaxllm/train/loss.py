"""Cross-entropy in chunks of the sequence: the logits of all tokens never exist at once.

The gradient is taken in the forward pass, while a chunk's logits are at hand: a loss is a weighted sum, so its
gradient is known up to one scalar before backward starts. That costs three products of [tokens, D, V] instead of the
four of a rematerialised head, and backward only scales. Without differentiation no gradient is computed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import Precision
from pallas_kernels.materialise import hold
from pallas_kernels.precision import contract

# Tokens per chunk: float32 logits of a chunk take chunk * V * 4 bytes. On CPU (V = 4096) 256 and 512 stay in cache and
# take a quarter less time than 1024; accelerators want the larger product.
CHUNK = 512


class LossSums(NamedTuple):
    """Sums over the tokens of a batch; divide by ``weight`` for means.

    Attributes:
        nats: f32[]; weighted sum of -log p(target).
        weight: f32[]; sum of the weights of the scored tokens.
        z: f32[]; weighted sum of logsumexp(logits)^2.
        correct: f32[]; weighted count of targets that were the arg max.
        mtp: f32[]; weighted sum of the mean loss of the multi-token prediction depths.
        routing: :class:`jaxllm.train.balance.Routing` of a model with experts.
    """

    nats: Array
    weight: Array
    z: Array
    correct: Array
    mtp: Array
    routing: Any = None


class _Spec(NamedTuple):
    """Static settings of one call; the einsums depend on the layout of the head."""

    logits: str
    grad_hidden: str
    grad_weight: str
    operand: str | None
    axis: str | None

    def over(self, collective: Any, x: Array) -> Array:
        """``x`` reduced over the devices that share the vocabulary."""
        return x if self.axis is None else collective(x, self.axis)

    def first(self, entries: int) -> Any:
        """The first of the ``entries`` of the vocabulary that this device has."""
        return 0 if self.axis is None else jax.lax.axis_index(self.axis) * entries


def _spec(tied: bool, operand: str | None, axis: str | None) -> _Spec:
    w = "vd" if tied else "dv"
    grad_weight = "btv,btd->vd" if tied else "btd,btv->dv"
    return _Spec(f"btd,{w}->btv", f"btv,{w}->btd", grad_weight, operand, axis)


def _score(spec, logits_BCV, targets_BC, weights_BC, kept=lambda v: v):
    """Sums of one chunk, its logsumexp, exp(logits - max) and the sum of that."""
    top = spec.over(jax.lax.pmax, jnp.max(logits_BCV, axis=-1))
    e_BCV = kept(jnp.exp(logits_BCV - top[..., None]))
    total = spec.over(jax.lax.psum, jnp.sum(e_BCV, axis=-1))
    lse = top + jnp.log(total)
    entries = logits_BCV.shape[-1]
    place = jnp.maximum(targets_BC, 0) - spec.first(entries)
    picked = jnp.take_along_axis(logits_BCV, jnp.clip(place, 0, entries - 1)[..., None], axis=-1)[..., 0]
    if spec.axis is not None:
        picked = jax.lax.psum(jnp.where((place >= 0) & (place < entries), picked, 0), spec.axis)
    sums = LossSums(
        nats=jnp.sum(weights_BC * (lse - picked)),
        weight=jnp.sum(weights_BC),
        z=jnp.sum(weights_BC * jnp.square(lse)),
        correct=jnp.sum(weights_BC * (picked >= top)),
        mtp=jnp.zeros((), jnp.float32),
    )
    return sums, lse, e_BCV, total


def _zero_sums() -> LossSums:
    zero = jnp.zeros((), jnp.float32)
    return LossSums(zero, zero, zero, zero, zero)


def _value(spec, z_loss, chunks, w):
    def step(total, chunk):
        h_BCD, targets, weights = chunk
        logits = contract(spec.logits, h_BCD, w, operand_dtype=spec.operand)
        sums, *_ = _score(spec, logits, targets, weights)
        return jax.tree.map(jnp.add, total, sums), None

    sums, _ = jax.lax.scan(step, _zero_sums(), chunks)
    return sums.nats + z_loss * sums.z, sums


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(spec: _Spec, z_loss: float, chunks, w):
    return _value(spec, z_loss, chunks, w)


def _loss_fwd(spec, z_loss, chunks, w):
    def step(carry, chunk):
        total, dw = carry
        h_BCD, targets, weights = chunk
        logits = contract(spec.logits, h_BCD, w, operand_dtype=spec.operand)
        # Held: XLA:CPU would take every exponential a second time for the gradient.
        sums, lse, e, sum_e = _score(spec, logits, targets, weights, hold)
        scale = hold(weights * (1 + 2 * z_loss * lse) / sum_e)
        place = targets - spec.first(logits.shape[-1])
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == place[..., None]
        dlogits = e * scale[..., None] - jnp.where(hit, weights[..., None], 0)
        dh = contract(spec.grad_hidden, dlogits, w, operand_dtype=spec.operand, out_dtype=h_BCD.dtype)
        pair = (dlogits, h_BCD) if spec.grad_weight.startswith("btv") else (h_BCD, dlogits)
        dw = dw + contract(spec.grad_weight, *pair, operand_dtype=spec.operand)
        return (jax.tree.map(jnp.add, total, sums), dw), dh

    start = (_zero_sums(), jnp.zeros(w.shape, jnp.float32))
    (sums, dw), dh = jax.lax.scan(step, start, chunks)
    return (sums.nats + z_loss * sums.z, sums), (dh, dw, jnp.zeros((0,), w.dtype))


def _loss_bwd(spec, z_loss, residuals, cotangents):
    # The sums are reported, not trained on: only the objective carries a gradient.
    dh, dw, w_like = residuals
    # Of each device's objective, of which this device's logits are a part; its own dh is a part of the sum.
    g = spec.over(jax.lax.psum, cotangents[0])
    return (dh * g.astype(dh.dtype), None, None), (dw * g).astype(w_like.dtype)


_loss.defvjp(_loss_fwd, _loss_bwd)


def _chunked(x: Array, count: int, size: int) -> Array:
    """[B, T, ...] to [count, B, size, ...], zero padded: chunks cut the sequence, so sharded rows stay sharded."""
    rows, length = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(rows, count, size, *x.shape[2:]).swapaxes(0, 1)


def cross_entropy(
    h: Float[Array, "B T D"],
    w: Float[Array, "_ _"],
    targets: Int[Array, "B T"],
    loss_mask: Float[Array, "B T"] | None = None,
    *,
    tied: bool,
    z_loss: float = 0.0,
    precision: Precision | None = None,
    chunk: int = CHUNK,
    axis: str | None = None,
) -> tuple[Float[Array, ""], LossSums]:
    """Summed next-token loss ``nats + z_loss * z`` and its parts; float32.

    Sources: z-loss, arXiv 2204.02311; chunked heads, arXiv 2410.10989.

    Args:
        h: final hidden states.
        w: head weights: the embedding table [V, D] if ``tied``, else [D, V].
        targets: token to predict at each position; -1 is none.
        loss_mask: weight of each position; None: 1.
        tied: layout of ``w``.
        z_loss: weight of logsumexp^2.
        precision: dtypes of the products; None: those of the operands.
        chunk: tokens whose logits exist at once (at least one of each row).
        axis: mesh axis whose devices share the vocabulary, in order; ``w`` is then this device's share of it, and
            gradients are those of the sum of the devices' objectives.

    Raises:
        ValueError: ``chunk`` or a shape is not as above.
    """
    rows, length, width = h.shape
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1 token")
    if w.shape[1 if tied else 0] != width:
        layout = "[V, D]" if tied else "[D, V]"
        raise ValueError(f"w: shape {w.shape} with tied={tied}; expected {layout} with D = {width}")
    operand = (precision or Precision()).operand
    weights = jnp.ones((rows, length), jnp.float32) if loss_mask is None else loss_mask.astype(jnp.float32)
    weights = jnp.where(targets >= 0, weights, 0.0)
    count = min(length, -(-rows * length // chunk))
    size = -(-length // count)
    chunks = tuple(_chunked(v, count, size) for v in (h, targets, weights))
    if operand is None:
        w = w.astype(h.dtype)
    return _loss(_spec(tied, operand, axis), z_loss, chunks, w)

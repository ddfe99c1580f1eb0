"""Rotary positions (arXiv 2104.09864), half-split layout, with linear and Llama-3 scaling."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """float64[head_dim / 2] angular frequencies per position."""
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = np.clip((rope.original_max_position / wavelength - low) / (high - low), 0.0, 1.0)
        return frequencies * ((1 - smooth) / rope.factor + smooth)
    return frequencies


def apply_rope(
    x: Float[Array, "B T H d"], positions: Int[Array, "B T"], rope: RopeConfig
) -> Float[Array, "B T H d"]:
    """Rotate ``x`` by its positions; angles in float32, dtype of ``x`` kept."""
    frequencies = jnp.asarray(inverse_frequencies(rope, x.shape[-1]), jnp.float32)
    angle = positions.astype(jnp.float32)[..., None] * frequencies
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

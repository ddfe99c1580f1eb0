"""Weights as the large products take them: rounded once, instead of in every call.

A decode step reads every weight once, so that rounding them on the way costs more than the products themselves.
"""

import weakref
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.model import functional
from jaxllm.model.functional import Params

# By the id of a leaf that lives: (a reference that forgets the entry when the leaf goes, the rounded leaf).
_rounded: dict[int, tuple[Any, jax.Array]] = {}


def _round(leaf: jax.Array, dtype: str) -> jax.Array:
    key = id(leaf)
    if key not in _rounded:
        _rounded[key] = weakref.ref(leaf, lambda _: _rounded.pop(key, None)), leaf.astype(dtype)
    return _rounded[key][1]


def operands(cfg: ModelConfig, params: Params) -> Params:
    """``params`` with the weights of all linear layers in the dtype to which ``matmul`` rounds operands.

    Results are those of rounding at every call, bit for bit. The rounded copies live as long as what they were made
    of, or until :func:`clear`; a second call finds them.

    Args:
        cfg: the model; without ``precision.matmul`` nothing is rounded.
        params: pure parameters.
    """
    dtype = cfg.precision.operand
    if dtype is None:
        return params
    names = functional.linear_weights(cfg)

    def one(name: str, leaf: Any) -> Any:
        plain = name in names and isinstance(leaf, jax.Array)
        return _round(leaf, dtype) if plain and leaf.dtype != jnp.dtype(dtype) else leaf

    return functional.map_named(one, params)


def clear() -> None:
    """Forget the rounded copies."""
    _rounded.clear()

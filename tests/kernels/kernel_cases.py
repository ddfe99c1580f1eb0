"""What the kernel tests share: random arrays, a compile cache, packed rows and comparison of values and gradients."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np

# Row 0: padding left, between and right, document 4 absent, document 1 shorter than any filter. Row 1: the
# documents touch, one of them a single token.
SEGMENTS = np.array(
    [[0] * 3 + [1] * 2 + [0] * 2 + [2] * 11 + [3] * 9 + [0] * 2, [1] * 7 + [2] * 1 + [3] * 12 + [4] * 9],
    np.int32,
)
DOCUMENTS = 4


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def documents(ids: np.ndarray):
    """(row, id, slice) of every document of packed rows."""
    for row, line in enumerate(ids):
        for s in range(1, line.max() + 1):
            at = np.flatnonzero(line == s)
            if at.size:
                yield row, s, slice(at[0], at[-1] + 1)


@functools.cache
def _compiled(op, statics: tuple, present: tuple, grad: bool):
    """``op`` over the present arguments, jitted once; with ``grad`` also every gradient of a fixed random sum."""
    names = [name for name, parameter in inspect.signature(op).parameters.items() if name in present]

    def call(arrays):
        return op(**dict(zip(names, arrays)), **dict(statics))

    if not grad:
        return names, jax.jit(call)

    def loss(floats, ints, weights):
        outputs = call([floats.get(name, ints.get(name)) for name in names])
        return sum(jnp.vdot(o, w) for o, w in zip(jax.tree.leaves(outputs), weights)), outputs

    return names, jax.jit(jax.value_and_grad(loss, has_aux=True))


def values(op, arrays: dict, **statics):
    """Outputs of ``op`` as numpy; None arguments are left out."""
    arrays = {name: v for name, v in arrays.items() if v is not None}
    names, run = _compiled(op, tuple(statics.items()), tuple(sorted(arrays)), False)
    return jax.tree.map(np.asarray, run([jnp.asarray(arrays[name]) for name in names]))


def values_and_grads(op, arrays: dict, weights: list, **statics):
    """Outputs and the gradients (by name) of ``sum(output * weight)``."""
    arrays = {name: jnp.asarray(v) for name, v in arrays.items() if v is not None}
    floats = {name: v for name, v in arrays.items() if v.dtype == jnp.float32}
    ints = {name: v for name, v in arrays.items() if name not in floats}
    _, run = _compiled(op, tuple(statics.items()), tuple(sorted(arrays)), True)
    (_, outputs), grads = run(floats, ints, [jnp.asarray(w) for w in weights])
    return jax.tree.map(np.asarray, (outputs, grads))


def close(got, wanted, tolerance: float = 2e-5) -> None:
    """Equal up to ``tolerance`` of the largest wanted magnitude, leaf by leaf."""
    got, wanted = jax.tree.flatten(got), jax.tree.flatten(wanted)
    assert got[1] == wanted[1]
    for g, w in zip(got[0], wanted[0]):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert g.shape == w.shape
        assert np.all(np.isfinite(g) | (g == w))
        finite = np.isfinite(w)
        if finite.any():
            scale = max(np.abs(w[finite]).max(), 1e-6)
            assert np.abs(g[finite] - w[finite]).max() <= tolerance * scale
        np.testing.assert_array_equal(g[~finite], w[~finite])

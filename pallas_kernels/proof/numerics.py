"""Values and gradients of an implementation against an oracle, with poisoned padding and a bitwise repeat."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.cases import Arrays, Case


@dataclass(frozen=True)
class Comparison:
    """Largest error of each output and gradient relative to the largest magnitude of what was expected.

    Infinite where one is NaN, or infinite in other places than expected.
    """

    errors: dict[str, float]
    repeats: bool

    def require(self, tolerance: float) -> "Comparison":
        """This comparison.

        Raises:
            AssertionError: an error above the tolerance, or a second run with other bits.
        """
        wrong = {name: error for name, error in self.errors.items() if not error <= tolerance}
        if wrong:
            raise AssertionError(f"errors above {tolerance:g}: {wrong}")
        if not self.repeats:
            raise AssertionError("a second run gives other bits")
        return self


def error(got: Any, wanted: Any, unspecified: Any = None) -> float:
    """The error of one array, as in :class:`Comparison`, taken in float64."""
    got, wanted = np.asarray(got).astype(np.float64), np.asarray(wanted).astype(np.float64)
    if got.shape != wanted.shape:
        return float("inf")
    if unspecified is not None:
        ignored = np.broadcast_to(np.asarray(unspecified), got.shape)
        got, wanted = np.where(ignored, 0, got), np.where(ignored, 0, wanted)
    finite = np.isfinite(wanted)
    if not np.array_equal(got[~finite], wanted[~finite]) or not np.isfinite(got[finite]).all():
        return float("inf")
    scale = max(np.abs(wanted[finite]).max(initial=0.0), 1e-6)
    return float(np.abs(got[finite] - wanted[finite]).max(initial=0.0) / scale)


def _is_float(v: Any) -> bool:
    return jnp.issubdtype(v.dtype, jnp.floating)


def _filled(arrays: Arrays, padding: Arrays, value: float) -> Arrays:
    def fill(name: str, v: Array) -> Array:
        if name not in padding:
            return v
        # Integers have no NaN: their padding keeps what stands there.
        return jnp.where(padding[name], jnp.asarray(value, v.dtype), v) if _is_float(v) else v

    return {name: fill(name, jnp.asarray(v)) for name, v in arrays.items()}


def compare(
    function: Callable[..., Any],
    arrays: Mapping[str, Any],
    *,
    options: Mapping[str, Any] | None = None,
    implementation: str,
    oracle: str = "reference",
    oracle_options: Mapping[str, Any] | None = None,
    gradients: tuple[str, ...] = (),
    padding: Mapping[str, Any] | None = None,
    poison: float = float("nan"),
    unspecified: Any = None,
    repeat: bool = True,
) -> Comparison:
    """Run an implementation and its oracle on the same numbers.

    Args:
        function: the op; takes arrays, options and ``implementation`` as keyword arguments.
        arrays: inputs. The oracle gets its floats as float32, so that its results are not rounded.
        options: static keyword arguments.
        implementation: the one on trial.
        oracle: the one that is right.
        oracle_options: options that differ for the oracle.
        gradients: inputs whose gradients are compared too, for random cotangents.
        padding: boolean arrays by input, True where the value must not matter: zero for the oracle, ``poison`` here.
        poison: NaN, or a huge finite value for ops whose contract asks for finite padding.
        unspecified: boolean pytree like the outputs, True where a result means nothing.
        repeat: also run twice and compare the bits.

    Returns:
        Errors called "output 0", "output 1", ... and "gradient of <input>".
    """
    options, padding = dict(options or {}), dict(padding or {})
    arrays = {name: jnp.asarray(v) for name, v in arrays.items()}
    exact = {name: v.astype(jnp.float32) if _is_float(v) else v for name, v in arrays.items()}

    def results(arrays: Arrays, weights: list[Array] | None, implementation: str, options: dict[str, Any]):
        def forward(some: Arrays) -> list[Array]:
            return jax.tree.leaves(function(**{**arrays, **some}, **options, implementation=implementation))

        if weights is None:
            return forward({}), {}
        outputs, pull = jax.vjp(forward, {name: arrays[name] for name in gradients})
        return outputs, pull([w.astype(o.dtype) for w, o in zip(weights, outputs, strict=True)])[0]

    def jitted(implementation: str, options: dict[str, Any]):
        return jax.jit(lambda arrays, weights: results(arrays, weights, implementation, options))

    run = jitted(implementation, options)
    right = jitted(oracle, {**options, **dict(oracle_options or {})})
    clean, poisoned = _filled(exact, padding, 0.0), _filled(arrays, padding, poison)
    ignored = [None] * 99 if unspecified is None else jax.tree.leaves(unspecified)
    weights = None
    if gradients:
        shapes = jax.eval_shape(
            lambda a: results(a, None, oracle, {**options, **dict(oracle_options or {})}), clean
        )[0]
        weights = [
            jax.random.normal(jax.random.key(index), shape.shape).astype(jnp.bfloat16).astype(jnp.float32)
            for index, shape in enumerate(shapes)
        ]
        weights = [w if i is None else jnp.where(i, 0, w) for w, i in zip(weights, ignored)]
    wanted, wanted_gradients = right(clean, weights)
    got, got_gradients = run(poisoned, weights)
    errors = {
        f"output {index}": error(g, w, ignored[index])
        for index, (g, w) in enumerate(zip(got, wanted, strict=True))
    }
    for name in gradients:
        errors[f"gradient of {name}"] = error(got_gradients[name], wanted_gradients[name])
    repeats = True
    if repeat:
        again = run(poisoned, weights)
        pairs = zip(jax.tree.leaves((got, got_gradients)), jax.tree.leaves(again), strict=True)
        repeats = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    return Comparison(errors, repeats)


def compare_case(case: Case, implementation: str, seed: int = 0, *, repeat: bool = True) -> Comparison:
    """:func:`compare` of a case on inputs drawn from ``seed``."""
    arrays = jax.jit(case.inputs)(jax.random.key(seed))
    return compare(
        case.function,
        arrays,
        options=case.options,
        implementation=implementation,
        oracle=case.oracle,
        oracle_options=case.oracle_options,
        gradients=case.gradients,
        padding=None if case.padding is None else case.padding(arrays),
        unspecified=None if case.unspecified is None else case.unspecified(arrays),
        poison=case.poison,
        repeat=repeat,
    )

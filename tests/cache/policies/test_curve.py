"""The fitted curve and the budget that it gives, against sums over every rank in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxllm.cache.policies.curve import Curve, fit, harmonic, ranks_for

N = 300
SUMS = jnp.asarray(harmonic(N))
RANKS = jax.jit(ranks_for, static_argnums=0)


def ranks(mass: float, head: float, a: float, b: float, m: int, n: int) -> int:
    curve = Curve(jnp.float32(a), jnp.float32(b))
    return int(RANKS(mass, jnp.float32(head), curve, jnp.int32(m), jnp.int32(n), SUMS))


def sums(head: float, a: float, b: float, m: int, n: int) -> np.ndarray:
    """Estimated totals of m, m + 1, ... n ranks."""
    x = np.arange(m + 1, n + 1)
    tail = np.maximum(np.float64(np.float32(a)) / x + np.float64(np.float32(b)), 0)
    return np.concatenate([[head], head + np.cumsum(tail)])


@pytest.mark.parametrize("wide", [1, 7])
@pytest.mark.parametrize(("a", "b"), [(3.0, 0.25), (40.0, -0.1), (-2.0, 0.5), (0.0, 1.0)])
def test_values_on_a_curve_give_that_curve(a: float, b: float, wide: int):
    y, inverse = [], []
    for start in (30, 180):
        x = np.arange(start, start + wide)
        y.append(jnp.float32(np.mean(a / x + b)))
        inverse.append(jnp.float32(np.mean(1 / x)))
    found = fit((y[0], y[1]), (inverse[0], inverse[1]))
    np.testing.assert_allclose([found.a, found.b], [a, b], rtol=1e-3, atol=1e-4)


def test_equal_windows_give_a_flat_curve():
    one = jnp.float32(0.5)
    assert jax.tree.map(float, fit((jnp.float32(2), jnp.float32(3)), (one, one))) == Curve(0, 2)


def test_harmonic_sums_are_those_of_fractions():
    np.testing.assert_allclose(harmonic(4), [0, 1, 1.5, 1.5 + 1 / 3, 1.75 + 1 / 3], rtol=1e-7)


@given(
    a=st.floats(-50, 200),
    b=st.floats(-2, 2),
    head=st.floats(0.125, 100),
    bounds=st.tuples(st.integers(1, N), st.integers(1, N)),
    mass=st.sampled_from([0.1, 0.5, 0.75, 0.9, 0.99]),
)
def test_the_budget_is_the_least_that_holds_the_mass(a, b, head, bounds, mass):
    m, n = min(bounds), max(bounds)
    found, totals = ranks(mass, head, a, b, m, n), sums(float(np.float32(head)), a, b, m, n)
    target = mass * totals[-1]
    assert m <= found <= n
    assert totals[found - m] >= target * (1 - 1e-4)
    assert found == m or totals[found - m - 1] <= target * (1 + 1e-4)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (30.0, -1.0, 18),  # nothing from rank 30 on
        (0.0, 1.0, 271),
        (-30.0, 1.0, 278),  # nothing up to rank 30
    ],
)
def test_known_budgets(a: float, b: float, wanted: int):
    totals = sums(1.0, a, b, 4, N)
    assert 4 + int(np.argmax(totals >= 0.9 * totals[-1])) == wanted
    assert ranks(0.9, 1.0, a, b, 4, N) == wanted


@given(
    a=st.floats(-50, 200),
    b=st.floats(-2, 2),
    head=st.floats(0.125, 100),
    scale=st.sampled_from([2.0**-20, 8.0]),
)
# Below zero everywhere.
@example(a=-1.0, b=0.0, head=1.0, scale=8.0)
def test_budgets_grow_with_the_mass_and_do_not_change_with_the_scale(a, b, head, scale):
    found = [ranks(mass, head, a, b, 6, N) for mass in (0.2, 0.5, 0.8, 0.95)]
    assert found == sorted(found)
    head, a, b = (float(np.float32(x)) * scale for x in (head, a, b))
    again = [ranks(mass, head, a, b, 6, N) for mass in (0.2, 0.5, 0.8, 0.95)]
    # A power of two changes no digit, except of numbers too small for float32.
    assert again == found or min(abs(a), abs(b)) < 1e-20


def test_no_ranks_need_no_budget():
    assert ranks(0.9, 0.0, 0.0, 0.0, 0, 0) == 0

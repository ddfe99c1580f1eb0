"""Scan and convolution of a tree: each node against the op over its own path, each commit against that path's end."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import tree
from pallas_kernels.causal_conv.window import causal_conv_commit, causal_conv_window
from pallas_kernels.gated_delta.window import Factors as DeltaFactors
from pallas_kernels.gated_delta.window import gated_delta_commit, gated_delta_window
from pallas_kernels.ssd.window import Factors, ssd_commit, ssd_window
from tests.kernels.kernel_cases import close, normal, values
from tests.kernels.test_causal_conv import by_hand as conv_by_hand
from tests.kernels.test_gated_delta import by_hand as delta_by_hand
from tests.kernels.test_ssd import by_hand as ssd_by_hand
from tests.kernels.tree_cases import path_to, random_parents

B, W = 3, 7
H, P, G, N = 4, 3, 2, 5
D, k = 3, 4
SEEDS = st.integers(0, 2**31)
IMPLEMENTATIONS = ["xla", "reference"]


def trees(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(parents, live, ancestors); some nodes are padding, the last row is a chain."""
    rng = np.random.default_rng(seed)
    parents, live = random_parents(rng, B, W, shuffled=bool(seed % 2)), rng.random((B, W)) < 0.7
    parents[-1] = np.arange(-1, W - 1)
    live[0, 0] = True
    return parents, live, values(tree.ancestors, {"parents": parents, "live": live})


def scan_arrays(seed: int, live: np.ndarray, groups: int = G) -> dict:
    """Arguments of the scan; padding is huge, so that nothing of it can pass unseen."""
    junk = np.where(live, 1, 1e30).astype(np.float32)
    return {
        "x": normal(seed, B, W, H, P) * junk[..., None, None],
        "dt": np.logaddexp(0, normal(seed, B, W, H)) * junk[..., None],
        "A": -np.exp(normal(seed, H)),
        "B": normal(seed, B, W, groups, N) * junk[..., None, None],
        "C": normal(seed + 1, B, W, groups, N) * junk[..., None, None],
        "D": normal(seed + 1, H),
        "initial_state": normal(seed, B, H, P, N),
    }


def along(a: dict, row: int, path: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and state of the recurrence over one path."""
    x, dt, keys, queries = (a[name][row, path] for name in ("x", "dt", "B", "C"))
    return ssd_by_hand(x, dt, a["A"], keys, queries, a["D"], a["initial_state"][row])


def accept(nodes: list[list[int]]) -> np.ndarray:
    accepted = np.zeros((B, W), bool)
    for row, path in enumerate(nodes):
        accepted[row, path] = True
    return accepted


def commit_factors(xb, B, decay, accepted, initial_state):
    return ssd_commit(Factors(xb, B, decay), accepted, initial_state)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", [1, G, H])
@given(seed=SEEDS)
def test_every_node_is_the_recurrence_over_its_path(implementation, groups, seed):
    parents, live, seen = trees(seed)
    a = scan_arrays(seed, live, groups)
    y, factors = values(ssd_window, {**a, "ancestors": seen}, implementation=implementation)
    for b, i in np.argwhere(live):
        close(y[b, i], along(a, b, path_to(parents[b], live[b], i))[0][-1], 5e-6)
    assert not y[~live].any() and not any(leaf[~live].any() for leaf in factors[:2])


@given(seed=SEEDS)
def test_a_committed_path_leaves_the_state_of_its_last_token(seed):
    parents, live, seen = trees(seed)
    a = scan_arrays(seed, live)
    a["initial_state"][1, 0] = -0.0
    _, factors = values(ssd_window, {**a, "ancestors": seen})
    rng = np.random.default_rng(seed)
    ends = [rng.choice(np.flatnonzero(row)) if row.any() else None for row in live]
    ends[1] = None
    paths = [[] if end is None else path_to(parents[b], live[b], end) for b, end in enumerate(ends)]
    state = values(
        commit_factors,
        {**factors._asdict(), "accepted": accept(paths), "initial_state": a["initial_state"]},
    )
    for b, path in enumerate(paths):
        if path:
            close(state[b], along(a, b, path)[1], 5e-6)
        else:
            np.testing.assert_array_equal(state[b].view(np.int32), a["initial_state"][b].view(np.int32))


def test_strong_decay_stays_finite():
    """Between unrelated nodes the difference of log decays is positive: its exponential would overflow."""
    _, live, seen = trees(3)
    a = scan_arrays(3, live)
    a["A"] = np.full(H, -300, np.float32)
    y, factors = values(ssd_window, {**a, "ancestors": seen})
    wanted, _ = values(ssd_window, {**a, "ancestors": seen}, implementation="reference")
    assert np.isfinite(y).all() and factors.decay.min() < -500
    close(y, wanted, 5e-6)


def conv_arrays(seed: int, live: np.ndarray, taps: int = k) -> dict:
    return {
        "x": normal(seed, B, W, D) * np.where(live, 1, 1e30).astype(np.float32)[..., None],
        "weight": normal(seed, taps, D),
        "bias": normal(seed, D),
        "initial_state": normal(seed, B, taps - 1, D),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("taps", "activation"), [(4, "silu"), (2, None), (1, "silu")])
@given(seed=SEEDS)
def test_every_node_is_convolved_with_its_own_ancestors(implementation, taps, activation, seed):
    parents, live, seen = trees(seed)
    a = conv_arrays(seed, live, taps)
    y = values(
        causal_conv_window, {**a, "ancestors": seen}, activation=activation, implementation=implementation
    )
    for b, i in np.argwhere(live):
        path = path_to(parents[b], live[b], i)
        wanted, _ = conv_by_hand(
            a["x"][b, path], a["weight"], a["bias"], a["initial_state"][b], activation == "silu"
        )
        close(y[b, i], wanted[-1], 2e-6)


@given(seed=SEEDS)
def test_a_committed_path_leaves_its_last_inputs(seed):
    parents, live, seen = trees(seed)
    a = conv_arrays(seed, live)
    # Every node of the first row in turn, so that every depth occurs; a chain in the last row, nothing in between.
    for node in np.flatnonzero(live[0]):
        last = np.flatnonzero(live[-1])[:node]
        paths = [path_to(parents[0], live[0], node), [], list(last)]
        arrays = {
            "x": a["x"],
            "ancestors": seen,
            "accepted": accept(paths),
            "initial_state": a["initial_state"],
        }
        state = values(causal_conv_commit, arrays)
        for b, path in enumerate(paths):
            window = np.concatenate([a["initial_state"][b], a["x"][b, path]])[-(k - 1) :]
            np.testing.assert_array_equal(state[b], window)


LIVE = np.ones((B, W), bool)
SEEN = np.tile(np.tri(W, dtype=bool), (B, 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": np.ones((B, W, H + 1), np.float32)}, "dt.shape"),
        ({"C": np.ones((B, W, 1, N), np.float32)}, "C.shape"),
        ({name: np.ones((B, W, 3, N), np.float32) for name in "BC"}, "G \\(third\\) to divide H = 4"),
        ({"ancestors": SEEN[:, 1:]}, "ancestors.shape"),
        ({"initial_state": np.ones((B, H, P, N + 1), np.float32)}, "initial_state.shape"),
        ({"implementation": "triton"}, "implementation='triton': expected one of 'auto', 'xla', 'reference'"),
    ],
)
def test_bad_scan_arguments_are_named(own_checks, change, message):
    with pytest.raises(ValueError, match=message):
        ssd_window(**{**scan_arrays(0, LIVE), "ancestors": SEEN, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones((k, D + 1), np.float32)}, "weight.shape"),
        ({"weight": np.ones((B, W + 1, k, D), np.float32)}, "weight.shape.*B, W, k, D"),
        ({"bias": np.ones(D + 1, np.float32)}, "bias.shape"),
        ({"ancestors": SEEN[:, 1:]}, "ancestors.shape"),
        ({"initial_state": np.ones((B, k, D), np.float32)}, "initial_state.shape"),
        ({"activation": "gelu"}, "activation='gelu'"),
    ],
)
def test_bad_convolution_arguments_are_named(own_checks, change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv_window(**{**conv_arrays(0, LIVE), "ancestors": SEEN, **change})


DK, DV, HV = 4, 3, 4


def delta_arrays(seed: int, live: np.ndarray, heads: int) -> dict:
    """Arguments of the delta rule, keys of at most unit length, writes up to 2; padding is huge."""
    junk = np.where(live, 1, 1e30).astype(np.float32)
    k = normal(seed, B, W, heads, DK)
    return {
        "q": normal(seed + 1, B, W, heads, DK) * junk[..., None, None],
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True) * junk[..., None, None],
        "v": normal(seed, B, W, HV, DV) * junk[..., None, None],
        "g": -np.logaddexp(0, normal(seed, B, W, HV)) * junk[..., None],
        "beta": 2 / (1 + np.exp(-normal(seed + 1, B, W, HV))) * junk[..., None],
        "initial_state": normal(seed, B, HV, DK, DV),
    }


def delta_along(a: dict, row: int, path: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and state of the recurrence over one path."""
    inputs = (a[name][row, path] for name in ("q", "k", "v", "g", "beta"))
    return delta_by_hand(*inputs, a["initial_state"][row])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [2, HV])
@given(seed=SEEDS)
def test_every_node_is_the_delta_rule_over_its_path(implementation, heads, seed):
    parents, live, seen = trees(seed)
    a = delta_arrays(seed, live, heads)
    o, factors = values(gated_delta_window, {**a, "ancestors": seen}, implementation=implementation)
    for b, i in np.argwhere(live):
        close(o[b, i], delta_along(a, b, path_to(parents[b], live[b], i))[0][-1], 2e-5)
    assert not o[~live].any() and not any(leaf[~live].any() for leaf in factors[:2])


def commit_delta(k, write, decay, accepted, initial_state):
    return gated_delta_commit(DeltaFactors(k, write, decay), accepted, initial_state)


@given(seed=SEEDS)
def test_a_committed_path_leaves_the_matrix_of_its_last_token(seed):
    parents, live, seen = trees(seed)
    a = delta_arrays(seed, live, 2)
    _, factors = values(gated_delta_window, {**a, "ancestors": seen})
    rng = np.random.default_rng(seed)
    ends = [rng.choice(np.flatnonzero(row)) if row.any() else None for row in live]
    ends[1] = None
    paths = [[] if end is None else path_to(parents[b], live[b], end) for b, end in enumerate(ends)]
    arrays = {**factors._asdict(), "accepted": accept(paths), "initial_state": a["initial_state"]}
    state = values(commit_delta, arrays)
    for b, path in enumerate(paths):
        if path:
            close(state[b], delta_along(a, b, path)[1], 2e-5)
        else:
            np.testing.assert_array_equal(state[b].view(np.int32), a["initial_state"][b].view(np.int32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(seed=SEEDS)
def test_every_node_is_convolved_with_its_own_kernel(implementation, seed):
    """With one kernel for all nodes it is the static convolution; with several, each node has its own."""
    _, live, seen = trees(seed)
    a = conv_arrays(seed, live)
    kernels = normal(seed + 2, B, W, k, D)
    shared = {"x": a["x"], "ancestors": seen, "initial_state": a["initial_state"]}
    y = values(causal_conv_window, {**shared, "weight": kernels}, implementation=implementation)
    for b, i in np.argwhere(live):
        alone = values(causal_conv_window, {**shared, "weight": kernels[b, i]}, implementation="reference")
        close(y[b, i], alone[b, i], 5e-6)

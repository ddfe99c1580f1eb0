"""The grouped product against a loop over rows and its reference; the permutation against sorting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import from_experts, grouped_matmul, plan, to_experts
from pallas_kernels.grouped_matmul.permute import sorted_order
from pallas_kernels.grouped_matmul.xla import block_rows, busy_experts
from tests.kernels.kernel_cases import close, normal, values, values_and_grads

K, N, EXPERTS = 6, 5, 7
# Rows past the sum belong to nobody. Blocks are of 8 rows at least, so 19 rows of one expert are three of them.
SIZES = {
    "random": [3, 11, 0, 19, 1, 6],
    "all to one expert": [0, 0, 40, 0, 0, 0],
    "none at all": [0, 0, 0, 0, 0, 0],
    "exactly full": [8, 8, 8, 8, 4, 4],
    "first and last empty": [0, 17, 0, 9, 2, 0],
}
ROWS = 40


def arrays(sizes, rows: int = ROWS, seed: int = 0) -> dict:
    return {
        "x": normal(seed, rows, K),
        "w": normal(seed, len(sizes), K, N),
        "sizes": np.asarray(sizes, np.int32),
    }


def by_hand(x, w, sizes):
    """float64, row by row."""
    y, row = np.zeros((len(x), w.shape[2])), 0
    for e, size in enumerate(sizes):
        for _ in range(size):
            y[row] = x[row].astype(np.float64) @ w[e].astype(np.float64)
            row += 1
    return y


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("case", SIZES)
def test_every_row_meets_its_own_expert(case, implementation):
    a = arrays(SIZES[case])
    close(values(grouped_matmul, a, implementation=implementation), by_hand(**a), 1e-6)


@pytest.mark.parametrize("case", SIZES)
def test_gradients_are_those_of_the_reference(case):
    a, weights = arrays(SIZES[case]), [normal(1, ROWS, N)]
    got, wanted = (
        values_and_grads(grouped_matmul, a, weights, implementation=i) for i in ("xla", "reference")
    )
    close(got, wanted, 2e-6)
    # Experts without rows have no gradient at all.
    assert not np.any(got[1]["w"][np.asarray(SIZES[case]) == 0])


@pytest.mark.parametrize(("experts", "rows"), [(8, 200), (3, 700), (64, 64), (5, 1)])
def test_other_block_sizes(experts, rows):
    sizes = np.random.default_rng(rows).multinomial(rows, np.ones(experts) / experts)
    a, weights = arrays(sizes, rows), [normal(1, rows, N)]
    got, wanted = (
        values_and_grads(grouped_matmul, a, weights, implementation=i) for i in ("xla", "reference")
    )
    close(got, wanted, 2e-6)


def test_blocks_are_of_an_experts_share():
    assert [block_rows(*sizes) for sizes in ((1, 9), (40, 6), (320, 9), (700, 3))] == [8, 8, 32, 128]


def test_only_experts_with_rows_are_run():
    busy = busy_experts(jnp.array([65, 0, 300, 0, 1]))
    assert int(busy.count) == 3
    for found, wanted in ((busy.expert, [0, 2, 4]), (busy.first, [0, 65, 365]), (busy.rows, [65, 300, 1])):
        np.testing.assert_array_equal(found[:3], wanted)
    assert not np.any(busy.rows[3:])


def test_what_stands_past_the_last_expert_is_never_read():
    a = arrays(SIZES["first and last empty"])
    used = sum(SIZES["first and last empty"])
    weights = normal(1, ROWS, N)
    clean = values_and_grads(grouped_matmul, a, [weights], implementation="xla")
    a["x"][used:], weights[used:] = np.nan, np.nan

    def poisoned(x, w, sizes):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, pull(jnp.asarray(weights))

    y, (dx, dw) = jax.jit(poisoned)(a["x"], a["w"], a["sizes"])
    assert not np.any(y[used:]) and not np.any(dx[used:])
    close((y, dx, dw), (clean[0], clean[1]["x"], clean[1]["w"]), 1e-6)


def test_bfloat16_operands_and_cotangents():
    a = arrays(SIZES["random"])
    g = normal(2, ROWS, N)
    rounded = [jnp.asarray(v).astype(jnp.bfloat16).astype(jnp.float32) for v in (a["x"], a["w"], g)]
    sizes = jnp.asarray(a["sizes"])
    wanted, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="reference"), *rounded[:2])
    got, pull_rounded = jax.vjp(
        lambda x, w: grouped_matmul(x, w, sizes, operand_dtype=jnp.bfloat16), a["x"], a["w"]
    )
    close((got, *pull_rounded(jnp.asarray(g))), (wanted, *pull(rounded[2])), 1e-5)
    low = grouped_matmul(jnp.asarray(a["x"], jnp.bfloat16), jnp.asarray(a["w"], jnp.bfloat16), sizes)
    assert low.dtype == jnp.bfloat16


def sparse(x, w, weights, ids):
    p = plan(ids, EXPERTS)
    return from_experts(grouped_matmul(to_experts(x, p), w, p.sizes), weights, p)


def dense(x, w, weights, ids):
    hot = jax.nn.one_hot(ids, EXPERTS)
    return jnp.einsum("tkE,tk,td,Edn->tn", hot, weights, x, w, precision="highest")


@pytest.mark.parametrize(("tokens", "k"), [(1, 2), (13, 1), (13, EXPERTS)])
@given(seed=st.integers(0, 2**31), used=st.integers(1, EXPERTS + 1))
def test_tokens_through_experts_and_back(tokens, k, seed, used):
    """Against a sum over each token's copies; the last id is no expert. All gradients against the plain formula's."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(EXPERTS + 1, used, replace=False)[rng.integers(0, used, (tokens, k))].astype(np.int32)
    if k == EXPERTS and used == EXPERTS:
        ids = np.stack([rng.permutation(EXPERTS) for _ in range(tokens)]).astype(np.int32)
    shapes = {"x": (tokens, K), "w": (EXPERTS, K, N), "weights": (tokens, k)}
    a = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} | {"ids": ids}
    # One expert drawn twice with weights of opposite sign would cancel.
    a["weights"] = np.abs(a["weights"])
    g = [rng.standard_normal((tokens, N)).astype(np.float32)]
    got, wanted = (values_and_grads(op, a, g) for op in (sparse, dense))
    close(got, wanted, 5e-5)
    np.testing.assert_array_equal(values_and_grads(sparse, a, g)[0], got[0])


def test_a_plan_is_a_stable_sort():
    ids = np.random.default_rng(0).integers(0, 5, (9, 3))
    p = plan(jnp.asarray(ids), 4)
    np.testing.assert_array_equal(p.order, np.argsort(ids.reshape(-1), kind="stable"))
    np.testing.assert_array_equal(np.asarray(p.order)[p.inverse], np.arange(27).reshape(9, 3))
    np.testing.assert_array_equal(p.sizes, np.bincount(ids.reshape(-1), minlength=5)[:4])
    # So many experts that the one key would overflow.
    np.testing.assert_array_equal(sorted_order(jnp.asarray(ids).reshape(-1), 2**31 // 27), p.order)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((4, K + 1), np.float32)}, "x.shape"),
        ({"w": np.zeros((K, N), np.float32)}, "w.shape"),
        ({"sizes": np.zeros(2, np.int32)}, "sizes.shape"),
    ],
)
def test_bad_shapes_are_named(own_checks, change, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**{name: jnp.asarray(v) for name, v in {**arrays(SIZES["random"]), **change}.items()})


def test_unsupported_calls_are_refused():
    a = {name: jnp.asarray(v) for name, v in arrays(SIZES["random"]).items()}
    with pytest.raises(ValueError, match="float32, not with operand_dtype=bfloat16"):
        grouped_matmul(**a, operand_dtype=jnp.bfloat16, implementation="reference")
    with pytest.raises(ValueError, match="operand_dtype='int8'"):
        grouped_matmul(**a, operand_dtype=jnp.int8)

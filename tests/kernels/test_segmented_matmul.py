"""Products of rows with their adapters: against a loop over rows in float64, the reference, and PEFT's LoRA layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.segmented_matmul import segmented_matmul
from tests.kernels.kernel_cases import close, normal, values, values_and_grads

K, N, RANK, SLOTS, ROWS = 7, 5, 3, 6, 45
# Blocks are of 8 rows at least: 19 rows of one adapter are three of them.
USED = {
    "random": [0] * 5 + [1] * 19 + [3] * 11 + [4] * 1 + [5] * 9,
    "one adapter": [2] * ROWS,
    "no adapter": [0] * ROWS,
    "exactly full blocks": [1] * 8 + [2] * 16 + [5] * 8 + [0] * 13,
}
FLOATS = ("x", "a", "b", "scaling")


def arrays(slots, seed: int = 0, sizes: tuple[int, ...] = (K, RANK, N, SLOTS)) -> dict:
    channels, rank, out, S = sizes
    slots = np.random.default_rng(seed).permutation(np.asarray(slots, np.int32))
    return {
        "x": normal(seed, len(slots), channels),
        "a": normal(seed, S, channels, rank),
        "b": normal(seed, S, rank, out),
        "scaling": normal(seed, S),
        "slots": slots,
    }


def by_hand(x, a, b, scaling, slots, g):
    """Values and the gradients of sum(y * g), float64, row by row."""
    x, a, b, scaling, g = (w.astype(np.float64) for w in (x, a, b, scaling, g))
    y, grads = np.zeros((len(x), b.shape[2])), {}
    for name, w in zip(FLOATS, (x, a, b, scaling), strict=True):
        grads[name] = np.zeros_like(w)
    for m, s in enumerate(slots):
        if s:
            low, dlow = x[m] @ a[s], b[s] @ g[m]
            y[m] = scaling[s] * low @ b[s]
            grads["x"][m] = scaling[s] * a[s] @ dlow
            grads["a"][s] += scaling[s] * np.outer(x[m], dlow)
            grads["b"][s] += scaling[s] * np.outer(low, g[m])
            grads["scaling"][s] += low @ dlow
    return y, grads


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("case", USED)
def test_every_row_meets_its_own_adapter(case, implementation):
    a, g = arrays(USED[case]), normal(1, ROWS, N)
    close(values_and_grads(segmented_matmul, a, [g], implementation=implementation), by_hand(**a, g=g), 2e-6)


@given(seed=st.integers(0, 2**31), used=st.integers(1, SLOTS))
def test_random_adapters_and_rows(seed, used):
    rng = np.random.default_rng(seed)
    slots = rng.choice(SLOTS, used, replace=False)[rng.integers(0, used, ROWS)]
    a, g = arrays(slots, seed), normal(seed, ROWS, N)
    y, grads = values_and_grads(segmented_matmul, a, [g])
    close((y, grads), by_hand(**a, g=g), 5e-6)
    none = a["slots"] == 0
    assert not np.any(y[none]) and not np.any(grads["x"][none])
    idle = np.setdiff1d(np.arange(SLOTS), a["slots"][~none])
    assert not any(np.any(grads[name][idle]) for name in ("a", "b", "scaling"))


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "S", "rank"), [(1, 33, 8), (3, 2, 128), (200, 9, 16), (600, 3, 64)])
def test_other_sizes(rows, S, rank):
    slots = np.random.default_rng(rows).integers(0, S, rows)
    a, g = arrays(slots, rows, (24, rank, 40, S)), normal(1, rows, 40)
    close(values_and_grads(segmented_matmul, a, [g]), by_hand(**a, g=g), 5e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_nan_of_slot_0_and_of_idle_adapters_is_never_read(implementation):
    a, g = arrays(USED["random"]), normal(1, ROWS, N)
    clean = values_and_grads(segmented_matmul, a, [g], implementation=implementation)
    none, idle = a["slots"] == 0, [0, 2]
    poisoned = {name: v.copy() for name, v in a.items()}
    poisoned["x"][none] = np.nan
    for name in ("a", "b", "scaling"):
        poisoned[name][idle] = np.nan
    bad = g.copy()
    bad[none] = np.nan

    @jax.jit
    def call(x, a, b, scaling, slots, g):
        def run(x, a, b, scaling):
            return segmented_matmul(x, a, b, scaling, slots, implementation=implementation)

        y, pull = jax.vjp(run, x, a, b, scaling)
        return y, dict(zip(FLOATS, pull(g), strict=True))

    got = jax.tree.map(np.asarray, call(**poisoned, g=bad))
    close(got, clean, 1e-6)
    assert not np.any(got[0][none]) and not np.any(got[1]["x"][none])
    assert not any(np.any(got[1][name][idle]) for name in ("a", "b", "scaling"))


@given(seed=st.integers(0, 2**31))
def test_permuted_rows_give_the_same_bits(seed):
    a, g = arrays(USED["random"], seed % 1000), normal(1, ROWS, N)
    order = np.random.default_rng(seed).permutation(ROWS)
    moved = a | {"x": a["x"][order], "slots": a["slots"][order]}
    y, grads = values_and_grads(segmented_matmul, a, [g])
    other, other_grads = values_and_grads(segmented_matmul, moved, [g[order]])
    np.testing.assert_array_equal(other, y[order])
    np.testing.assert_array_equal(other_grads["x"], grads["x"][order])
    # Sums over rows take another order.
    for name in ("a", "b", "scaling"):
        close(other_grads[name], grads[name], 5e-6)


def test_padding_of_a_lower_rank_changes_nothing():
    a = arrays(USED["random"])
    wide = a | {
        "a": np.pad(a["a"], ((0, 0), (0, 0), (0, 5))),
        "b": np.pad(a["b"], ((0, 0), (0, 5), (0, 0))),
    }
    close(values(segmented_matmul, wide), values(segmented_matmul, a), 1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_slot_outside_gives_nan_and_no_gradient(implementation):
    a, g = arrays(USED["random"]), normal(1, ROWS, N)
    outside = np.zeros(ROWS, bool)
    outside[[3, 20]] = True
    a["slots"][[3, 20]] = [-1, SLOTS]
    y, grads = values_and_grads(segmented_matmul, a, [g], implementation=implementation)
    np.testing.assert_array_equal(np.isnan(y).all(axis=1), outside)
    wanted, wanted_grads = by_hand(**a | {"slots": np.where(outside, 0, a["slots"])}, g=g)
    close((y[~outside], grads), (wanted[~outside], wanted_grads), 5e-6)


def test_bfloat16_operands_with_float32_between():
    a, g = arrays(USED["random"]), normal(1, ROWS, N)
    low = {name: jnp.asarray(a[name], jnp.bfloat16) for name in ("x", "a", "b")}
    exact = {name: np.asarray(v, np.float32) for name, v in low.items()}
    rounded_g = np.asarray(jnp.asarray(g, jnp.bfloat16), np.float32)
    wanted = by_hand(**{**a, **exact}, g=rounded_g)
    slots = jnp.asarray(a["slots"])
    given_floats = [jnp.asarray(a[name]) for name in FLOATS]

    def run(x, a, b, scaling):
        return segmented_matmul(x, a, b, scaling, slots, operand_dtype=jnp.bfloat16)

    y, pull = jax.vjp(run, *given_floats)
    # A rounding of what stands between the products would be an error of 2**-9.
    close((y, dict(zip(FLOATS, pull(jnp.asarray(g)), strict=True))), wanted, 5e-6)
    y = segmented_matmul(low["x"], low["a"], low["b"], jnp.asarray(a["scaling"]), slots)
    assert y.dtype == jnp.bfloat16
    close(y, wanted[0], 4e-3)


@pytest.mark.oracle
def test_values_and_gradients_are_those_of_peft():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    S, channels, rank, out = 4, 12, 8, 10
    slots = np.random.default_rng(0).integers(0, S, 30)
    a, g = arrays(slots, 0, (channels, rank, out, S)), normal(1, 30, out)
    alphas = [1, 8, 16, 5]
    a["scaling"] = np.array(alphas, np.float32) / rank
    y, grads = values_and_grads(segmented_matmul, a, [g])
    for s in range(1, S):
        base = torch.nn.Sequential(torch.nn.Linear(channels, out, bias=False))
        config = peft.LoraConfig(r=rank, lora_alpha=alphas[s], lora_dropout=0.0, target_modules=["0"])
        layer = peft.get_peft_model(base, config).base_model.model[0]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            down.copy_(torch.from_numpy(a["a"][s].T.copy()))
            up.copy_(torch.from_numpy(a["b"][s].T.copy()))
        mine = a["slots"] == s
        x = torch.from_numpy(a["x"][mine]).requires_grad_()
        added = layer(x) - layer.base_layer(x)
        added.backward(torch.from_numpy(g[mine]))
        close(y[mine], added.detach().numpy(), 1e-5)
        assert x.grad is not None and down.grad is not None and up.grad is not None
        close(grads["x"][mine], x.grad.numpy(), 1e-5)
        close(grads["a"][s], down.grad.numpy().T, 1e-5)
        close(grads["b"][s], up.grad.numpy().T, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((4, ROWS, K), np.float32)}, r"x.shape=\(4, 45, 7\).*flatten"),
        ({"a": np.zeros((SLOTS, RANK, K), np.float32)}, "x.shape=.*PEFT's lora_A .* transpose"),
        ({"b": np.zeros((SLOTS, N, RANK), np.float32)}, "b.shape=.*PEFT's lora_B .* transpose"),
        ({"a": np.zeros((0, K, RANK), np.float32)}, "a.shape=.*slot 0 is no adapter"),
        ({"a": np.zeros((SLOTS, K, 0), np.float32)}, "a.shape=.*rank r"),
        ({"scaling": np.zeros(2, np.float32)}, r"scaling.shape=\(2,\): expected \(6,\)"),
        ({"slots": np.zeros(2, np.int32)}, r"slots.shape=\(2,\): expected \(45,\)"),
        ({"slots": np.zeros(ROWS, np.float32)}, "slots.dtype='float32': expected integers"),
        ({"b": np.zeros((SLOTS, RANK, N), np.int8)}, "b.dtype='int8': expected a floating dtype"),
        ({"operand_dtype": jnp.int8}, "operand_dtype='int8'"),
        ({"implementation": "mosaic_gpu"}, "needs a Hopper GPU, not cpu"),
    ],
)
def test_bad_input_is_named(own_checks, change, message):
    call = {name: jnp.asarray(v) for name, v in arrays(USED["random"]).items()} | change
    with pytest.raises(ValueError, match=message):
        segmented_matmul(**call)


def test_the_reference_refuses_narrow_operands():
    call = {name: jnp.asarray(v) for name, v in arrays(USED["random"]).items()}
    with pytest.raises(ValueError, match="float32, not with operand_dtype=bfloat16"):
        segmented_matmul(**call, operand_dtype=jnp.bfloat16, implementation="reference")

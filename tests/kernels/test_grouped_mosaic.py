"""The Hopper kernels of grouped products: interpreted, lowered for CUDA, broken on purpose, refused where they cannot run."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, tiles
from pallas_kernels.grouped_matmul import grouped_matmul, mosaic_rows
from pallas_kernels.grouped_matmul.cases import CASES
from pallas_kernels.grouped_matmul.tiles import Tiles
from pallas_kernels.grouped_matmul.visits import most_visits, visits
from pallas_kernels.proof import interpret, lowering, numerics
from tests.kernels.proof.poison import must_fail

SMALL = {case.name: case for case in CASES if case.small}
BORDERS, DECODE = SMALL["small borders"], SMALL["small decode"]
# Tiles of 128 rows whose warpgroups share the rows, and a ring shorter than the steps.
LARGE = ("grouped_matmul", "rows64", Tiles(rows=128, columns=128, stages=2))
table_of = jax.jit(visits, static_argnums=(1, 2))


def test_a_decode_of_few_rows_agrees_with_the_reference():
    with compat.interpreted():
        numerics.compare_case(DECODE, "mosaic_gpu", seed=1, repeat=False).require(DECODE.tolerance)


@pytest.mark.parametrize(
    "large", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.nightly)]
)
def test_products_and_gradients_across_borders_agree_with_the_reference(large):
    with compat.interpreted(), tiles.using(*LARGE) if large else contextlib.nullcontext():
        numerics.compare_case(BORDERS, "mosaic_gpu", seed=1, repeat=large).require(BORDERS.tolerance)


@pytest.mark.parametrize(("rows", "experts", "block"), [(300, 7, 64), (9, 12, 64), (256, 4, 128), (8, 8, 4)])
def test_visits_cover_every_row_once_and_its_own_expert(rows, experts, block):
    rng = np.random.default_rng([rows, experts])
    for draw in range(40):
        used = rows if draw % 2 else rng.integers(0, rows + 1)
        weights = rng.dirichlet(np.full(experts, 0.2))
        sizes = rng.multinomial(used, weights).astype(np.int32)
        if draw == 0 and rows == experts:
            # As many visits as there can be.
            sizes, used = np.ones(experts, np.int32), rows
        table = np.asarray(table_of(sizes, rows, block))
        assert len(table) == most_visits(rows, experts, block) <= min(rows, -(-rows // block) + experts)
        owner = np.full(rows, -1)
        for tile, expert, first, end in table[table[:, 3] > table[:, 2]]:
            assert tile * block <= first < end <= (tile + 1) * block
            assert (owner[first:end] == -1).all()
            owner[first:end] = expert
        wanted = np.repeat(np.arange(experts + 1), [*sizes, rows - used])
        np.testing.assert_array_equal(owner, wanted)


@pytest.mark.slow
def test_what_is_not_a_number_stays_with_its_row_and_expert():
    """A row of x, a cotangent, and whatever stands past the last expert, in either."""
    arrays = dict(jax.jit(BORDERS.inputs)(jax.random.key(0)))
    x, w, sizes = (arrays[name] for name in ("x", "w", "sizes"))
    used, ends = int(sizes.sum()), np.cumsum(sizes)
    g = jax.random.normal(jax.random.key(1), (len(x), w.shape[2]), jnp.bfloat16)

    def gradients(x, w, g, implementation):
        product = lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation)  # noqa: E731
        y, pull = jax.vjp(product, x, w)
        return y, *pull(g)

    wanted = jax.jit(gradients, static_argnums=3)(x.at[used:].set(0), w, g.at[used:].set(0), "xla")
    # Row 2 is expert 0's, in a tile of expert 1's too; row 133 expert 3's only one, beside expert 4's.
    poisoned = x.at[used:].set(jnp.nan).at[2].set(jnp.nan), w, g.at[used:].set(jnp.nan).at[133].set(jnp.nan)
    with compat.interpreted():
        y, dx, dw = jax.jit(gradients, static_argnums=3)(*poisoned, "mosaic_gpu")
    assert list(ends) == [3, 133, 133, 134, 174] and used == 174
    for found, right, lost in ((y, wanted[0], 2), (dx, wanted[1], 133)):
        found, right = np.asarray(found, np.float32), np.asarray(right, np.float32)
        assert np.isnan(found[lost]).all() and not found[used:].any()
        kept = np.delete(np.arange(len(found)), lost)
        np.testing.assert_allclose(found[kept], right[kept], atol=1e-2 * np.abs(right).max())
    dw, right = np.asarray(dw), np.asarray(wanted[2])
    assert np.isnan(dw[[0, 3]]).all() and not dw[2].any()
    np.testing.assert_allclose(dw[[1, 4]], right[[1, 4]], atol=1e-2 * np.abs(right).max())


@pytest.mark.nightly
@pytest.mark.parametrize(("constant", "value"), [("END", 2), ("EXPERT", 0)])
def test_a_poisoned_constant_is_noticed(monkeypatch, constant, value):
    must_fail(monkeypatch, mosaic_rows, constant, value, DECODE, "mosaic_gpu")


@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this version of jax does not see races")
def test_the_kernels_have_no_races():
    with tiles.using(*LARGE):
        interpret.run(BORDERS.call("mosaic_gpu"), jax.jit(BORDERS.inputs)(jax.random.key(0)), races=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernels_lower_and_xla_multiplies_nothing(case):
    text = lowering.lower_cuda(case.call("mosaic_gpu"), case.avals())
    for kernel in ("grouped_matmul_rows", *(["grouped_matmul_weights"] if case.gradients else [])):
        lowering.require_kernel(text, "mosaic_gpu", kernel)
    found = lowering.outside(text)
    assert (found.dots, found.sorts, found.large_gathers(case.avals()["x"].size)) == (0, 0, 0)


def test_tiles_follow_the_rows_of_an_expert():
    chosen = [Tiles().chosen(*shape) for shape in ((96, 1856, 128), (49152, 1856, 128), (8192, 128, 8))]
    assert [(c.rows, c.columns) for c in chosen] == [(64, 128), (128, 256), (128, 128)]
    assert all(2 <= c.stages <= 6 for c in chosen)
    assert Tiles(128, 128, 3).chosen(1, 64, 1) == Tiles(128, 128, 3)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"x": jnp.zeros((4, 64))}, {}, "x must be bfloat16, not float32"),
        ({}, {"operand_dtype": jnp.float32}, "operands must be bfloat16, not float32"),
        ({"w": jnp.zeros((2, 64, 64), jnp.float16)}, {}, "weights must be bfloat16 or float32, not float16"),
        ({"w": jnp.zeros((2, 64, 96), jnp.bfloat16)}, {}, "in multiples of 64, not 64 and 96"),
        ({"x": jnp.zeros((0, 64), jnp.bfloat16)}, {}, "nothing to multiply"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(changes, options, message):
    given = {
        "x": jnp.zeros((4, 64), jnp.bfloat16),
        "w": jnp.zeros((2, 64, 64), jnp.bfloat16),
        "sizes": jnp.array([1, 2]),
    }
    with compat.interpreted(), pytest.raises(ValueError, match=message):
        grouped_matmul(**{**given, **changes}, **options, implementation="mosaic_gpu")


def test_other_devices_are_refused_with_the_reason():
    x, w = jnp.zeros((4, 64), jnp.bfloat16), jnp.zeros((2, 64, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="needs a Hopper GPU, not cpu"):
        grouped_matmul(x, w, jnp.array([1, 2]), implementation="mosaic_gpu")

"""The Hopper kernels of attention without a GPU: interpreted, lowered, and the lists of blocks they visit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import compat
from pallas_kernels.attention import attention, attention_backward, bits, common, mosaic_gpu
from pallas_kernels.attention.blocks import NO_KEY, NO_QUERY, visits, whole
from pallas_kernels.attention.cases import CASES, GRADIENTS, case, packed, tree_case
from pallas_kernels.attention.mask import Marks, visible
from pallas_kernels.attention.tiles import DEFAULTS, Tiles
from pallas_kernels.proof import interpret, lowering, numerics
from tests.kernels.kernel_cases import close
from tests.kernels.proof.poison import must_fail

SMALL = {c.name: c for c in CASES if c.small}
KERNELS = ("attention_forward", "attention_query_gradient", "attention_key_gradients")


@pytest.mark.parametrize("name", SMALL)
def test_interpreted_kernels_agree_with_the_reference_and_repeat(name):
    with compat.interpreted():
        numerics.compare_case(SMALL[name], "mosaic_gpu").require(6e-3)


@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this JAX does not see every race")
@pytest.mark.parametrize("name", SMALL)
def test_there_is_no_race(name):
    chosen = SMALL[name]
    interpret.run(chosen.call("mosaic_gpu"), jax.jit(chosen.inputs)(jax.random.key(1)), races=True)


def test_a_wrong_base_of_the_exponential_is_noticed(monkeypatch):
    must_fail(monkeypatch, common, "LOG2E", 1.5, SMALL["tiny chunk"], "mosaic_gpu")


def test_descendants_in_the_place_of_ancestors_are_noticed(monkeypatch):
    must_fail(
        monkeypatch,
        mosaic_gpu,
        "words",
        lambda mask: bits.words(mask.swapaxes(1, 2)),
        SMALL["tiny tree"],
        "mosaic_gpu",
    )


@given(seed=st.integers(0, 2**31), T=st.integers(1, 9), S=st.integers(1, bits.MOST_KEYS))
def test_the_words_of_a_mask_say_what_it_says(seed, T, S):
    mask = np.random.default_rng(seed).random((2, T, S)) < 0.5
    held, owned = map(np.asarray, bits.words(jnp.asarray(mask)))
    assert held.shape == (2, -(-S // 32), T) and owned.dtype == np.int32
    shared = held[:, :, :, None] & owned[:, :, None, :]
    np.testing.assert_array_equal(shared.any(axis=1), mask)


def test_backward_takes_the_final_sums_of_all_parts():
    """Keys of one half in the layout of a cache, output and log-sum-exp of both halves."""
    draw = [jax.random.normal(jax.random.key(n), (1, 128, 1, 64), jnp.bfloat16) for n in range(4)]
    q, k, v, dout = draw
    ids, positions = packed(1, 128, (100, 28))
    dlse = jax.random.normal(jax.random.key(5), (1, 128, 1))
    places = {"q_positions": positions, "q_segment_ids": ids}
    whole_keys = {"kv_positions": positions, "kv_segment_ids": ids}
    exact = {"return_lse": True, "implementation": "reference"}
    out, lse = attention(q.astype(jnp.float32), k, v, **places, **whole_keys, **exact)
    half = {name: w[:, 64:] for name, w in whole_keys.items()}
    keys, values = k[:, 64:].swapaxes(1, 2), v[:, 64:].swapaxes(1, 2)

    def gradients(implementation):
        operands = (q, keys, values, out, lse, dout)
        return attention_backward(
            *operands, **places, **half, dlse=dlse, kv_layout="BKTD", implementation=implementation
        )

    with compat.interpreted():
        got = jax.jit(lambda: gradients("mosaic_gpu"))()
    for one, other in zip(got, gradients("reference"), strict=True):
        close(one, other, 1e-2)


@pytest.mark.parametrize("d", DEFAULTS)
@pytest.mark.parametrize("masked", [False, True])
def test_forward_and_backward_lower_to_kernels_only(d, masked):
    one = case("lowered", 1, 1000, 4, 2, d, (600, 300), gradients=GRADIENTS, options={"window": 300})
    one = tree_case("lowered", 2, 64, 4, 2, d, gradients=GRADIENTS) if masked else one
    text = lowering.lower_cuda(one.call("mosaic_gpu"), one.avals())
    for kernel in KERNELS:
        lowering.require_kernel(text, "mosaic_gpu", kernel)
    found = lowering.outside(text)
    assert (found.dots, found.sorts, found.large_gathers(1)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"operand_dtype": jnp.float32}, "operands are bfloat16, not float32"),
        ({"mask": jnp.ones((1, 64, 200), bool)}, "a mask of at most 64 keys, not 200"),
        ({"scale": -1.0}, "scale=-1.0 is not positive"),
    ],
)
def test_a_call_that_the_kernel_cannot_run_is_refused(change, reason):
    arrays = SMALL["tiny chunk"].inputs(jax.random.key(0))
    with compat.interpreted(), pytest.raises(ValueError, match=reason):
        attention(**arrays, **change, implementation="mosaic_gpu")


def test_other_head_sizes_and_other_devices_are_refused():
    arrays = SMALL["tiny chunk"].inputs(jax.random.key(0))
    narrow = {name: w[..., :32] if w.ndim == 4 else w for name, w in arrays.items()}
    with compat.interpreted(), pytest.raises(ValueError, match="head dimension 32"):
        attention(**narrow, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="mosaic_gpu: it needs a Hopper GPU, not cpu"):
        attention(**arrays, implementation="mosaic_gpu")


@pytest.mark.parametrize("window", [None, 5])
@given(seed=st.integers(0, 2**31), ordered=st.booleans())
def test_the_blocks_left_out_hold_nothing_visible_and_the_free_ones_everything(window, seed, ordered):
    rng = np.random.default_rng(seed)
    T, S, block_q, block_kv = 19, 26, 4, 6
    ids = [rng.integers(0, 4, n).astype(np.int32) for n in (T, S)]
    positions = [rng.integers(0, 12, n).astype(np.int32) for n in (T, S)]
    if ordered:
        ids, positions = [np.sort(w) for w in ids], [np.sort(w) for w in positions]
    ids, positions = ([jnp.asarray(w)[None] for w in pair] for pair in (ids, positions))
    seen = np.asarray(visible(Marks(*positions, *ids), window))[0]
    padded = np.zeros((20, 30), bool)
    padded[:T, :S] = seen
    blocks = padded.reshape(5, block_q, 5, block_kv).swapaxes(1, 2)
    queries = whole(ids[0], positions[0], block_q, NO_QUERY)
    keys = whole(ids[1], positions[1], block_kv, NO_KEY)
    for by_key in (False, True):
        order, counts = jax.tree.map(
            np.asarray, visits(queries, keys, block_q, block_kv, window, by_key=by_key)
        )
        pairs = blocks.swapaxes(0, 1) if by_key else blocks
        for i in range(5):
            free, total = counts[0, i]
            listed = order[0, i, :total].tolist()
            assert len(set(listed)) == total
            assert all(pairs[i, j].all() for j in listed[:free])
            assert not any(pairs[i, j].any() for j in range(5) if j not in listed)


def test_blocks_of_other_documents_and_beyond_the_window_are_left_out():
    ids, positions = packed(1, 64, (32, 32))
    queries, keys = whole(ids, positions, 8, NO_QUERY), whole(ids, positions, 8, NO_KEY)
    assert visits(queries, keys, 8, 8, None).counts[0].tolist() == [[i % 4, i % 4 + 1] for i in range(8)]
    assert visits(queries, keys, 8, 8, 10).counts[0, :4].tolist() == [[0, 1], [0, 2], [0, 3], [0, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_kv": 80}, "block_kv=80: expected 64, 128"),
        ({"stages": 0}, "stages=0"),
    ],
)
def test_tiles_that_no_kernel_has_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**{"block_kv": 128, **change})

"""Plans of context parallelism against brute force over tokens, and the figures that they promise."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.context import (
    DIAGONAL,
    FULL,
    ROUNDS,
    SEGMENT,
    STRATEGIES,
    Capacity,
    Links,
    Plan,
    PlanConfig,
    draw_lengths,
    layout,
    make_plan,
)
from tests.parallel.brute_force import computed, visible

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
CONFIGS = st.builds(
    PlanConfig,
    workers=st.integers(1, 8),
    block=st.integers(1, 9),
    strategy=st.sampled_from(STRATEGIES),
    links=st.sampled_from([Links(), Links(node=2, between=9.0), Links(node=3, between=2.0)]),
    stage_rounds=st.sampled_from([1, 3, 16]),
    rounds=st.sampled_from(ROUNDS),
)
BALANCED = [("fcp", 1.03), ("fcp-pairs", 1.05)]


@given(LENGTHS, CONFIGS)
def test_every_pair_of_tokens_is_computed_once(lengths, config):
    plan = make_plan(lengths, config)
    np.testing.assert_array_equal(computed(plan, sum(lengths)), visible(lengths))


@given(LENGTHS, CONFIGS)
def test_blocks_and_their_neighbours(lengths, config):
    plan = make_plan(lengths, config)
    where, arrays = layout(plan), plan.arrays
    filled = where.index[where.index >= 0]
    assert sorted(filled) == list(range(sum(lengths)))
    segment = np.repeat(np.arange(len(lengths)), lengths)
    np.testing.assert_array_equal(where.segment_ids[where.index >= 0], segment[filled] + 1)
    assert (where.segment_ids[where.index < 0] == 0).all()
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    np.testing.assert_array_equal(where.positions[where.index >= 0], filled - starts[segment[filled]])
    # Only a document's last block is short.
    ends = arrays.position + arrays.length
    there = arrays.length > 0
    assert ((arrays.length == config.block) | (ends == np.asarray(lengths)[arrays.document]))[there].all()
    order = arrays.order[arrays.order >= 0]
    assert len(order) == there.sum()
    np.testing.assert_array_equal(arrays.start.reshape(-1)[order], np.sort(arrays.start[there]))
    for earlier, later in zip([-1, *order], order):
        begins = arrays.position.reshape(-1)[later] == 0
        assert arrays.previous.reshape(-1)[later] == (-1 if begins else earlier)
    # A document's tail stands before whole documents, so that what it continues enters at a slot's begin.
    for worker in range(config.workers):
        for slot in range(plan.capacity.slots):
            mine = (arrays.slot[worker] == slot) & there[worker]
            place = np.argsort(arrays.offset[worker][mine])
            begins = (arrays.position[worker][mine][place] == 0).astype(int)
            assert (np.diff(begins) >= 0).all()


@given(LENGTHS, CONFIGS)
def test_rounds_are_partial_permutations_and_few(lengths, config):
    plan = make_plan(lengths, config)
    arrays = plan.arrays
    # Counted without the planner: of each worker's documents all full blocks before its last one, less its own.
    held = {(w, d, p) for w, d, p in zip(*_blocks(plan))}
    last: dict[tuple[int, int], int] = {}
    for worker, document, position in held:
        last[worker, document] = max(last.get((worker, document), 0), position)
    owner = {(d, p): w for w, d, p in held}
    needed = {
        (owner[d, p], w, d, p)
        for (w, d), end in last.items()
        for p in range(0, end, config.block)
        if owner[d, p] != w
    }
    sent = [(a, int(n)) for a, n in zip(*np.nonzero(arrays.send_to >= 0))]
    moved = set()
    for sender, number in sent:
        receiver = int(arrays.send_to[sender, number])
        assert arrays.receive_from[receiver, number] == sender != receiver
        piece = np.flatnonzero(
            (arrays.slot[sender] == arrays.send_slot[sender, number]) & (arrays.length[sender] > 0)
        )
        assert len(piece) == 1
        moved.add(
            (
                sender,
                receiver,
                int(arrays.document[sender, piece[0]]),
                int(arrays.position[sender, piece[0]]),
            )
        )
    assert (arrays.receive_from >= 0).sum() == len(sent) == len(moved) == len(needed)
    assert moved == needed
    outs = np.bincount([s for s, _, _, _ in needed] or [0], minlength=config.workers)
    ins = np.bincount([r for _, r, _, _ in needed] or [0], minlength=config.workers)
    degree = max(outs.max(), ins.max()) if needed else 0
    used = np.flatnonzero((arrays.send_to >= 0).any(0))
    assert plan.balance.degree == degree
    assert plan.balance.rounds == len(used)
    if config.rounds == "matchings":
        assert plan.capacity.shifts == () and len(used) <= degree
        np.testing.assert_array_equal(used, np.arange(len(used)))
        return
    shifts = np.zeros((config.workers, config.workers), np.int64)
    for sender, receiver, _, _ in needed:
        shifts[(receiver - sender) % config.workers, sender] += 1
    assert len(used) == shifts.max(1).sum()
    assert all(given >= need for given, need in zip(plan.capacity.shifts, shifts.max(1)[1:], strict=True))
    for sender, number in sent:
        shift = plan.capacity.shift_of_round[number]
        assert arrays.send_to[sender, number] == (sender + shift) % config.workers != sender


@given(LENGTHS, CONFIGS)
def test_receivers_know_what_comes_and_where_it_stands(lengths, config):
    plan = make_plan(lengths, config)
    where, arrays, group = layout(plan), plan.arrays, plan.capacity.stage_rounds
    columns = ("slot", "row", "document", "position")
    for receiver, number in zip(*np.nonzero(arrays.receive_from >= 0)):
        sender = arrays.receive_from[receiver, number]
        slot = arrays.receive_slot[receiver, number]
        ramp = arrays.receive_position[receiver, number] + np.arange(config.block)
        np.testing.assert_array_equal(where.positions[sender, slot], ramp)
        np.testing.assert_array_equal(
            where.segment_ids[sender, slot], arrays.receive_document[receiver, number] + 1
        )
        stage = slice(number // group * group, (number // group + 1) * group)
        # Sorted by the other end, then by round.
        inbox = sorted((s, r) for r, s in enumerate(arrays.receive_from[receiver, stage]) if s >= 0)
        outbox = sorted((s, r) for r, s in enumerate(arrays.send_to[sender, stage]) if s >= 0)
        assert inbox[arrays.send_row[sender, number]] == (sender, number % group)
        assert outbox[arrays.receive_row[receiver, number]] == (receiver, number % group)
    for name in columns:
        idle = arrays.receive_from < 0
        assert (getattr(arrays, f"receive_{name}")[idle] == -1).all()
    assert (arrays.send_row[arrays.send_to < 0] == -1).all()


def _blocks(plan: Plan) -> tuple[list[int], list[int], list[int]]:
    worker, column = np.nonzero(plan.arrays.length)
    document, position = plan.arrays.document[worker, column], plan.arrays.position[worker, column]
    return worker.tolist(), document.tolist(), position.tolist()


@given(LENGTHS, CONFIGS, st.sampled_from(["fcp", "fcp-pairs", "ring"]))
def test_memory_is_within_one_block_of_equal(lengths, config, strategy):
    plan = make_plan(lengths, replace(config, strategy=strategy))
    held = plan.arrays.length.sum(1)
    assert np.abs(held - held.mean()).max() <= config.block
    assert plan.balance.tokens == pytest.approx(np.abs(held - held.mean()).max() / config.block)


@pytest.mark.parametrize(("strategy", "limit"), BALANCED)
@pytest.mark.parametrize("distribution", ["log-normal", "magiattention"])
@pytest.mark.parametrize(("workers", "each"), [(2, 65_536), (8, 32_768), (64, 65_536), (256, 32_768)])
def test_work_is_balanced_on_long_tailed_lengths(distribution, workers, each, strategy, limit, seed):
    lengths = draw_lengths(distribution, workers * each, seed)
    plan = make_plan(lengths, PlanConfig(workers, strategy=strategy, links=Links(node=8, between=9.0)))
    arrays = plan.arrays
    length, position = arrays.length.astype(np.int64), arrays.position
    work = (length * position + length * (length + 1) // 2).sum(1)
    assert work.sum() == sum(int(n) * (int(n) + 1) // 2 for n in lengths)
    assert plan.balance.work_over_mean == pytest.approx(work.max() / work.mean())
    due = max(work.mean(), plan.placement.largest)
    assert plan.balance.work == pytest.approx(work.max() / due)
    # On few workers one block may be a worker's whole due, and memory still wants other blocks beside it.
    assert work.max() <= limit * (due if workers > 8 else max(due, _with_company(plan)))
    slots = np.sort(np.bincount(np.unique(plan.placement.group, return_inverse=True)[1], plan.blocks.work))
    assert plan.placement.largest <= slots[-1 if strategy == "fcp" else -2 :].sum()
    assert np.abs(length.sum(1) - length.sum(1).mean()).max() <= plan.capacity.block
    assert plan.balance.rounds == plan.balance.degree
    assert plan.capacity.slots <= -(-len(slots) // workers) + 1
    assert plan.balance.padding == pytest.approx(
        1 - plan.blocks.tokens / (workers * plan.capacity.slots * 4096)
    )
    assert plan.balance.padding < 0.25


def test_poorly_filled_slots_do_not_gather_at_one_worker():
    # A draw where tokens and work alone gave one worker 11 slots and the others 8 or 9, so that all computed 11.
    lengths = draw_lengths("log-normal", 8 * 32_768, 1446665038)
    for strategy in ("fcp", "fcp-pairs"):
        assert make_plan(lengths, PlanConfig(8, strategy=strategy)).capacity.slots <= 10


def _with_company(plan: Plan) -> float:
    """Work of whoever holds the largest slot, with the least that fills its memory to one block under the mean."""
    slot = np.unique(plan.placement.group, return_inverse=True)[1]
    work, tokens = np.bincount(slot, plan.blocks.work), np.bincount(slot, plan.blocks.length)
    order = np.argsort(work / tokens)
    order = order[order != work.argmax()]
    need = plan.blocks.tokens / plan.capacity.workers - plan.capacity.block - tokens[work.argmax()]
    before = np.cumsum(tokens[order]) - tokens[order]
    taken = np.clip((need - before) / tokens[order], 0, 1)
    return float(work.max() + (taken * work[order]).sum())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_short_documents_never_travel(strategy, seed):
    rng = np.random.default_rng(seed)
    plan = make_plan(rng.integers(1, 65, 200), PlanConfig(8, block=64, strategy=strategy))
    assert plan.balance.transfers == plan.balance.rounds == plan.capacity.stages == 0


def test_pairs_ease_the_busiest_sender(seed):
    """Over many batches: owners of early blocks of several documents serve everybody, in three batches of four."""
    batches = [draw_lengths("log-normal", 256 * 32_768, seed + i) for i in range(32)]
    degrees = {
        strategy: sum(
            make_plan(lengths, PlanConfig(256, strategy=strategy)).balance.degree for lengths in batches
        )
        for strategy in ("fcp", "fcp-pairs")
    }
    assert degrees["fcp-pairs"] < degrees["fcp"]


def test_document_keeps_documents_whole_that_fit(seed):
    lengths = draw_lengths("magiattention", 8 * 32_768, seed)
    plan = make_plan(lengths, PlanConfig(8, strategy="document"))
    for document in np.flatnonzero(lengths <= lengths.sum() / 8):
        assert (plan.arrays.document == document).any(1).sum() == 1


def test_ring_of_one_document_is_contiguous_and_zigzag_is_folded():
    def owners(strategy):
        plan = make_plan([64], PlanConfig(4, block=4, strategy=strategy))
        flat = plan.arrays.order[plan.arrays.order >= 0]
        return (flat // plan.capacity.pieces).tolist()

    assert owners("ring") == [w for w in range(4) for _ in range(4)]
    assert owners("zigzag") == [w for w in (0, 1, 2, 3, 3, 2, 1, 0) for _ in range(2)]


def test_slow_links_get_as_few_rounds_as_they_can(seed):
    lengths = draw_lengths("log-normal", 32 * 32_768, seed)
    links = Links(node=8, between=9.0)
    plan = make_plan(lengths, PlanConfig(32, links=links))
    slow = links.crossing(plan.moves)
    ends = (
        np.bincount(plan.moves.sender[slow], minlength=32),
        np.bincount(plan.moves.receiver[slow], minlength=32),
    )
    fewest = max(ends[0].max(), ends[1].max())
    used = len(np.unique(plan.rounds[slow]))
    blind = make_plan(lengths, PlanConfig(32))
    assert fewest <= used <= len(np.unique(blind.rounds[links.crossing(blind.moves)]))
    assert plan.balance.cost == pytest.approx(9 * used + (plan.balance.rounds - used))


@pytest.mark.parametrize("rounds", ROUNDS)
def test_plans_are_pure_and_share_shapes_in_a_capacity(rounds, seed):
    config = PlanConfig(8, block=64, rounds=rounds)
    plans = [make_plan(draw_lengths("log-normal", 32_768, seed + i), config) for i in range(3)]
    again = make_plan(draw_lengths("log-normal", 32_768, seed), config)
    for one, other in zip(plans[0].arrays, again.arrays):
        np.testing.assert_array_equal(one, other)
    common = plans[0].capacity.enlarged(plans[1].capacity).enlarged(plans[2].capacity)
    for i, plan in enumerate(plans):
        wide = make_plan(draw_lengths("log-normal", 32_768, seed + i), config, at_least=common)
        assert wide.capacity == common
        shapes = [(array.shape, array.dtype) for array in wide.arrays]
        assert shapes == [
            (a.shape, a.dtype) for a in make_plan([64], config, at_least=common).arrays
        ] and all(dtype == np.int32 for _, dtype in shapes)
        assert wide.balance.work == plan.balance.work


@pytest.mark.parametrize("rounds", ROUNDS)
def test_wide_capacities_compute_the_same_pairs(rounds):
    config = PlanConfig(4, block=4, stage_rounds=2, rounds=rounds)
    capacity = make_plan([90, 7, 3], config).capacity
    lengths = [21, 9, 2, 6]
    plan = make_plan(lengths, config, at_least=capacity)
    assert plan.capacity.slots >= capacity.slots > make_plan(lengths, config).capacity.slots
    np.testing.assert_array_equal(computed(plan, sum(lengths)), visible(lengths))


def test_kinds_say_what_needs_no_mask():
    arrays = make_plan([40, 3, 3], PlanConfig(2, block=8)).arrays
    kinds = arrays.work[arrays.work[..., 0] >= 0][:, 2]
    # Five full blocks: ten pairs below the diagonal, none of which needs a mask; two short documents share a slot.
    assert (kinds == FULL).sum() == 10 and (kinds == SEGMENT).sum() == 0 and (kinds == DIAGONAL).sum() == 6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_plan([], PlanConfig(2)), "at least one document"),
        (lambda: make_plan([3, 0], PlanConfig(2)), r"lengths\[1\]=0"),
        (lambda: make_plan(np.array([2.5]), PlanConfig(2)), "float64"),
        (lambda: make_plan([2**30, 2**30], PlanConfig(2, block=2**20)), "2,147,483,648"),
        (lambda: PlanConfig(0), "workers=0"),
        (lambda: PlanConfig(2, block=0), "block=0"),
        (lambda: PlanConfig(2, tolerance=-1.0), "tolerance=-1"),
        (lambda: PlanConfig(2, strategy="star"), "star.*fcp, fcp-pairs, ring"),
        (lambda: PlanConfig(2, rounds="switch"), "switch.*matchings, rotations"),
        (lambda: Capacity(3, 4, 1, 1, 1, 2, 1, (1,)), r"shifts=\(1,\): must be 2 numbers"),
        (lambda: Capacity(3, 4, 1, 1, 1, 2, 1, (2, 1)), r"shifts=\(2, 1\): must be at most 2"),
        (
            lambda: make_plan([9], PlanConfig(2, block=4), at_least=Capacity(2, 4, 1, 1, 1, 16, 1, (1,))),
            r"shifts=\(1,\): must be 0 numbers",
        ),
        (lambda: Links(node=-1), "node=-1"),
        (lambda: Links(between=0.0), "between=0"),
        (lambda: draw_lengths("zipf", 10, 0), "zipf.*log-normal"),
        (lambda: draw_lengths("log-normal", 0, 0), "tokens=0"),
        (
            lambda: make_plan([3], PlanConfig(2, block=4), at_least=Capacity(3, 4, 1, 1, 0, 16, 1)),
            "workers=3: must be the plan's 2",
        ),
    ],
)
def test_errors_name_what_was_given(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", ["log-normal", "magiattention"])
def test_drawn_lengths_fill_the_batch(name, seed):
    lengths = draw_lengths(name, 500_000, seed)
    assert lengths.sum() == 500_000 and lengths.min() >= 1
    np.testing.assert_array_equal(lengths, draw_lengths(name, 500_000, seed))
    assert (lengths[:-1] >= 64).all()


def test_the_histogram_is_the_published_one(seed):
    lengths = draw_lengths("magiattention", 60_000_000, seed)
    assert (lengths <= 500).mean() == pytest.approx(0.468, abs=0.02)
    assert (lengths <= 4096).mean() == pytest.approx(0.944, abs=0.01)

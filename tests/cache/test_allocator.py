"""Requests, pages, slots and snapshots: what is shared, copied, refused and given back, case by case."""

import jax
import numpy as np
import pytest

from jaxllm.cache.allocator import Allocator
from jaxllm.cache.audit import check, usage
from jaxllm.cache.sizes import CacheFull, Group, OutOfPages, OutOfSlots, Sizes
from jaxllm.config import ConfigError
from tests.cache.allocator_world import books

FULL = Group("full", pages=16, pages_per_slot=8, page_bytes=100)
EVICTS = Group("evicts", pages=12, pages_per_slot=6, evicts=True)


def attention(**changes) -> Allocator:
    return Allocator(Sizes(**{"slots": 4, "page": 4, "groups": (FULL,)} | changes))


def hybrid(snapshots: int = 2, grid: int = 8) -> Allocator:
    return attention(snapshots=snapshots, grid=grid)


def served(allocator: Allocator, tokens: list[int], key=(None, None), *, publish: bool = True) -> int:
    """A request whose prompt was read in steps of 4 tokens."""
    slot, read, _ = allocator.admit(tokens, key)
    allocator.flush()
    for start in range(read, len(tokens), 4):
        allocator.append(slot, tokens[start : start + 4])
        if publish:
            allocator.publish(slot)
    return slot


def pages(allocator: Allocator, slot: int, group: int = 0) -> tuple[int, ...]:
    return allocator.held[slot].pages[group]


class TestAdmission:
    def test_takes_the_lowest_slot_and_pages_for_the_prompt(self):
        allocator = attention()
        assert [allocator.admit([0] * n).slot for n in (9, 4, 3)] == [0, 1, 2]
        assert [len(pages(allocator, slot)) for slot in range(3)] == [2, 1, 0]
        allocator.release(1)
        assert allocator.admit([0]).slot == 1

    def test_tells_the_device_tables_and_fresh_slots(self):
        allocator = attention()
        allocator.admit([0] * 9)
        update = allocator.flush()
        assert update.slots.tolist() == [0]
        assert update.tables[0].tolist() == [[0, 1, *[16] * 6]]
        assert [each.tolist() for each in update.starts] == [[0], [0], [-1], [-1]]
        assert allocator.flush().empty

    def test_of_a_released_slot_the_row_names_no_page(self):
        allocator = attention()
        slot = served(allocator, [0] * 9)
        allocator.release(slot)
        update = allocator.flush()
        assert update.slots.tolist() == [0] and (update.tables[0] == 16).all()
        assert not len(update.starts.slots)

    def test_every_group_gets_its_pages_or_none_does(self):
        small = Group("small", pages=3, pages_per_slot=3)
        allocator = attention(groups=(FULL, small))
        allocator.admit([0] * 8)
        before = books(allocator)
        with pytest.raises(OutOfPages) as caught:
            allocator.admit([0] * 8)
        error = caught.value
        assert (error.group, error.needed, error.free, error.pages) == ("small", 2, 1, 3)
        assert str(error) == (
            "group 'small': 2 pages needed, 1 of 3 free or idle; release or preempt a request, wait until one ends, "
            "or build the cache with more pages"
        )
        assert books(allocator) == before

    def test_without_a_slot_nothing_changes(self):
        allocator = attention(slots=1)
        allocator.admit([0])
        before = books(allocator)
        with pytest.raises(OutOfSlots, match="all 1 slots are held; release a request"):
            allocator.admit([0])
        with pytest.raises(OutOfSlots):
            allocator.fork(0)
        assert books(allocator) == before

    def test_reserved_pages_are_there_when_they_are_needed(self):
        allocator = attention(groups=(Group("full", pages=8, pages_per_slot=8),))
        slot = allocator.admit([0] * 5, reserve=[20]).slot
        assert len(pages(allocator, slot)) == 5
        allocator.admit([0] * 12)
        allocator.flush()
        allocator.append(slot, [0] * 5)
        with pytest.raises(OutOfPages):
            allocator.grow(1, 16)
        allocator.grow(slot, 15)

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda a: a.admit([]), "prompt=.*at least one token"),
            (lambda a: a.admit([0] * 36), "tokens=36: a request in group 'full' stores at most 35"),
            (lambda a: a.admit([0], reserve=[36]), "tokens=36"),
            (lambda a: a.admit([0], reserve=[1, 1]), "reserve=.*one for each of 1 groups"),
            (lambda a: a.release(3), "slot=3: no request holds it"),
            (lambda a: a.grow(0, 35), "tokens=36"),
            (lambda a: a.grow(0, -1), "tokens=-1"),
            (lambda a: a.append(0, [0] * 8), "grow it before the step"),
            (lambda a: a.shrink(0, 0, 0), "group='full': its policy never evicts"),
        ],
    )
    def test_what_cannot_be_is_refused(self, call, words):
        allocator = attention()
        served(allocator, [0])
        before = books(allocator)
        with pytest.raises(ConfigError, match=words):
            call(allocator)
        assert books(allocator) == before

    def test_a_step_before_the_update_is_refused(self):
        allocator = attention()
        allocator.admit([0] * 4)
        with pytest.raises(ConfigError, match="must be flushed before a step"):
            allocator.append(0, [0])


class TestRuns:
    def test_slots_that_own_their_pages_are_consecutive_however_they_grow(self):
        allocator = attention(slots=2)
        for length in (5, 3):
            served(allocator, [length] * length)
        for _ in range(6):
            for slot in (0, 1):
                allocator.grow(slot, 4)
                allocator.flush()
                allocator.append(slot, [9] * 4)
        assert pages(allocator, 0) == tuple(range(7)) and pages(allocator, 1) == tuple(range(8, 14))
        assert allocator.consecutive(0, 0) and allocator.consecutive(1, 0)

    def test_a_run_elsewhere_is_preferred_to_pieces_at_home(self):
        allocator = attention(prefixes=False)
        for _ in range(4):
            allocator.admit([0] * 12)
        for slot in (0, 2):
            allocator.release(slot)
        allocator.release(3)
        assert pages(allocator, 1) == (4, 5, 6)
        slot = allocator.admit([0] * 32).slot
        assert slot == 0 and pages(allocator, slot) == tuple(range(7, 15))
        assert allocator.consecutive(slot, 0)

    def test_pieces_are_taken_where_no_run_is_long_enough(self):
        allocator = attention(groups=(Group("full", pages=8, pages_per_slot=8),))
        for _ in range(4):
            allocator.admit([0] * 4)
        allocator.release(1)
        allocator.release(3)
        slot = allocator.admit([0] * 20).slot
        assert pages(allocator, slot) == (2, 3, 5, 6, 7)
        assert not allocator.consecutive(slot, 0)


class TestPrefixes:
    def test_full_pages_are_shared_and_the_last_token_is_read(self):
        allocator = attention()
        first = served(allocator, list(range(12)))
        for length, shared in ((12, 8), (13, 12), (9, 8), (4, 0), (3, 0)):
            got = allocator.admit(list(range(length)))
            assert got.tokens == shared
            assert pages(allocator, got.slot)[: shared // 4] == pages(allocator, first)[: shared // 4]
            allocator.release(got.slot)

    def test_what_comes_later_is_not_seen(self):
        allocator = attention()
        first = served(allocator, list(range(9)))
        second = served(allocator, [*range(8), 99, 98, 97, 96])
        assert pages(allocator, second)[:2] == pages(allocator, first)[:2]
        assert pages(allocator, second)[2] not in pages(allocator, first)
        assert allocator.admit([*range(8), 99, 98, 97, 96, 0]).tokens == 12
        assert usage(allocator)["full"].shared == 3

    @pytest.mark.parametrize("key", [("lora", None), (None, "tenant"), ("None", None), (None, "None")])
    def test_adapters_and_tenants_share_nothing(self, key):
        allocator = attention(slots=5)
        served(allocator, list(range(9)))
        assert allocator.admit(list(range(9)), key).tokens == 0
        # Each finds its own, though the texts are equal.
        served(allocator, list(range(9)), key)
        assert [allocator.admit(list(range(9)), each).tokens for each in ((None, None), key)] == [8, 8]

    def test_unpublished_pages_are_not_found(self):
        allocator = attention()
        served(allocator, list(range(9)), publish=False)
        assert allocator.admit(list(range(9))).tokens == 0

    def test_prefixes_outlive_their_request_and_leave_from_their_ends(self):
        allocator = attention(groups=(Group("full", pages=8, pages_per_slot=8),))
        for first in (0, 100):
            allocator.release(served(allocator, list(range(first, first + 17))))
        assert usage(allocator)["full"].cached == 8
        # The younger one is used once more: the older is given up first, its last page before its first.
        allocator.release(allocator.admit(list(range(9))).slot)
        allocator.release(allocator.admit([7] * 8).slot)
        assert allocator.prefixes.find((None, None), np.arange(0, 17, dtype=np.int32).tobytes(), 4)[2:] == []
        check(allocator)

    def test_the_longest_idle_prefix_is_given_up_first(self):
        allocator = attention(groups=(Group("full", pages=8, pages_per_slot=8),))
        prompts = [[name] * 9 for name in range(4)]
        for prompt in prompts:
            allocator.release(served(allocator, prompt))
        allocator.release(allocator.admit(prompts[0]).slot)
        slot = allocator.admit([9] * 12).slot  # three pages: both of prompt 1, and the end of prompt 2
        allocator.release(slot)
        assert [allocator.admit(prompt).tokens for prompt in prompts] == [8, 0, 4, 8]

    def test_prefixes_in_use_are_not_given_up(self):
        allocator = attention(groups=(Group("full", pages=4, pages_per_slot=4),))
        served(allocator, list(range(9)))
        with pytest.raises(OutOfPages, match="3 pages needed, 2 of 4"):
            allocator.admit([5] * 12)
        assert allocator.admit(list(range(9))).tokens == 8

    def test_the_same_text_read_twice_is_published_once(self):
        allocator = attention()
        slots = [allocator.admit(list(range(9))).slot for _ in range(2)]
        allocator.flush()
        for slot in slots:
            allocator.append(slot, range(9))
        assert [allocator.publish(slot) for slot in slots] == [2, 0]
        allocator.release(slots[1])
        assert usage(allocator)["full"].used == 2
        check(allocator)

    def test_pages_behind_anothers_are_one_chain_with_it(self):
        allocator = attention()
        first, second = (allocator.admit(list(range(9))).slot for _ in range(2))
        allocator.flush()
        allocator.append(first, range(4))
        allocator.append(second, range(8))
        assert [allocator.publish(slot) for slot in (first, second)] == [1, 1]
        check(allocator)
        assert pages(allocator, allocator.admit(list(range(9))).slot) == (
            pages(allocator, first)[0],
            pages(allocator, second)[1],
        )

    def test_a_published_page_behind_anothers_goes_when_that_is_needed(self):
        allocator = attention(groups=(Group("full", pages=6, pages_per_slot=6),))
        first, second = (allocator.admit(list(range(5))).slot for _ in range(2))
        allocator.flush()
        for slot in (first, second):
            allocator.append(slot, range(5))
            allocator.publish(slot)
        allocator.grow(second, 3)
        allocator.flush()
        allocator.append(second, [5, 6, 7])
        assert allocator.publish(second) == 1
        allocator.release(first)
        assert allocator.admit([9] * 16).tokens == 0
        check(allocator)
        assert not allocator.prefixes.nodes

    def test_equal_digests_of_different_texts_share_nothing(self):
        def constant(parent, content):
            return b"same"

        allocator = Allocator(Sizes(slots=4, page=4, groups=(FULL,)), digest=constant)
        served(allocator, list(range(9)))
        assert len(allocator.prefixes.nodes) == 1
        assert allocator.admit([7] * 9).tokens == 0
        assert allocator.admit(list(range(9)), ("lora", None)).tokens == 0
        assert allocator.admit(list(range(9))).tokens == 4
        check(allocator)

    def test_equal_pages_behind_different_texts_share_nothing(self):
        allocator = Allocator(
            Sizes(slots=4, page=4, groups=(FULL,)), digest=lambda parent, content: content[:4]
        )
        served(allocator, [1] * 4 + [5] * 4)
        served(allocator, [2] * 4)
        assert allocator.admit([2] * 4 + [5] * 5).tokens == 4
        assert allocator.admit([1] * 4 + [5] * 5).tokens == 8

    def test_equal_pages_one_behind_the_other_are_two(self):
        allocator = Allocator(
            Sizes(slots=4, page=4, groups=(FULL,)), digest=lambda parent, content: content[:4]
        )
        served(allocator, [1] * 8)
        assert len(allocator.prefixes.nodes) == 1
        assert allocator.admit([1] * 9).tokens == 4
        constant = Allocator(Sizes(slots=4, page=4, groups=(FULL,)), digest=lambda parent, content: b"same")
        served(constant, [1] * 8)
        assert constant.admit([1] * 9).tokens == 4

    def test_chains_may_be_long(self):
        allocator = attention(groups=(Group("full", pages=2000, pages_per_slot=2000),), page=1)
        prompt = list(range(1500))
        slot = allocator.admit(prompt).slot
        allocator.flush()
        allocator.append(slot, prompt)
        assert allocator.publish(slot) == 1500
        allocator.release(slot)
        assert allocator.admit(prompt).tokens == 1499


class TestSnapshots:
    def test_a_prefix_is_used_only_up_to_a_snapshot(self):
        allocator = hybrid()
        served(allocator, list(range(15)))
        update = allocator.flush()
        assert [each.tolist() for each in update.saves] == [[0], [0]]
        for length, shared in ((8, 0), (9, 8), (15, 8), (32, 8)):
            got = allocator.admit(list(range(length)))
            assert (got.tokens, got.snapshot) == ((8, 0) if shared else (0, None))
            update = allocator.flush()
            assert update.starts.state.tolist() == [4 + 0 if shared else -1]
            allocator.release(got.slot)

    def test_off_the_grid_nothing_is_published(self):
        allocator = hybrid()
        slot = allocator.admit(list(range(12))).slot
        allocator.flush()
        allocator.append(slot, range(12))
        assert allocator.publish(slot) == 0 and not allocator.prefixes.nodes

    def test_the_least_recently_used_snapshot_makes_way_with_its_pages(self):
        allocator = hybrid()
        prompts = [[name] * 9 for name in range(3)]
        for prompt in prompts[:2]:
            allocator.release(served(allocator, prompt))
        allocator.release(allocator.admit(prompts[0]).slot)
        allocator.release(served(allocator, prompts[2]))
        assert usage(allocator)["full"].cached == 4
        assert [allocator.admit(prompt).tokens for prompt in prompts] == [8, 0, 8]
        check(allocator)

    def test_snapshots_of_running_requests_stay(self):
        allocator = hybrid(snapshots=1)
        allocator.release(served(allocator, [0] * 9))
        user = allocator.admit([0] * 9).slot
        other = served(allocator, [1] * 9)
        check(allocator)
        assert allocator.admit([1] * 9).tokens == 0
        allocator.release(user)
        allocator.release(other)
        allocator.release(served(allocator, [2] * 9))
        assert allocator.admit([2] * 9).tokens == 8

    def test_publishing_the_same_again_is_a_use(self):
        allocator = hybrid()
        twins = [allocator.admit([0] * 9).slot for _ in range(2)]
        allocator.flush()
        for slot in twins:
            allocator.append(slot, [0] * 8)
        allocator.publish(twins[0])
        allocator.release(served(allocator, [1] * 9))
        assert allocator.publish(twins[1]) == 0
        allocator.release(served(allocator, [2] * 9))
        for name, shared in enumerate((8, 0, 8)):
            got = allocator.admit([name] * 9)
            assert got.tokens == shared
            allocator.release(got.slot)

    def test_a_snapshot_before_another_one_survives_it(self):
        allocator = hybrid(snapshots=2)
        allocator.release(served(allocator, list(range(17))))
        assert allocator.admit(list(range(17))).tokens == 16
        assert allocator.admit(list(range(12))).tokens == 8

    def test_the_snapshot_that_makes_way_may_stand_behind_the_new_one(self):
        allocator = hybrid(snapshots=1)
        slots = [allocator.admit(list(range(17))).slot for _ in range(2)]
        allocator.flush()
        allocator.append(slots[0], range(16))
        assert allocator.publish(slots[0]) == 4
        allocator.append(slots[1], range(8))
        assert allocator.publish(slots[1]) == 2
        check(allocator)
        assert allocator.admit(list(range(17))).tokens == 8

    def test_without_places_or_with_eviction_nothing_is_shared(self):
        for allocator in (hybrid(snapshots=0), attention(groups=(FULL, EVICTS))):
            slot = served(allocator, list(range(9)))
            assert allocator.publish(slot) == 0
            assert allocator.admit(list(range(9))).tokens == 0

    def test_a_model_without_attention_shares_its_states(self):
        allocator = attention(groups=(), snapshots=2, grid=8)
        served(allocator, list(range(9)))
        assert allocator.admit(list(range(12))).snapshot == 0
        check(allocator)


class TestFork:
    def test_full_pages_are_shared_and_tails_are_copied(self):
        allocator = hybrid()
        parent = served(allocator, list(range(10)))
        child = allocator.fork(parent)
        assert (child.slot, child.tokens) == (1, 10)
        assert pages(allocator, child.slot) == pages(allocator, parent)
        update = allocator.flush()
        assert [each.tolist() for each in update.starts] == [[1], [10], [0], [0]]
        assert not len(update.copies[0].target)

    def test_then_both_go_their_ways(self):
        allocator = attention()
        parent = served(allocator, list(range(10)))
        child = allocator.fork(parent).slot
        for slot, token in ((parent, 50), (child, 60)):
            allocator.grow(slot, 6)
            allocator.flush()
            allocator.append(slot, [token] * 6)
            allocator.publish(slot)
        assert pages(allocator, child)[:2] == pages(allocator, parent)[:2]
        assert not set(pages(allocator, child)[2:]) & set(pages(allocator, parent)[2:])
        assert allocator.admit([*range(10), *[50] * 7]).tokens == 16
        assert allocator.admit([*range(10), *[60] * 7]).tokens == 16
        allocator.release(parent)
        check(allocator)

    def test_reserved_pages_are_the_childs_own(self):
        allocator = attention()
        parent = allocator.admit(list(range(5)), reserve=[16]).slot
        allocator.flush()
        allocator.append(parent, range(5))
        child = allocator.fork(parent).slot
        assert len(pages(allocator, child)) == 4
        assert set(pages(allocator, child)) & set(pages(allocator, parent)) == {pages(allocator, parent)[0]}

    def test_pages_that_will_be_rewritten_are_copied(self):
        allocator = attention(groups=(FULL, EVICTS))
        parent = served(allocator, list(range(10)))
        child = allocator.fork(parent).slot
        update = allocator.flush()
        assert not len(update.copies[0].target)
        assert tuple(update.copies[1].source) == pages(allocator, parent, 1)
        assert tuple(update.copies[1].target) == pages(allocator, child, 1)

    def test_of_a_fork_that_is_not_on_the_device_yet(self):
        allocator = attention(groups=(EVICTS,), grid=8)
        parent = served(allocator, list(range(5)))
        child = allocator.fork(parent).slot
        grandchild = allocator.fork(child).slot
        allocator.release(child)
        update = allocator.flush()
        assert dict(zip(update.starts.slots, update.starts.tail)) == {grandchild: parent}
        assert dict(zip(update.starts.slots, update.starts.state)) == {grandchild: parent}
        sources = dict(zip(*reversed(update.copies[0])))
        assert sources[pages(allocator, grandchild)[0]] == pages(allocator, parent)[0]


class TestOwn:
    def test_copies_what_others_hold_and_only_that(self):
        allocator = attention()
        first = served(allocator, list(range(9)))
        second = served(allocator, [*range(8), 50, 51, 52, 53, 54])
        before = pages(allocator, second)
        allocator.release(first)
        assert allocator.own(second, 0) == 3  # the prefix cache holds the third
        update = allocator.flush()
        assert tuple(update.copies[0].source) == before
        assert tuple(update.copies[0].target) == pages(allocator, second)
        assert allocator.own(second, 0) == 0
        check(allocator)

    def test_a_prefix_is_held_as_long_as_a_page_of_any_group_is(self):
        allocator = attention(groups=(FULL, Group("other", pages=16, pages_per_slot=8)))
        slot = served(allocator, list(range(9)))
        allocator.own(slot, 0)
        assert len(allocator.prefixes.nodes) == 2 and not len(allocator.prefixes.idle)
        allocator.own(slot, 1)
        assert len(allocator.prefixes.idle) == 2
        check(allocator)

    def test_then_nothing_is_published(self):
        allocator = attention()
        slot = served(allocator, list(range(9)), publish=False)
        allocator.own(slot, 0)
        assert allocator.publish(slot) == 0
        assert allocator.publish(allocator.fork(slot).slot) == 0

    def test_without_room_nothing_changes(self):
        allocator = attention(groups=(Group("full", pages=3, pages_per_slot=3),))
        slot = served(allocator, list(range(9)))
        before = books(allocator)
        with pytest.raises(OutOfPages, match="2 pages needed, 1 of 3"):
            allocator.own(slot, 0)
        assert books(allocator) == before


class TestEviction:
    def test_gives_pages_back(self):
        allocator = attention(groups=(EVICTS,))
        slot = served(allocator, list(range(22)))
        assert len(pages(allocator, slot)) == 5
        assert allocator.shrink(slot, 0, 9) == 3
        assert len(pages(allocator, slot)) == 2 and allocator.pools[0].free == 10
        update = allocator.flush()
        assert (update.tables[0][0, 2:] == 12).all()
        assert allocator.held[slot].tokens == 22
        check(allocator)

    def test_reserved_pages_stay(self):
        allocator = attention(groups=(EVICTS,))
        slot = allocator.admit(list(range(20)), reserve=[13]).slot
        allocator.flush()
        allocator.append(slot, range(20))
        assert allocator.shrink(slot, 0, 5) == 2
        assert len(pages(allocator, slot)) == 3

    def test_a_slot_that_evicts_never_outgrows_its_pages(self):
        allocator = attention(groups=(EVICTS,))
        slot = served(allocator, list(range(24)))
        allocator.grow(slot, 100)
        assert len(pages(allocator, slot)) == 6
        allocator.append(slot, [0] * 100)
        allocator.shrink(slot, 0, 8)
        allocator.flush()
        assert allocator.held[slot].tokens == 124
        check(allocator)

    def test_more_than_is_stored_is_refused(self):
        allocator = attention(groups=(EVICTS,))
        slot = served(allocator, list(range(9)))
        with pytest.raises(ConfigError, match="tokens=10: must be 0 to 9"):
            allocator.shrink(slot, 0, 10)


class TestResuming:
    def test_takes_pages_of_its_own_for_what_was_stored(self):
        allocator = hybrid()
        first = served(allocator, list(range(13)))
        second = served(allocator, list(range(12)))
        held = allocator.held[second]
        assert held.snapshot >= 0 and pages(allocator, second)[:2] == pages(allocator, first)[:2]
        allocator.release(second)
        slot = allocator.resume(held)
        now = allocator.held[slot]
        assert (now.tokens, now.stored, now.snapshot) == (12, (12,), -1)
        assert len(pages(allocator, slot)) == 3
        assert not set(pages(allocator, slot)) & set(pages(allocator, first))
        assert allocator.publish(slot) == 0
        check(allocator)

    def test_without_room_nothing_changes(self):
        allocator = attention(groups=(Group("full", pages=8, pages_per_slot=8),))
        slot = served(allocator, list(range(20)), publish=False)
        held = allocator.held[slot]
        allocator.release(slot)
        allocator.admit([0] * 16)
        before = books(allocator)
        with pytest.raises(OutOfPages):
            allocator.resume(held)
        assert books(allocator) == before


class TestTransactions:
    def test_what_fails_half_way_leaves_nothing(self):
        allocator = attention()
        slot = served(allocator, list(range(9)))
        before = books(allocator)
        with pytest.raises(OutOfPages), allocator.transaction():
            allocator.release(slot)
            for _ in range(4):
                allocator.admit([5] * 20)
        assert books(allocator) == before
        assert allocator.flush().empty

    def test_a_part_may_fail_alone(self):
        allocator = attention()
        with allocator.transaction():
            allocator.admit([0] * 9)
            with pytest.raises(CacheFull), allocator.transaction():
                allocator.admit([1] * 35)
                allocator.admit([2] * 35)
                allocator.admit([2] * 35)
            allocator.admit([3] * 5)
        assert allocator.flush().slots.tolist() == [0, 1]
        check(allocator)

    def test_nothing_is_flushed_before_it_is_certain(self):
        allocator = attention()
        with allocator.transaction(), pytest.raises(ConfigError, match="may still be taken back"):
            allocator.flush()


class TestUpdates:
    def test_are_pytrees_that_pad_to_few_shapes(self):
        allocator = hybrid()
        served(allocator, list(range(9)))
        for _ in range(3):
            allocator.admit(list(range(9)))
        allocator.own(1, 0)
        update = allocator.flush()
        padded = update.padded(4, [16], 2)
        assert {len(leaf) for leaf in jax.tree.leaves(padded)} == {4, 2}
        assert padded.slots.tolist() == [1, 2, 3, 4] and padded.tables[0].shape == (4, 8)
        assert padded.starts.slots.tolist() == [1, 2, 3, 4]
        assert padded.saves.snapshots.tolist() == [0, 2, 2, 2]
        assert all(leaf.dtype == np.int32 for leaf in jax.tree.leaves((update, padded)))

    def test_padding_copies_nothing(self):
        allocator = attention()
        served(allocator, list(range(13)))
        allocator.own(0, 0)
        copies = allocator.flush().padded(4, [16], 0).copies[0]
        assert copies.target.tolist() == [*pages(allocator, 0), 16]

    def test_in_which_the_state_of_a_new_fork_is_saved(self):
        """The snapshot takes the state from where the fork will take it."""
        allocator = hybrid()
        slot = served(allocator, list(range(8)), publish=False)
        child = allocator.fork(slot).slot
        assert allocator.publish(child) == 2
        allocator.release(slot)
        assert [each.tolist() for each in allocator.flush().saves] == [[0], [slot]]

    def test_in_which_a_snapshot_is_written_and_read(self):
        """The request takes the state from where the snapshot will take it."""
        allocator = hybrid()
        slot = served(allocator, list(range(8)))
        allocator.admit(list(range(9)))
        update = allocator.flush()
        assert [each.tolist() for each in update.saves] == [[0], [slot]]
        assert update.starts.state.tolist() == [slot] and update.starts.tail.tolist() == [-1]


class TestSizes:
    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (
                lambda: Group("a", pages=4, pages_per_slot=5),
                "group.pages_per_slot=5: .* 4 pages of group 'a'",
            ),
            (lambda: Group("a", pages=0, pages_per_slot=0), "group.pages=0"),
            (lambda: Group("a", pages=1, pages_per_slot=1, page_bytes=-1), "page_bytes"),
            (lambda: Sizes(slots=0, page=4, groups=(FULL,)), "slots=0"),
            (lambda: Sizes(slots=1, page=4, groups=()), "groups="),
            (lambda: Sizes(slots=1, page=4, groups=(FULL, FULL)), "groups=.*different names"),
            (lambda: Sizes(slots=1, page=4, groups=(FULL,), grid=6), "grid=6: None or a multiple .* 4"),
            (
                lambda: Sizes(slots=1, page=4, groups=(FULL,), snapshots=1),
                "snapshots=1: 0 for a model without",
            ),
            (lambda: Sizes(slots=1, page=4, groups=(FULL,), snapshots=-1, grid=4), "snapshots=-1"),
        ],
    )
    def test_that_cannot_be_are_refused(self, make, words):
        with pytest.raises(ConfigError, match=words):
            make()


def test_usage_counts_every_page_once():
    allocator = attention()
    parent = served(allocator, list(range(12)))
    allocator.fork(parent)
    allocator.admit([50] * 9)
    allocator.release(served(allocator, [60] * 5))
    found = usage(allocator)["full"]
    assert (found.free, found.used, found.shared, found.cached) == (10, 5, 3, 1)
    assert (found.held_bytes, found.saved_bytes) == (600, 300)


class TestAudit:
    """``check`` finds what is wrong: each case breaks the books in one place."""

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda a: a.pools[0].users.update({0: 5}), "counts users"),
            (lambda a: a.pools[0].users.pop(0), "counts users|free page"),
            (lambda a: a.pools[0].users.update({15: 0}), "leaked|free and not free"),
            (lambda a: a.pools[0]._taken.__setitem__(15, 1), "free and not free"),
            (lambda a: a.held.pop(0), "slots and requests differ"),
            (lambda a: a.held.update({0: a.held[0]._replace(tokens=3)}), "lost tokens"),
            (lambda a: a.held.update({0: a.held[0]._replace(stored=(4,), tokens=4)}), "that it writes"),
            (lambda a: a.prefixes.idle.add(next(iter(a.prefixes.nodes))), "idle nodes are wrong"),
            (lambda a: a.prefixes.children.clear(), "children are wrong"),
            (lambda a: a.pools[0].kept.popitem(), "kept pages"),
            (lambda a: a.prefixes.nodes.pop(next(iter(a.prefixes.nodes))), "parent is gone"),
            (lambda a: a.snapshots.users.update({0: 1}), "snapshots count users"),
            (lambda a: a.prefixes.idle_snapshots.remove(0), "idle snapshots are wrong"),
        ],
    )
    def test_finds(self, spoil, words):
        allocator = hybrid()
        served(allocator, list(range(10)))
        check(allocator)
        spoil(allocator)
        with pytest.raises(AssertionError, match=words):
            check(allocator)

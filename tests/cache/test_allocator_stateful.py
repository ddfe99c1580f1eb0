"""Any calls in any order: every request reads its own tokens on the device, the books are right, nothing leaks."""

import itertools
import json
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxllm.cache.prefix import chain_digest
from jaxllm.cache.sizes import Group, Sizes
from tests.cache.allocator_world import World

RESULT = Path(__file__).parents[2] / "experiments" / "results" / "allocator_stateful.json"

COMMAND = (
    "python -m pytest -o addopts=--import-mode=importlib -m nightly tests/cache/test_allocator_stateful.py"
)


def colliding(parent: bytes, content: bytes) -> bytes:
    """A digest of three values: most chains collide."""
    return bytes([chain_digest(parent, content)[0] % 3])


FULL = Group("full", pages=12, pages_per_slot=6)
TIGHT = Group("tight", pages=7, pages_per_slot=6)
EVICTS = Group("evicts", pages=10, pages_per_slot=6, evicts=True)
CACHES = {
    "one group": (Sizes(slots=3, page=2, groups=(FULL,)), chain_digest),
    "two groups": (Sizes(slots=3, page=2, groups=(FULL, TIGHT)), chain_digest),
    "evicting": (Sizes(slots=3, page=2, groups=(EVICTS,)), chain_digest),
    "evicting beside full": (Sizes(slots=3, page=2, groups=(FULL, EVICTS)), chain_digest),
    "hybrid": (Sizes(slots=3, page=2, groups=(FULL,), snapshots=2, grid=4), chain_digest),
    "hybrid, grid of a page": (
        Sizes(slots=4, page=1, groups=(FULL, TIGHT), snapshots=3, grid=1),
        chain_digest,
    ),
    "hybrid without snapshots": (Sizes(slots=2, page=2, groups=(FULL,), grid=2), chain_digest),
    "hybrid, evicting": (Sizes(slots=3, page=2, groups=(EVICTS,), snapshots=2, grid=2), chain_digest),
    "recurrent": (Sizes(slots=3, page=2, groups=(), snapshots=2, grid=2), chain_digest),
    "collisions": (Sizes(slots=3, page=1, groups=(FULL,)), colliding),
    "hybrid, collisions": (Sizes(slots=3, page=1, groups=(FULL,), snapshots=2, grid=1), colliding),
}
# Shrinking a failure takes minutes; set to 1 by hand to get a short one.
SHRINK = 0
COUNTED = {"operations": 0, "full": 0, "shared": 0}

slots = st.integers(0, 3)
keys = st.sampled_from([(0, 0), (0, 0), (0, 0), (1, 0), (0, 1)])


def story(branch: int, length: int) -> list[int]:
    """Prompts that have beginnings in common: those of branch b part after 3 b tokens."""
    return [0 if index < 3 * branch else branch + 1 for index in range(length)]


class Machine(RuleBasedStateMachine):
    @initialize(
        name=st.sampled_from(sorted(CACHES)),
        warm=st.sampled_from([True, True, True, False]),
        branch=st.integers(0, 3),
        length=st.integers(5, 12),
        stays=st.booleans(),
    )
    def start(self, name, warm, branch, length, stays):
        self.world = World(*CACHES[name])
        if warm:
            # Hypothesis leaves some rules out of each machine: what is shared must not hang on which.
            self.serve(branch, length, (0, 0), stays)
            self.serve_again()

    def pick(self, number):
        """A live request."""
        return sorted(self.world.live)[number % len(self.world.live)]

    def prompt(self, branch, length):
        """A story that a slot has room for."""
        sizes = self.world.sizes
        return story(branch, min([length, *((g.pages_per_slot + 1) * sizes.page - 1 for g in sizes.groups)]))

    @rule(branch=st.integers(0, 3), length=st.integers(1, 12), key=keys, reserve=st.integers(-8, 9))
    def admit(self, branch, length, key, reserve):
        sizes = self.world.sizes
        kept = None if reserve < 0 else [min(reserve, g.pages_per_slot * sizes.page) for g in sizes.groups]
        self.world.admit(self.prompt(branch, length), key, kept)

    @rule(branch=st.integers(0, 3), length=st.integers(5, 12), key=keys, stays=st.booleans())
    def serve(self, branch, length, key, stays):
        """A request reads its prompt in pages, publishes as it goes, and may be over then."""
        self.served = self.prompt(branch, length), key, stays
        self.read(*self.served)

    @precondition(lambda self: hasattr(self, "served"))
    @rule()
    def serve_again(self):
        """The prompt that was served last, which finds what is left of it."""
        self.read(*self.served)

    def read(self, prompt, key, stays):
        slot = self.world.admit(prompt, key, None)
        if slot is None:
            return
        request = self.world.live[slot]
        while len(request.tokens) < len(request.prompt):
            before = len(request.tokens)
            self.world.step(slot, self.world.sizes.page, 0, None, True)
            self.world.publish(slot)
            if len(request.tokens) == before:
                break
        if not stays:
            self.world.release(slot)

    @precondition(lambda self: self.world.live)
    @rule(number=slots)
    def move(self, number):
        self.world.move(self.pick(number))

    @precondition(lambda self: self.world.live)
    @rule(
        number=slots,
        count=st.integers(1, 7),
        token=st.integers(0, 2),
        keep=st.none() | st.integers(0, 6),
        tell=st.booleans(),
        publish=st.booleans(),
    )
    def step(self, number, count, token, keep, tell, publish):
        slot = self.pick(number)
        self.world.step(slot, count, token, keep, tell)
        if publish:
            self.world.publish(slot)

    @precondition(lambda self: self.world.live)
    @rule(number=slots)
    def fork(self, number):
        self.world.fork(self.pick(number))

    @precondition(lambda self: self.world.live)
    @rule(number=slots, publish=st.booleans())
    def release(self, number, publish):
        slot = self.pick(number)
        if publish:
            self.world.publish(slot)
        self.world.release(slot)

    @precondition(lambda self: self.world.live and self.world.sizes.groups)
    @rule(number=slots, group=st.integers(0, 1))
    def own(self, number, group):
        self.world.own(self.pick(number), group % len(self.world.sizes.groups))

    @rule(padded=st.booleans())
    def flush(self, padded):
        self.world.flush(padded)

    @rule(number=slots, branch=st.integers(0, 3), key=keys)
    def broken(self, number, branch, key):
        self.world.broken(self.pick(number) if self.world.live else None, story(branch, 5), key)

    def teardown(self):
        if hasattr(self, "world"):
            self.world.end()
            for name in COUNTED:
                COUNTED[name] += getattr(self.world, name)


def run(operations: int, first: int) -> dict[str, int]:
    """Machines until so many calls of the allocator were made, with seeds from ``first`` on; what happened in them."""
    COUNTED.update(dict.fromkeys(COUNTED, 0))
    phases = [Phase.generate] + [Phase.shrink] * SHRINK
    most = settings(max_examples=60, stateful_step_count=60, deadline=None, database=None, phases=phases)
    seeds = itertools.count(first)
    while COUNTED["operations"] < operations:
        run_state_machine_as_test(hypothesis.seed(next(seeds))(Machine), settings=most)
    return dict(COUNTED)


def test_ten_thousand_operations(seed):
    counted = run(10_000, seed)
    # The machine reaches what it is about: refusals and shared prefixes are no rarities.
    assert counted["full"] > 100
    assert counted["shared"] > 100


@pytest.mark.nightly
def test_a_million_operations(seed):
    """Writes what it did to experiments/results; the command leaves out the checks of types, which double its time."""
    started = time.monotonic()
    counted = run(1_000_000, seed)
    seconds = time.monotonic() - started
    result = {
        "command": COMMAND,
        "date": date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "numpy": version("numpy"),
            "hypothesis": hypothesis.__version__,
        },
        "caches": sorted(CACHES),
        "operations": counted["operations"],
        "refused_for_want_of_room": counted["full"],
        "tokens_from_shared_prefixes": counted["shared"],
        "failures": 0,
        "seconds": round(seconds, 1),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")

"""Which collectives a compiled program runs, how often, and what runs while they travel, by its schedule."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from experiments._hlo import Instruction, Program
from parallel.context.traffic import bytes_of, received

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# What of a schedule is work for the device, by the name under which it is counted; copies and tuples are not.
_WORK = {
    "while": "loops",
    "conditional": "loops",
    "call": "loops",
    "custom-call": "kernels",
    "dot": "kernels",
    "convolution": "kernels",
    "fusion": "fusions",
    "sort": "fusions",
    "scatter": "fusions",
    "reduce": "fusions",
}
WORK = tuple(dict.fromkeys(_WORK.values()))
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"\breplica_groups=(?:\{\{(?P<first>[\d,]*)\}|\[\d+,(?P<size>\d+)\]|(?P<all>\{\}))")
_AXES = re.compile(r"\breplica_groups=mesh\[(?P<mesh>['\w=,]+)\] \{(?P<axes>['\w,]+)\}")
_STATES = ("asynchronous", "hidden", "marked")


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: of :data:`KINDS`.
        name: of the instruction that begins it.
        origin: as :meth:`Program.origin`.
        shape: of what a device has afterwards.
        members: devices that exchange with each other.
        bytes: that a device receives from others in one run of it.
        times: it runs in a step; branches of a condition count as taken.
        certain: it is in no branch, and in no loop whose length is not known.
        asynchronous: it begins and ends in two instructions, on a stream of its own.
        meanwhile: work between the two.
    """

    kind: str
    name: str
    origin: tuple[str, ...]
    shape: str
    members: int
    bytes: int
    times: int
    certain: bool
    asynchronous: bool
    meanwhile: tuple[Instruction, ...]


def work(each: Instruction) -> str | None:
    """The one of :data:`WORK` that an instruction is, if any: products are custom calls, or fusions of their own kind."""
    if each.opcode == "fusion" and "kind=kCustom" in each.attributes:
        return "kernels"
    return _WORK.get(each.opcode)


def _runs(program: Program) -> dict[str, tuple[int, bool]]:
    """Of each computation that a step runs: how often, and whether that is certain."""
    found: dict[str, tuple[int, bool]] = {}

    def walk(name: str, times: int, certain: bool) -> None:
        before = found.get(name, (0, True))
        found[name] = before[0] + times, before[1] and certain
        for each in program.computations[name]:
            if each.opcode == "while":
                body, trips = _BODY.search(each.attributes), _TRIPS.search(each.attributes)
                assert body is not None
                walk(body[1], times * (int(trips[1]) if trips else 1), certain and trips is not None)
            elif each.opcode == "conditional":
                for branch in each.called:
                    walk(branch, times, False)
            elif each.opcode == "call":
                for callee in each.called:
                    walk(callee, times, certain)

    walk(program.entry, 1, True)
    return found


def collectives(program: Program) -> list[Collective]:
    """Every collective that a step runs, in the order of the text.

    Raises:
        ValueError: one begins and does not end in its computation, or its devices cannot be read.
    """
    made = []
    for name, (times, certain) in _runs(program).items():
        lines = program.computations[name]
        for place, each in enumerate(lines):
            own = _wrapped(program, each)
            kind = own.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            last = place
            if each.opcode.endswith("-start"):
                last = _end(lines, place)
            # XLA leaves the pair where it could not move anything between, and says so.
            stream = last > place and '"is_sync":true' not in each.attributes
            shape = lines[last].shape
            members = 0 if kind == "collective-permute" else _members(own.attributes, program.devices)
            made.append(
                Collective(
                    kind=kind,
                    name=each.name,
                    origin=program.origin(own) or program.origin(each),
                    shape=shape,
                    members=members,
                    bytes=received(kind, bytes_of(shape), members),
                    times=times,
                    certain=certain,
                    asynchronous=stream,
                    meanwhile=tuple(x for x in lines[place + 1 : last] if work(x)),
                )
            )
    return made


def _wrapped(program: Program, each: Instruction) -> Instruction:
    """What a general ``async-start`` begins; any other instruction itself."""
    if each.opcode != "async-start":
        return each
    inner = program.computations[each.called[0]]
    return next((x for x in inner if x.opcode in KINDS), each)


def _end(lines: list[Instruction], place: int) -> int:
    """Where what begins at ``place`` ends."""
    carried = {lines[place].name}
    for later in range(place + 1, len(lines)):
        each = lines[later]
        if carried & set(each.operands):
            if each.opcode.endswith("-done"):
                return later
            if each.opcode.endswith("-update"):
                carried.add(each.name)
    raise ValueError(f"{lines[place].name}: begins and does not end in its computation")


def _members(attributes: str, devices: int) -> int:
    over = _AXES.search(attributes)
    if over is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", over["mesh"]))
        return prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", over["axes"]))
    found = _GROUPS.search(attributes)
    if found is None:
        raise ValueError(f"{attributes[:200]!r}: no replica_groups that can be read")
    if found["size"]:
        return int(found["size"])
    return devices if found["all"] else len(found["first"].split(","))


def summed(
    found: list[Collective], what: Callable[[Collective], str], marked: Callable[[Instruction], bool]
) -> list[dict[str, Any]]:
    """One row for each kind of collective and each of its purposes.

    Args:
        found: of :func:`collectives`.
        what: the purpose of a collective.
        marked: whether work is of the kind that is looked for among what runs meanwhile.

    Returns:
        Rows of ``kind``, ``what``, ``in_text`` (as they stand in the program), ``count`` (runs in a step), ``uncertain``
        (of these, in branches or loops of unknown length) and ``bytes`` (that a device receives in a step). Of runs and
        bytes ``asynchronous`` and ``asynchronous_bytes``, ``hidden`` and ``hidden_bytes`` (a loop or a kernel runs
        meanwhile), ``marked`` and ``marked_bytes``; and the mean ``loops``, ``kernels`` and ``fusions`` meanwhile.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in found:
        key = one.kind, what(one)
        if key not in rows:
            rows[key] = dict(zip(("kind", "what"), key)) | dict.fromkeys(
                ("in_text", "count", "uncertain", "bytes", *_STATES, *(f"{name}_bytes" for name in _STATES)),
                0,
            )
            rows[key]["meanwhile"] = dict.fromkeys(WORK, 0)
        row = rows[key]
        row["in_text"] += 1
        row["count"] += one.times
        row["uncertain"] += 0 if one.certain else one.times
        row["bytes"] += one.times * one.bytes
        kinds = [work(each) for each in one.meanwhile] if one.asynchronous else []
        for name in row["meanwhile"]:
            row["meanwhile"][name] += one.times * kinds.count(name)
        true = (
            one.asynchronous,
            one.asynchronous and bool({"loops", "kernels"} & set(kinds)),
            one.asynchronous and any(marked(each) for each in one.meanwhile),
        )
        for name, here in zip(_STATES, true):
            row[name] += one.times * here
            row[f"{name}_bytes"] += one.times * one.bytes * here
    for row in rows.values():
        runs = max(row["asynchronous"], 1)
        row["meanwhile"] = {name: round(total / runs, 1) for name, total in row["meanwhile"].items()}
    return sorted(rows.values(), key=lambda row: -row["bytes"])

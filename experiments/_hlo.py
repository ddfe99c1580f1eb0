"""A compiled program read from the text of its HLO: computations, instructions in their order, and where they are from."""

import re
from dataclasses import dataclass
from typing import Any

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_TABLE = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)$")
_ENTRY = re.compile(r'^(?P<id>\d+) (?:"(?P<text>.*)"|\{(?P<fields>.*)\})$')
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
_REPLICAS = re.compile(r"\breplica_count=(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without the percent sign.
        shape: of the result, as it stands there.
        opcode: "fusion", "all-gather-start", ...
        operands: names.
        attributes: what stands behind the operands.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs or is made of."""
        return tuple(
            name.strip().lstrip("%")
            for found in _CALLED.finditer(self.attributes)
            for name in found[1].strip("{}").split(",")
            if name.strip()
        )


@dataclass(frozen=True)
class Program:
    """A compiled module.

    Attributes:
        computations: by name, instructions in the order in which they run.
        entry: where it begins.
        devices: that it is for.
        frames: by number, names of the Python functions that were running, the innermost first.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    devices: int
    frames: dict[int, tuple[str, ...]]

    def origin(self, instruction: Instruction) -> tuple[str, ...]:
        """Names of the Python functions that it was traced in, the innermost first; () where that is not known.

        What XLA has combined has the origin of one of its parts; what a ``custom_vjp`` does, that of its call.
        """
        found = _FRAME.search(instruction.attributes)
        return self.frames.get(int(found[1]), ()) if found else ()


def parse(text: str) -> Program:
    """A program of ``compiled.as_text()``.

    Raises:
        ValueError: it is not scheduled, or has no entry.
    """
    header = text[: text.find("\n")]
    if "is_scheduled=true" not in header:
        raise ValueError(f"text begins with {header[:80]!r}: must be the text of a scheduled HLO module")
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    tables: dict[str, dict[int, Any]] = {}
    table: dict[int, Any] = {}
    for line in text.splitlines()[1:]:
        begun, entered = _COMPUTATION.match(line), _ENTRY.match(line)
        if _TABLE.match(line):
            table = tables[line] = {}
        elif entered:
            fields = re.findall(r"(\w+)=(\d+)", entered["fields"] or "")
            table[int(entered["id"])] = entered["text"] or {name: int(value) for name, value in fields}
        elif begun:
            lines = computations[begun["name"]] = []
            entry = begun["name"] if begun["entry"] else entry
        elif _INSTRUCTION.match(line):
            lines.append(_instruction(_COMMENT.sub("", line)))
    if not entry:
        raise ValueError("text: no computation is the entry")
    counts = [int(found[1]) for found in (p.search(header) for p in (_PARTITIONS, _REPLICAS)) if found]
    return Program(computations, entry, max(counts, default=1), _frames(tables))


def _frames(tables: dict[str, dict[int, Any]]) -> dict[int, tuple[str, ...]]:
    """Functions of each stack frame and of those around it."""
    frames = tables.get("StackFrames", {})
    # Some versions number parents from 1, 0 being none of them: no frame is its own parent.
    shift = int(any(frame["parent_frame_id"] == number for number, frame in frames.items()))
    found: dict[int, tuple[str, ...]] = {}
    for number in sorted(frames):
        place = tables["FileLocations"][frames[number]["file_location_id"]]
        parent = frames[number].get("parent_frame_id", 0) - shift
        name = tables["FunctionNames"][place["function_name_id"]]
        found[number] = name, *found.get(parent, ())
    return found


def _instruction(line: str) -> Instruction:
    named = _INSTRUCTION.match(line)
    assert named is not None
    rest = line[named.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode, _, behind = rest[end:].strip().partition("(")
    close = _closing("(" + behind, 0) - 1
    operands = tuple(_NAMES.findall(behind[:close]))
    return Instruction(named["name"], rest[:end], opcode, operands, behind[close:])


def _closing(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at ``start``."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    raise ValueError(f"brackets of {text[start : start + 80]!r} are not closed")

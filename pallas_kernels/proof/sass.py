"""What stands in the loops of a kernel's machine code: tensor core instructions, bulk copies and spills.

Counting over a whole program says nothing of speed, since a prologue is run once and a loop a thousand times. nvdisasm's
listing is cut into basic blocks, and loops are the natural ones: an edge back to a block that dominates its source. (A
wait that is spun on stands out of line and jumps back into the middle of what waits, without being a loop around it.)
"""

import math
import re
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LABEL = re.compile(r"^(\.L_x_\d+):")
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?)([A-Z][\w.]*)\s*(.*)")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
# Of one warpgroup: bf16 and float8 as HGMMA and QGMMA, int8 as IGMMA.
_WGMMA = ("HGMMA", "QGMMA", "IGMMA", "BGMMA")
_TMA = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP")
_SPILL = ("STL", "LDL")
# Rows, columns and depth of the product of one instruction.
_SIZE = re.compile(r"\.(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Loops:
    """Counts over the innermost loops that hold a tensor core instruction, or a bulk copy.

    Attributes:
        wgmma: tensor core instructions of one turn, of the loop that has most of them.
        tma: bulk copies of one turn, of the loop that has most of them; often another warp's loop.
        spills: loads and stores of local memory in any loop of either.
    """

    wgmma: int
    tma: int
    spills: int


def nvdisasm() -> str | None:
    """The disassembler of the installed packages, or of a CUDA toolkit."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvdisasm"
    return str(packaged) if packaged.is_file() else shutil.which("nvdisasm")


@dataclass
class _Block:
    names: list[str]
    full: list[str]
    labels: list[str]
    to: str | None = None
    falls: bool = True


def _blocks(listing: str) -> list[_Block]:
    """Basic blocks in the order of the text; a block ends at a branch, an exit, and before a label."""
    blocks = [_Block([], [], [])]
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].names:
                blocks.append(_Block([], [], []))
            blocks[-1].labels.append(label[1])
        elif found := _LINE.search(line):
            predicate, name, rest = found[1].strip(), found[2].split(".")[0], found[3]
            block = blocks[-1]
            block.names.append(name)
            block.full.append(found[2])
            target = _TARGET.search(rest)
            if name in ("BRA", "EXIT", "RET", "BRX", "KILL"):
                block.to = target[1] if target and name == "BRA" else None
                # A second operand of a branch is a predicate too: `BRA P0, target`, `BRA.U UP0, target`.
                block.falls = bool(predicate) or bool(re.match(r"!?U?P\d", rest))
                blocks.append(_Block([], [], []))
    return [block for block in blocks if block.names]


def _edges(blocks: list[_Block]) -> list[list[int]]:
    at = {label: number for number, block in enumerate(blocks) for label in block.labels}
    edges = []
    for number, block in enumerate(blocks):
        targets = [at[block.to]] if block.to in at else []
        edges.append(targets + ([number + 1] if block.falls and number + 1 < len(blocks) else []))
    return edges


def _dominators(edges: list[list[int]]) -> list[set[int]]:
    """For each block those that every way from the entry to it goes through; empty where there is no way."""
    before: list[list[int]] = [[] for _ in edges]
    for source, targets in enumerate(edges):
        for target in targets:
            before[target].append(source)
    reached, waiting = {0}, [0]
    while waiting:
        fresh = set(edges[waiting.pop()]) - reached
        reached |= fresh
        waiting += fresh
    dominators = [set(reached) if number in reached else set() for number in range(len(edges))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for number in sorted(reached - {0}):
            sources = [dominators[source] for source in before[number] if source in reached]
            found = set.intersection(*sources) | {number}
            if found != dominators[number]:
                dominators[number], changed = found, True
    return dominators


def natural_loops(edges: list[list[int]]) -> list[set[int]]:
    """The blocks of each loop; loops of one head are one."""
    before: list[list[int]] = [[] for _ in edges]
    for source, targets in enumerate(edges):
        for target in targets:
            before[target].append(source)
    dominators, loops = _dominators(edges), {}
    for source, targets in enumerate(edges):
        for head in targets:
            if head in dominators[source]:
                body, waiting = loops.setdefault(head, {head}), [source]
                while waiting:
                    number = waiting.pop()
                    if number not in body:
                        body.add(number)
                        waiting += before[number]
    return list(loops.values())


class _Program:
    """A listing's blocks, and its innermost loops that hold instructions of some names."""

    def __init__(self, listing: str):
        self.blocks = _blocks(listing)
        if not self.blocks:
            raise ValueError(f"no listing of nvdisasm: {listing[:200]!r}")
        self.found = natural_loops(_edges(self.blocks))

    def count(self, loop: set[int], names: Iterable[str]) -> int:
        return sum(self.blocks[number].names.count(name) for number in loop for name in names)

    def innermost(self, names: tuple[str, ...]) -> list[set[int]]:
        held = [loop for loop in self.found if self.count(loop, names)]
        return [loop for loop in held if not any(other < loop for other in held)]


def loops(listing: str) -> Loops:
    """What one kernel's loops hold.

    Raises:
        ValueError: no instruction is found in the listing.
    """
    program = _Program(listing)
    count = program.count
    products, copies = program.innermost(_WGMMA), program.innermost(_TMA)
    together = set().union(*products, *copies)
    return Loops(
        max((count(loop, _WGMMA) for loop in products), default=0),
        max((count(loop, _TMA) for loop in copies), default=0),
        count(together, _SPILL),
    )


@dataclass(frozen=True)
class Mix:
    """The instructions of one turn of a kernel's main loop: the innermost one that has most tensor core instructions.

    What waits out of line and jumps back into the loop is counted once, as if it had to wait once.

    Attributes:
        counts: how many of each, by its name with what follows the dot, e.g. "I2FP.F32.S32".
        products: multiply-adds of the tensor core instructions among them, of a warpgroup.
    """

    counts: dict[str, int]
    products: int

    def of(self, *names: str) -> int:
        """How many instructions of these names; a name stands for all that begin with it and a dot."""
        return sum(
            many
            for found, many in self.counts.items()
            if any(found == name or found.startswith(f"{name}.") for name in names)
        )

    @property
    def total(self) -> int:
        """All of them, which one scheduler issues one by one for its warp of the warpgroup."""
        return sum(self.counts.values())


def mix(listing: str) -> Mix:
    """The instructions of a kernel's main loop.

    Raises:
        ValueError: there is no listing, or no loop with a tensor core instruction in it.
    """
    program = _Program(listing)
    held = program.innermost(_WGMMA)
    if not held:
        raise ValueError("no loop holds a tensor core instruction")
    main = max(held, key=lambda loop: program.count(loop, _WGMMA))
    counts = Counter(name for number in sorted(main) for name in program.blocks[number].full)
    products = 0
    for name, many in counts.items():
        if name.split(".")[0] in _WGMMA:
            size = _SIZE.search(name)
            if size is None:
                raise ValueError(f"no size in {name!r}")
            products += many * math.prod(map(int, size.groups()))
    return Mix(dict(counts), products)

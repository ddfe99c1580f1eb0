"""Sizes of the tiles of the grouped product, by how many rows an expert has."""

from dataclasses import dataclass

from pallas_kernels.attention.common import CONSUMERS, ROWS

# Inputs of one step: the 128 bytes that shared memory swizzles.
DEPTH = 64
# Of the 227 KiB that a CTA may have, what the result leaves.
_SHARED_BYTES = 150 * 1024
# With fewer rows an expert, a tile of 128 would be mostly padding.
_FEW = 96


@dataclass(frozen=True)
class Tiles:
    """rows: of a tile, 64 or 128, 0 by the rows an expert has; columns: of a tile, in multiples of 128, at most 256, 0 as
    many as pay; stages: steps in flight, 0 for as many as fit, at most 6."""

    rows: int = 0
    columns: int = 0
    stages: int = 0

    def candidates(self) -> list["Tiles"]:
        """What the tuner tries."""
        return [Tiles(rows, columns, s) for rows in (64, 128) for columns in (128, 256) for s in (0, 3)]

    def chosen(self, M: int, N: int, E: int) -> "Tiles":
        """The tiles of M rows of E experts and N outputs, nothing of them left open."""
        rows = self.rows or (ROWS if M < _FEW * E else CONSUMERS * ROWS)
        columns = self.columns or (256 if rows > ROWS and N >= 256 else 128)
        most = _SHARED_BYTES // (2 * DEPTH * (rows + columns))
        return Tiles(rows, columns, self.stages or max(2, min(6, most)))

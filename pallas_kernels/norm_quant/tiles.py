"""Tile sizes of the Mosaic kernel of RMSNorm and rounding."""

from dataclasses import dataclass

from pallas_kernels.arguments import require


@dataclass(frozen=True)
class Tiles:
    """How much one warpgroup takes at a time.

    Args:
        rows: one after the other, for one read of the weight.
        stages: rows in shared memory: with 2 the next one comes while this one is rounded, where both fit.
        blocks: at most so many times 1024 values of a row in registers; fewer where they do not divide a row.

    Raises:
        ValueError: ``rows`` is not 1 to 64, ``stages`` not 1 or 2, or ``blocks`` not 1 to 4.
    """

    rows: int = 1
    stages: int = 1
    blocks: int = 4

    def __post_init__(self) -> None:
        require(self.rows in range(1, 65), "rows", self.rows, "1 to 64")
        require(self.stages in (1, 2), "stages", self.stages, "1 or 2")
        require(self.blocks in range(1, 5), "blocks", self.blocks, "1 to 4")

    def candidates(self) -> list["Tiles"]:
        """What the tuner tries."""
        some = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 2)]
        return [Tiles(rows, stages, blocks) for rows, stages in some for blocks in (1, 2, 4)]

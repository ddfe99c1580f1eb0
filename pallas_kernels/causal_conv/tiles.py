"""Tile sizes of the Mosaic kernels of the convolutions."""

from dataclasses import dataclass

from pallas_kernels.arguments import require

# Threads of a warpgroup: each holds ``columns / LANES`` neighbouring channels of a row.
LANES = 128


@dataclass(frozen=True)
class Tiles:
    """What one warpgroup takes at a time.

    Args:
        rows: tokens; those before (in backward also those after) which they look at are read beside them.
        columns: channels, halved where they do not divide all channels.
        unroll: tokens of one turn of the loop over them.

    Raises:
        ValueError: ``rows`` is not a multiple of 8 up to 128, ``columns`` not 128, 256 or 512, or ``unroll`` does not
            divide ``rows``.
    """

    rows: int = 64
    columns: int = 256
    unroll: int = 4

    def __post_init__(self) -> None:
        require(self.rows in range(8, 129, 8), "rows", self.rows, "a multiple of 8 up to 128")
        require(self.columns in (128, 256, 512), "columns", self.columns, "128, 256 or 512")
        allowed = f"a divisor of {self.rows} rows"
        require(self.unroll >= 1 and self.rows % self.unroll == 0, "unroll", self.unroll, allowed)

    def columns_of(self, channels: int) -> int:
        """Channels of a tile where there are ``channels``, a multiple of 128."""
        columns = self.columns
        while channels % columns:
            columns //= 2
        return columns

    def candidates(self) -> list["Tiles"]:
        """What the tuner tries; what does not fit a device's shared memory fails there."""
        sizes = [(rows, columns) for rows in (16, 32, 64, 128) for columns in (128, 256, 512)]
        return [Tiles(*size, unroll) for size in sizes for unroll in (1, 4, 8)]

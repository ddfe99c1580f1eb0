"""Sizes of the Mosaic GPU kernels of the gated delta rule."""

from collections.abc import Iterator
from dataclasses import dataclass

from pallas_kernels.arguments import require


@dataclass(frozen=True)
class Tiles:
    """Sizes of the kernels; a chunk has 64 tokens always.

    Args:
        stages: chunks in flight in the kernel that passes the states on.

    Raises:
        ValueError: there is no stage.
    """

    stages: int = 2

    def __post_init__(self) -> None:
        require(self.stages >= 1, "stages", self.stages, "at least 1")

    def candidates(self) -> "Iterator[Tiles]":
        """What the tuner tries instead; what does not fit a device's shared memory fails there."""
        for stages in (1, 2, 3):
            yield Tiles(stages)

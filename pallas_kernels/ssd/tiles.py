"""Sizes of the Mosaic GPU kernels of SSD."""

from collections.abc import Iterator
from dataclasses import dataclass

from pallas_kernels.arguments import require

CHUNKS = (64, 128, 256)


@dataclass(frozen=True)
class Tiles:
    """Sizes of the kernels.

    Args:
        chunk: tokens of a chunk at most; a call's ``chunk_size`` may ask for less.
        state_stages: chunks in flight in the kernel that passes the states on.
        stages: blocks of 64 tokens in flight in the kernels of the outputs and their gradients.

    Raises:
        ValueError: a chunk is not 64, 128 or 256, or there is no stage.
    """

    chunk: int = 128
    state_stages: int = 2
    stages: int = 1

    def __post_init__(self) -> None:
        require(self.chunk in CHUNKS, "chunk", self.chunk, "64, 128 or 256")
        for name in ("state_stages", "stages"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")

    def candidates(self) -> "Iterator[Tiles]":
        """What the tuner tries instead; what does not fit a device's shared memory fails there."""
        for chunk in CHUNKS:
            for stages in (1, 2):
                for state_stages in (1, 2, 3):
                    yield Tiles(chunk, state_stages, stages)

"""Block sizes of the Mosaic GPU attention kernels, and what each head dimension takes where nothing was tuned."""

from dataclasses import dataclass, replace

from pallas_kernels.arguments import require


@dataclass(frozen=True)
class Tiles:
    """Block sizes of forward, of the dQ kernel and of the dK, dV kernel.

    Args:
        block_kv: keys of one step of forward.
        stages: blocks of keys and values in flight in forward.
        alternate: the two warpgroups take turns, one at the tensor cores while the other is at its softmax.
        dq_block_kv: keys of one step of the dQ kernel.
        dq_stages: as ``stages``, in the dQ kernel.
        dkv_block_q: queries of one step of the dK, dV kernel.
        dkv_stages: blocks of queries in flight in the dK, dV kernel.

    Raises:
        ValueError: a block is not 64, 128, 192 or 256, or there is no stage.
    """

    block_kv: int
    stages: int = 2
    alternate: bool = True
    dq_block_kv: int = 64
    dq_stages: int = 2
    dkv_block_q: int = 64
    dkv_stages: int = 2

    def __post_init__(self) -> None:
        for name in ("block_kv", "dq_block_kv", "dkv_block_q"):
            size = getattr(self, name)
            require(size in (64, 128, 192, 256), name, size, "64, 128, 192 or 256")
        for name in ("stages", "dq_stages", "dkv_stages"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")

    def candidates(self) -> list["Tiles"]:
        """What the tuner tries instead; what does not fit a device's shared memory fails there."""
        forward = [
            replace(self, block_kv=block, stages=stages, alternate=alternate)
            for block in (64, 128, 192)
            for stages in (2, 3, 4)
            for alternate in (True, False)
        ]
        backward = [
            replace(self, dq_block_kv=block, dkv_block_q=block, dq_stages=stages, dkv_stages=stages)
            for block in (64, 128)
            for stages in (2, 3, 4)
        ]
        return [*forward, *backward]


DEFAULTS = {
    64: Tiles(block_kv=128, stages=4, dq_block_kv=128, dq_stages=3, dkv_stages=4),
    96: Tiles(block_kv=128, stages=3, dq_block_kv=64, dq_stages=4, dkv_stages=3),
    128: Tiles(block_kv=128, stages=2, dq_block_kv=64, dq_stages=4, dkv_stages=3),
    256: Tiles(block_kv=64, stages=2, dq_block_kv=64, dq_stages=2, dkv_stages=2),
}

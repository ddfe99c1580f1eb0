"""One token of the SSD recurrence for each of some slots of a pool, whose states it moves on in place."""

from pallas_kernels.ssd.step.api import ssd_step

__all__ = ["ssd_step"]

"""One token of the gated delta rule for each of some slots of a pool, whose states it moves on in place."""

from pallas_kernels.gated_delta.step.api import gated_delta_step

__all__ = ["gated_delta_step"]

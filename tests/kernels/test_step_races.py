"""Race detection of the decode steps over slot pools, whose kernels write states back in place."""

import jax
import pytest

from pallas_kernels import compat
from pallas_kernels.proof import interpret
from tests.kernels import test_conv_step, test_gated_delta_step, test_ssd_step


@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this JAX does not see every race")
@pytest.mark.parametrize(
    "small",
    [test_conv_step.SMALL, test_gated_delta_step.SMALL, test_ssd_step.SMALL],
    ids=lambda small: small.op,
)
def test_there_is_no_race(small):
    interpret.run(small.call("mosaic_gpu"), jax.jit(small.inputs)(jax.random.key(1)), races=True)

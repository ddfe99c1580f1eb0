"""On 8 simulated devices: ``sharded_worker.py`` trains alike on one device and on a 4 x 2 mesh."""

import jax
import numpy as np

from jaxllm.config import ConfigError
from jaxllm.train.settings import TrainSettings
from jaxllm.train.step import StepSettings
from jaxllm.train.trainer import fit
from parallel.mesh import MeshShape, batch_sharding, make_mesh
from tests.train.tiny import TinyLoader, constant_lr, tiny_config

assert jax.device_count() == 8
mesh = make_mesh(MeshShape(data=4, fsdp=2))
assert mesh.shape["data"] == 4 and mesh.shape["fsdp"] == 2 and mesh.size == 8
assert batch_sharding(mesh).shard_shape((16, 5)) == (2, 5)

cfg, optim = tiny_config("*-"), constant_lr()


def losses(shape, rows=16, accum_steps=1):
    seen = []
    settings = TrainSettings(steps=3, mesh=shape, step=StepSettings(accum_steps=accum_steps, loss_chunk=64))
    result = fit(
        cfg, optim, TinyLoader(rows), settings, callbacks=[lambda e: seen.append(getattr(e, "loss", None))]
    )
    return [loss for loss in seen if loss is not None], result.params


def one_device():
    from jaxllm.train.state import init_state
    from jaxllm.train.step import make_train_step

    state, step, loader, seen = init_state(cfg, optim), make_train_step(cfg, optim), TinyLoader(16), []
    for _ in range(3):
        state, metrics = step(state, next(loader), None)
        seen.append(float(metrics.loss))
    return seen, state.params


expected, params = one_device()
for accum_steps in (1, 2):
    ours, sharded = losses(MeshShape(data=4, fsdp=2), accum_steps=accum_steps)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(params), strict=True):
        assert len(a.sharding.device_set) == 8 and a.sharding.is_fully_replicated
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
try:
    losses(None, rows=12)
except ConfigError as error:
    assert "batch_size=12: must be a multiple of data * fsdp = 8 devices" in str(error)
else:
    raise AssertionError("12 rows on 8 devices were accepted")
print("EQUAL")

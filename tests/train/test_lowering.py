"""The whole training step and the whole decode step lower for GPUs and TPUs on a machine that has neither."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm import PackedBatch, preset
from jaxllm.cache.state import init_cache
from jaxllm.generation.sampling import Features, init_sampling
from jaxllm.generation.steps import _decode_jit
from jaxllm.model.functional import abstract_params
from jaxllm.train.optim import OptimConfig
from jaxllm.train.state import master_config, state_of
from jaxllm.train.step import make_train_step
from pallas_kernels.proof import lowering

PLATFORMS = pytest.mark.parametrize("lower", [lowering.lower_cuda, lowering.lower_tpu])
ROWS, TOKENS = 2, 256


@PLATFORMS
def test_the_training_step_lowers(lower):
    cfg, optim = preset("quickstart"), OptimConfig(schedule="constant", warmup_steps=0)
    state = jax.eval_shape(lambda p: state_of(p, optim), abstract_params(master_config(cfg)))
    whole = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
    batch = PackedBatch(
        tokens=whole,
        segment_ids=whole,
        positions=whole,
        targets=jax.ShapeDtypeStruct((ROWS, TOKENS, 1), jnp.int32),
        loss_mask=jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.float32),
    )
    text = lower(make_train_step(cfg, optim), state, batch, None)
    check(text, cfg)


@PLATFORMS
def test_the_decode_step_lowers(lower):
    cfg = preset("quickstart")
    cache, sampling = jax.eval_shape(lambda: (init_cache(cfg, ROWS, TOKENS), init_sampling(ROWS)))
    text = lower(
        _decode_jit("float32"),
        *(abstract_params(cfg), cache, sampling, 1, 1),
        cfg=cfg,
        features=Features(),
        rows=ROWS,
        bound=None,
        k=1,
    )
    check(text, cfg)


def check(text: str, cfg) -> None:
    """The products of every layer are there, and nothing that only a CPU needs."""
    assert lowering.outside(text).dots >= len(cfg.pattern)
    # What holds values in memory on the CPU is a conditional.
    assert "stablehlo.case" not in text and "stablehlo.if" not in text

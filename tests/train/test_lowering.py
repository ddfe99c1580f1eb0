"""Whole steps lower for GPUs and TPUs on a machine that has neither: training, prefill, decode and windows of trees."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxllm import PackedBatch, preset
from jaxllm.cache.state import init_cache
from jaxllm.config import GatedDeltaConfig, JetConfig, MoEConfig, Precision
from jaxllm.generation.sampling import Features, init_sampling
from jaxllm.generation.steps import _decode_jit, _prefill_jit
from jaxllm.model import functional
from jaxllm.model.functional import abstract_params
from jaxllm.train.optim import OptimConfig
from jaxllm.train.state import abstract_state
from jaxllm.train.step import make_train_step
from pallas_kernels import dispatch
from pallas_kernels.proof import lowering

ROWS, TOKENS, WINDOW = 2, 256, 16
XLA = dict.fromkeys(dispatch.IMPLEMENTATIONS, "xla")
# Our kernels for every op that has one, XLA for the rest: named, because auto without a pass record is XLA.
OURS = {
    op: "mosaic_gpu" if "mosaic_gpu" in names else "xla" for op, names in dispatch.IMPLEMENTATIONS.items()
}
TARGETS = pytest.mark.parametrize(
    ("lower", "named"),
    [
        pytest.param(lowering.lower_cuda, OURS, id="cuda-ours"),
        pytest.param(lowering.lower_cuda, XLA, id="cuda-xla", marks=pytest.mark.slow),
        pytest.param(lowering.lower_tpu, XLA, id="tpu-xla"),
    ],
)
BACKWARD = (
    "attention_query_gradient",
    "attention_key_gradients",
    "ssd_input_gradients",
    "causal_conv_backward",
    "grouped_matmul_weights",
)
FORWARD = (
    "attention_forward",
    "ssd_outputs",
    "causal_conv_forward",
    "gated_delta_outputs",
    "grouped_matmul_rows",
)


def every_letter():
    """Each kind of layer, in bfloat16, around heads that the kernels take."""
    base = preset("quickstart")
    assert base.attention is not None and base.mamba is not None
    delta = GatedDeltaConfig(num_heads=2, key_head_dim=64, value_head_dim=64)
    return base.replace(
        pattern="M*-EWGJ",
        mamba=dataclasses.replace(base.mamba, head_dim=64, state_size=64, chunk_size=64),
        attention=dataclasses.replace(base.attention, window=64),
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=64),
        delta=delta,
        jet=JetConfig(num_heads=2, key_head_dim=64, value_head_dim=64),
        precision=Precision(param="bfloat16", compute="bfloat16", matmul="bfloat16"),
    )


CFG = every_letter()


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def check(text: str, named, *kernels: str) -> None:
    """The products of every layer are there, the kernels that were named, and nothing that only a CPU needs."""
    attention_layers = sum(letter in "*W" for letter in CFG.pattern)
    assert lowering.outside(text).dots >= len(CFG.pattern) - attention_layers
    for kernel in kernels if named is OURS else ():
        lowering.require_kernel(text, "mosaic_gpu", kernel)
    if named is XLA:
        assert lowering.MOSAIC not in text
    # What holds values in memory on the CPU is a conditional.
    assert "stablehlo.case" not in text and "stablehlo.if" not in text


@TARGETS
def test_the_training_step_lowers(lower, named):
    optim = OptimConfig(schedule="constant", warmup_steps=0)
    whole = integers(ROWS, TOKENS)
    batch = PackedBatch(
        tokens=whole,
        segment_ids=whole,
        positions=whole,
        targets=integers(ROWS, TOKENS, 1),
        loss_mask=jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.float32),
    )
    with dispatch.naming(named):
        text = lower(make_train_step(CFG, optim), abstract_state(CFG, optim), batch, None)
    check(text, named, *FORWARD, *BACKWARD)


def pools():
    return jax.eval_shape(lambda: (init_cache(CFG, ROWS, TOKENS), init_sampling(ROWS)))


@TARGETS
def test_the_prefill_step_lowers(lower, named):
    chunk = integers(ROWS, 64)
    batch = PackedBatch(tokens=chunk, segment_ids=chunk, positions=chunk, slots=integers(ROWS, 1))
    final = jax.ShapeDtypeStruct((ROWS,), jnp.bool_)
    with dispatch.naming(named):
        text = lower(
            _prefill_jit,
            *(abstract_params(CFG), batch, *pools(), final),
            cfg=CFG,
            features=Features(),
            bound=None,
            fresh=False,
        )
    check(text, named, *FORWARD)


@TARGETS
def test_the_decode_step_lowers(lower, named):
    # The convolution of JetBlock has no step; its kernel takes rows of more than one token.
    with dispatch.naming({**named, "dynamic_conv": "xla"}):
        text = lower(
            _decode_jit("bfloat16"),
            *(abstract_params(CFG), *pools(), 1, 1),
            cfg=CFG,
            features=Features(),
            rows=ROWS,
            bound=None,
            k=4,
        )
    steps = ("ssd_step", "gated_delta_step", "causal_conv_step")
    check(text, named, "attention_forward", *steps, "grouped_matmul_rows")


@TARGETS
def test_the_window_of_a_tree_and_its_commit_lower(lower, named):
    nodes = integers(ROWS, WINDOW)
    batch = PackedBatch(
        tokens=nodes,
        segment_ids=nodes,
        positions=nodes,
        slots=integers(ROWS, 1),
        parents=nodes,
    )

    def verify(params, batch, cache, path, n):
        model = functional.merge(CFG, params)
        h, window, _ = model.window(batch, cache)
        return model.head(h), model.commit(window, path, n)

    with dispatch.naming(named):
        text = lower(verify, abstract_params(CFG), batch, pools()[0], integers(ROWS, 4), integers(ROWS))
    check(text, named, "attention_forward", "grouped_matmul_rows")

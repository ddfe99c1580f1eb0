"""Memory estimates against exact sizes and the compiler's; FLOPs against a count by hand."""

import dataclasses

import jax
import pytest

from jaxllm.config import AttentionConfig, GatedDeltaConfig, JetConfig, MoEConfig
from jaxllm.model.functional import abstract_params
from jaxllm.train.context import ContextSettings
from jaxllm.train.flops import forward_flops_per_token, measured_peak, training_flops_per_token
from jaxllm.train.memory import estimate_training_memory
from jaxllm.train.state import abstract_state
from jaxllm.train.step import StepSettings, make_train_step
from parallel.mesh import MeshShape
from tests.train.tiny import tiny_batch, tiny_config


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_state_is_exact(cfg, optim):
    memory = estimate_training_memory(cfg, 4, 16)
    state = abstract_state(cfg, optim)
    assert memory.parameters == memory.gradients == size_of(state.params)
    assert memory.moments == size_of(state.opt_state) - 4  # Adam's count
    assert memory.total == sum(memory.parts.values())
    assert list(memory.parts.values()) == sorted(memory.parts.values(), reverse=True)


DELTA = {
    "delta": GatedDeltaConfig(2, 4, key_head_dim=16, value_head_dim=24, chunk_size=16),
    "jet": JetConfig(2, key_head_dim=16, value_head_dim=32, chunk_size=16),
}


@pytest.mark.parametrize("pattern", ["*-*-", "GJ"])
def test_estimate_is_within_a_factor_of_the_compiler(pattern, optim):
    cfg = tiny_config(pattern, hidden_size=64, **DELTA)
    batch = tiny_batch(8, 128)
    compiled = make_train_step(cfg, optim).lower(abstract_state(cfg, optim), batch, None).compile()
    memory = estimate_training_memory(cfg, 8, 128)
    ours = memory.gradients + memory.activations + memory.logits
    assert 1 / 3 < ours / compiled.memory_analysis().temp_size_in_bytes < 3


def test_what_lowers_memory_lowers_the_estimate(cfg):
    # Deep enough that what is recomputed for one layer is less than what the others keep.
    cfg = cfg.replace(pattern="*-*-*-")

    def total(batch=8, seq=64, devices=1, **settings):
        return estimate_training_memory(cfg, batch, seq, devices, StepSettings(**settings)).total

    assert total(remat="layer") < total(remat="dots") < total()
    assert total(devices=4) < total() < total(batch=16)
    assert total(loss_chunk=64) < total()
    assert estimate_training_memory(
        cfg, 8, 64, 1, StepSettings(accum_steps=4)
    ).activations * 4 == pytest.approx(estimate_training_memory(cfg, 8, 64).activations, rel=1e-3)
    with pytest.raises(ValueError, match="batch=6, seq=8, devices=4"):
        estimate_training_memory(cfg, 6, 8, 4)


def test_devices_that_share_documents_hold_their_slots(cfg):
    one = estimate_training_memory(cfg, 8, 64)

    def shared(**context):
        return estimate_training_memory(
            cfg, 8, 64, MeshShape(context=4), None, ContextSettings(block=16, **context)
        )

    # 8 * 64 tokens on 4 devices in slots of 16, and one slot more.
    assert shared().activations * 8 * 64 == one.activations * 9 * 16
    assert shared().parameters == one.parameters and shared().total < one.total
    assert one.exchanged == 0 < shared(stage_rounds=2).exchanged < shared().exchanged
    # Blocks as large as a device's tokens.
    assert estimate_training_memory(cfg, 8, 64, MeshShape(context=4)).activations * 2 == one.activations


@pytest.mark.parametrize(("window", "blocks"), [(1, 0), (17, 1), (18, 2), (1000, None)])
def test_a_window_bounds_what_other_devices_send(window, blocks):
    """A query block of 16 tokens sees the blocks that its window reaches: those of its 9 slots, before it."""
    heads = dict(num_heads=2, num_kv_heads=1, head_dim=8)
    mesh, context = MeshShape(context=4), ContextSettings(block=16)

    def exchanged(pattern, **attention):
        model = tiny_config(pattern, attention=AttentionConfig(**heads, **attention))
        return estimate_training_memory(model, 8, 64, mesh, None, context).exchanged

    full = exchanged("*-")
    # 27 blocks of the other three devices, which is less than two stages of 16 rounds.
    assert exchanged("W-", window=window) == (full if blocks is None else full * 9 * blocks // 27)
    assert exchanged("W*", window=window) == full


def test_flops_by_hand():
    cfg = tiny_config("*-", tie_embeddings=True)
    projections = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16)
    mlp, head = 2 * (2 * 16 * 24), 2 * 61 * 16
    attention = 4 * 2 * 8 * (9 + 1) / 2
    assert forward_flops_per_token(cfg, 9) == projections + mlp + head + attention
    assert training_flops_per_token(cfg, 9) == 3 * forward_flops_per_token(cfg, 9)
    untied = dataclasses.replace(cfg, tie_embeddings=False)
    assert forward_flops_per_token(untied, 9) == forward_flops_per_token(cfg, 9)


def test_a_window_bounds_what_attention_costs():
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=4)
    full, windowed = (forward_flops_per_token(tiny_config(p, attention=attention), 100) for p in ("*-", "W-"))
    seen = sum(min(i + 1, 4) for i in range(100)) / 100
    assert full - windowed == pytest.approx(4 * 2 * 8 * (50.5 - seen))


def test_mamba_counts_its_scan():
    small, large = (tiny_config("M"), 16), (tiny_config("M"), 4)
    assert forward_flops_per_token(*small) - forward_flops_per_token(*large) == (8 - 4) * (16 + 8)


@pytest.mark.parametrize(("letter", "heads", "dk", "dv"), [("G", 4, 16, 24), ("J", 2, 16, 32)])
def test_the_delta_rule_counts_states_and_triangles(letter, heads, dk, dv):
    cfg = tiny_config(letter, **DELTA)
    long, short = (forward_flops_per_token(cfg, length) for length in (16, 4))
    per_token = 2 * 2 * dk + heads * dk + 2 * heads * dv
    assert long - short == (16 - 4) * per_token
    matrices = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg)) if leaf.ndim == 2)
    assert short == 2 * matrices + 6 * heads * dk * dv + 4 * per_token


def test_experts_count_as_many_as_a_token_meets():
    moe = MoEConfig(num_experts=10, top_k=3, intermediate_size=20, shared_intermediate_size=8, latent_size=6)
    cfg = tiny_config("E", moe=moe)
    routed, shared, router, latent = 3 * 2 * 6 * 20, 2 * 16 * 8, 16 * 10, 2 * 16 * 6
    assert forward_flops_per_token(cfg, 9) == 2 * (routed + shared + router + latent + 61 * 16)


def test_the_estimate_of_experts_is_within_a_factor_of_the_compiler(optim):
    cfg = tiny_config("*E*E", hidden_size=64, moe=MoEConfig(8, 2, 64, shared_intermediate_size=64))
    compiled = (
        make_train_step(cfg, optim).lower(abstract_state(cfg, optim), tiny_batch(8, 128), None).compile()
    )
    memory = estimate_training_memory(cfg, 8, 128)
    ours = memory.gradients + memory.activations + memory.logits
    assert 1 / 3 < ours / compiled.memory_analysis().temp_size_in_bytes < 3


def test_peak_is_a_rate():
    assert measured_peak("float32", size=64, repeats=2) > 1e6

"""``jaxllm info`` against what the model itself says."""

import json

import jax
import pytest

from jaxllm.cache.state import state_bytes
from jaxllm.cli.model_parts import active_parameter_count, parameter_count, parts, per_token_state_bytes
from jaxllm.config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig
from jaxllm.model.functional import abstract_params
from jaxllm.presets import preset

TIED = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    pattern="M*W-M",
    mamba=MambaConfig(num_heads=2, head_dim=32, state_size=16),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, window=8),
    mlp=MLPConfig(128),
    tie_embeddings=True,
)


@pytest.mark.parametrize("cfg", [TIED, preset("quickstart"), preset("mamba2-130m"), preset("llama-3.2-1b")])
def test_parts_add_up_to_the_model(cfg):
    assert parameter_count(cfg) == sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg)))
    blocks = {part.name: part.blocks for part in parts(cfg)}
    assert blocks.get("Mamba-2", 0) == cfg.pattern.count("M")
    assert blocks["norms"] == len(cfg.pattern) + 1
    assert any("transposed" in part.name for part in parts(cfg)) == cfg.tie_embeddings


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("nemotron-3-nano-30b-a3b", 31.578e9, 3.580e9), ("nemotron-3-super", 120.67e9, 12.77e9)],
)
def test_published_counts_of_experts(name, total, active):
    """As the model cards have them: without prediction blocks, with both embedding tables."""
    cfg = preset(name).replace(mtp=None)
    assert parameter_count(cfg) == pytest.approx(total, rel=5e-4)
    assert active_parameter_count(cfg) == pytest.approx(active, rel=5e-4)


def test_active_parameters_are_shown_where_they_are_fewer(cli):
    shown, cfg = cli("info", "nemotron-3-tiny"), preset("nemotron-3-tiny")
    assert "active per token" in shown.out and f"{active_parameter_count(cfg):,}" in shown.out
    assert "mixture of experts" in shown.out
    assert "active" not in cli("info", "quickstart").out


def test_json_has_the_models_own_figures(cli):
    report = json.loads(cli("info", "nemotron-h-8b", "--length", "1000", "--json").out)
    cfg = preset("nemotron-h-8b")
    assert report["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg)))
    assert report["state"]["bytes"] == state_bytes(cfg, 1000)
    assert report["state"]["bytes_per_token"] == per_token_state_bytes(cfg) == 32768


def test_a_purely_recurrent_state_does_not_grow(cli):
    assert "the same at any length" in cli("info", "mamba2-130m").out


def test_the_table_shows_pattern_and_parameters(cli):
    shown = cli("info", "quickstart", "--train", "--batch", "4", "--seq", "128")
    assert shown.code == 0
    for word in (
        "M-*-M-*-",
        "parameters",
        f"{parameter_count(preset('quickstart')):,}",
        "moments",
        "total",
        "MiB",
    ):
        assert word in shown.out


def test_training_memory_is_the_trainers_estimate(cli):
    from jaxllm.train.memory import estimate_training_memory

    report = json.loads(
        cli("info", "small", "--train", "--batch", "8", "--seq", "256", "--devices", "2", "--json").out
    )
    assert report["training"]["total"] == estimate_training_memory(preset("small"), 8, 256, 2).total


def test_training_memory_of_a_mesh(cli):
    from jaxllm.train.memory import estimate_training_memory
    from parallel.mesh import MeshShape

    shown = cli(
        "info", "small", "--train", "--batch", "8", "--seq", "256", "--mesh", "fsdp=4,tensor=2", "--json"
    )
    report = json.loads(shown.out)["training"]
    shared = estimate_training_memory(preset("small"), 8, 256, MeshShape(fsdp=4, tensor=2))
    assert report["total"] == shared.total and report["devices"] == 8
    whole = estimate_training_memory(preset("small"), 8, 256)
    # Norms, biases and convolutions are whole on each device.
    assert 1 / 8 <= shared.parameters / whole.parameters < 1 / 8 * 1.05
    assert whole.gathered == 0 < shared.gathered


def test_folders_work_as_well(cli, tmp_path):
    run = tmp_path / "run"
    (run / "hf").mkdir(parents=True)
    (run / "hf" / "config.json").write_text(TIED.to_json())
    for folder in (run, run / "hf"):
        shown = cli("info", str(folder), "--json")
        assert json.loads(shown.out)["pattern"] == TIED.pattern


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["qickstart"], ["qickstart", "'quickstart'", "nemotron_h_8b"]),
        (["./nowhere"], ["./nowhere", "no such folder"]),
        (["small", "--length", "0"], ["--length", "0", "at least 1"]),
        (["small", "--train", "--batch", "4", "--devices", "3"], ["--batch", "4", "multiple"]),
        (["small", "--train", "--devices", "4", "--mesh", "fsdp=2"], ["--mesh", "fsdp=2", "4"]),
        (
            ["small", "--train", "--mesh", "stages=2"],
            ["--mesh", "stages=2", "data, fsdp, context, tensor, expert, stage"],
        ),
        (["small", "--train", "--mesh", "expert=2"], ["mesh.expert=2", "no experts"]),
    ],
)
def test_mistakes(argv, words, cli):
    shown = cli("info", *argv)
    assert shown.code == 2 and "Traceback" not in shown.err
    assert all(word in shown.err for word in words)


def test_a_folder_without_a_model(cli, tmp_path):
    shown = cli("info", str(tmp_path))
    assert shown.code == 2 and "config.json" in shown.err


def test_a_broken_config(cli, tmp_path):
    (tmp_path / "config.json").write_text("{")
    shown = cli("info", str(tmp_path))
    assert shown.code == 2 and "JSON" in shown.err

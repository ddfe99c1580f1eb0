"""Whole runs of quickstart and train, at a size that a busy core can do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import subprocess_environment

pytestmark = pytest.mark.slow

TINY = [
    "vocab_size=512",
    "batch_size=4",
    "seq_len=64",
    "warmup_steps=5",
    "evaluation_tokens=256",
    "model.pattern=M-*-",
    "model.hidden_size=64",
    "model.mamba.num_heads=2",
    "model.mamba.head_dim=32",
    "model.mamba.state_size=16",
    "model.mamba.chunk_size=32",
    "model.attention.num_heads=2",
    "model.attention.num_kv_heads=1",
    "model.attention.head_dim=32",
    "model.mlp.intermediate_size=128",
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished quickstart of a few seconds, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart") / "a run"
    done = start("--minutes", "0.1", "--out", str(folder), "--tokens", "16")
    out, err = done.communicate(timeout=500)
    assert done.returncode == 0, err
    return folder, out


def start(*argv: str) -> subprocess.Popen[str]:
    """A tiny quickstart in a process of its own."""
    resumed = "--resume" in argv
    sizes = [] if resumed else ["--data", str(ROOT / "src/jaxllm/**/*.py"), "--set", *TINY]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxllm.cli.main", "quickstart", *argv, *sizes],
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_figures_and_files(run_folder):
    folder, out = run_folder
    content = json.loads((folder / "figures.json").read_text())
    assert {"inputs", "versions", "machine", "device", "figures", "stage_seconds", "completion"} <= set(
        content
    )
    for name in ("gzip", "xz", "bigram", "trigram"):
        assert isinstance(content[f"beats_{name}"], bool)
        assert content["figures"][f"{name}_bits_per_byte"] > 0
    figures = content["figures"]
    assert figures["loss_after"] < figures["loss_before"]
    assert figures["train_seconds"] >= 6.0 and figures["compile_seconds"] > 0
    assert figures["train_tokens"] == figures["steps"] * 4 * 64
    assert figures["first_token_seconds"] > 0 and figures["decode_tokens_per_second"] > 0
    for file in (
        "loss.png",
        "metrics.jsonl",
        "config.json",
        "tokenizer.json",
        "quickstart.json",
        "checkpoints/steps",
    ):
        assert (folder / file).exists(), file
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / "hf" / file).exists(), file
    for word in (
        "before training",
        "after training",
        "gzip -9",
        "time to first token",
        "figures.json",
        "a run",
    ):
        assert word in out
    verdict = "beaten" if content["beats_xz"] else "not beaten"
    assert verdict in out


def test_the_folder_is_not_overwritten(run_folder):
    process = start("--out", str(run_folder[0]))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "--resume" in err and "Traceback" not in err


def test_a_finished_run_goes_on_with_more_minutes(run_folder):
    folder, _ = run_folder
    before = json.loads((folder / "figures.json").read_text())["figures"]
    process = start("--resume", "--out", str(folder), "--minutes", "0.15", "--tokens", "4")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    after = json.loads((folder / "figures.json").read_text())["figures"]
    assert after["steps"] > before["steps"] and after["loss_before"] == before["loss_before"]
    assert "reused from the cache" in out and f"step {before['steps']:,}" in out


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    process = start("--minutes", "5", "--out", str(folder))
    deadline = time.monotonic() + 300
    metrics = folder / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "jaxllm quickstart --resume --out" in out and os.path.basename(folder) in out
    assert list((folder / "checkpoints" / "steps").iterdir())


@pytest.mark.oracle
def test_transformers_loads_the_export(run_folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run_folder[0] / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "NemotronHForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


def test_train_resumes_and_exports(tmp_path, process):
    sizes = [change for change in TINY if change.startswith("model.")]
    data = [
        f"data.source={ROOT}/src/jaxllm/cli/*.py",
        "data.vocab_size=512",
        "data.batch_size=4",
        "data.seq_len=64",
    ]
    example = process("train", "--example")
    file = tmp_path / "run.yaml"
    file.write_text(example.out)
    out = str(tmp_path / "out")
    first = process(
        "train",
        str(file),
        "--out",
        out,
        "--profile",
        "2:4",
        "--set",
        *sizes,
        *data,
        "trainer.steps=8",
        "trainer.eval_every=4",
    )
    assert first.code == 0, first.err
    assert (tmp_path / "out" / "hf" / "config.json").is_file() and (tmp_path / "out" / "loss.png").is_file()
    assert list((tmp_path / "out" / "profile").rglob("*.xplane.pb"))
    more = process("train", f"{out}/run.yaml", "--resume", "--set", "trainer.steps=12")
    assert more.code == 0, more.err
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["figures"]["steps"] == 12
    assert "step 8" in more.out

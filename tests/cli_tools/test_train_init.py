"""``jaxllm train --init``: from somebody's weights, with their model and tokenizer."""

import jax
import numpy as np
import pytest
import yaml

from jaxllm import ConfigError, LanguageModel, hf, load
from jaxllm.cli import train_session
from jaxllm.cli.train_run import build, read
from jaxllm.data.tokenizer import Tokenizer

SETTINGS = {"trainer": {"steps": 2, "tensorboard": False}, "optim": {"lr": 1e-9, "warmup_steps": 1}}


@pytest.fixture
def config(texts, tmp_path):
    data = {"source": str(texts / "*.txt"), "batch_size": 2, "seq_len": 32, "evaluation_tokens": 64}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": "quickstart", "data": data, **SETTINGS}))
    return file


@pytest.mark.slow
def test_the_weights_are_where_training_starts(cli, config, folder, tmp_path):
    out = tmp_path / "run"
    done = cli("train", config, "--init", folder, "--out", out)
    assert done.code == 0, done.err
    source, trained = load(folder), load(out)
    assert trained.cfg.pattern == source.cfg.pattern and trained.cfg.vocab_size == source.cfg.vocab_size
    assert trained.tokenizer.fingerprint == source.tokenizer.fingerprint
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), trained.params, source.params
    )
    # What it wrote down goes on, and with other numbers of its own as a model to start from.
    again = cli("train", out / "run.yaml", "--resume", "--set", "trainer.steps=3")
    assert again.code == 0, again.err
    assert read(config, init=out).model == trained.cfg


@pytest.mark.parametrize("source", ["hf", "run"])
def test_the_model_is_the_folders(cli, folder, tmp_path, source):
    place = folder
    if source == "run":
        place = tmp_path / "run"
        assert cli("convert", folder, place).code == 0
    run = build({**SETTINGS, "init": str(place), "model": {"precision": {"matmul": "bfloat16"}}})
    assert run.fixed_vocabulary and run.fixed_precision and run.model.precision.matmul == "bfloat16"
    assert run.model.replace(precision=load(folder).cfg.precision) == load(folder).cfg
    (tmp_path / "again.yaml").write_text(run.to_yaml())
    assert read(tmp_path / "again.yaml") == run


class Handed(Exception):
    """What the trainer was called with, instead of training."""


@pytest.mark.parametrize("source", ["hf", "run"])
def test_the_trainer_is_handed_the_folders_weights_and_nothing_else(
    cli, config, folder, tmp_path, monkeypatch, source
):
    """No checkpoint in the new folder: an optimiser's state or a step count would come from one."""
    place = folder
    if source == "run":
        place = tmp_path / "run"
        assert cli("convert", folder, place).code == 0

    def fit(cfg, optim, loader, settings, *, folder, params, **_):
        loader.close()
        raise Handed(cfg, folder, params)

    monkeypatch.setattr(train_session, "fit", fit)
    with pytest.raises(Handed) as handed:
        train_session.train(read(config, [f"out={tmp_path / 'out'}"], init=place))
    cfg, out, params = handed.value.args
    start = load(folder)
    assert cfg.replace(precision=start.cfg.precision) == start.cfg
    jax.tree.map(np.testing.assert_array_equal, params, start.params)
    assert sorted(file.name for file in out.iterdir()) == [
        "run.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert Tokenizer.load(out).fingerprint == start.tokenizer.fingerprint


def test_mistakes_are_named(cli, config, folder, model, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.pattern: init=.* has a model of its own"):
        build({**SETTINGS, "init": str(folder), "model": {"pattern": "M-"}})
    done = cli("train", config, "--init", tmp_path / "none")
    assert done.code == 2 and "no such folder" in " ".join(done.err.replace("│", " ").split())
    bare = hf.save(LanguageModel(model.cfg, model.params), tmp_path / "bare")
    done = cli("train", config, "--init", bare, "--out", tmp_path / "out")
    assert done.code == 2 and "tokenizer.json" in done.err and "Traceback" not in done.err

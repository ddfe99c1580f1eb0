"""Weights & Biases gets what metrics.jsonl gets, and keeps its own files in the run's folder."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from jaxllm.config import ConfigError
from jaxllm.train.settings import TrainSettings
from jaxllm.train.trainer import fit
from jaxllm.train.writers import read_jsonl
from tests.train.tiny import TinyLoader


class Recorder(ModuleType):
    """Stands in for the package: what it was started with, and what it was told."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = {}, [], 0

    def init(self, **settings):
        self.started = settings
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, values, step):
        self.logged.append((step, values))

    def _finish(self):
        self.finished += 1


def test_gets_what_the_json_lines_get(tmp_path, cfg, optim, monkeypatch):
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    fit(
        cfg,
        optim,
        TinyLoader(),
        TrainSettings(steps=4, eval_every=2, wandb="project"),
        folder=tmp_path,
        evaluate=lambda params, step: {"loss": 0.5 * step},
    )
    assert wandb.started["project"] == "project" and wandb.started["dir"] == tmp_path
    assert wandb.started["config"]["model"] == cfg.to_dict() and wandb.finished == 1
    lines = [line for line in read_jsonl(tmp_path / "metrics.jsonl") if line["kind"] in ("train", "eval")]
    assert [step for step, _ in wandb.logged] == [line["step"] for line in lines]
    for line, (_, values) in zip(lines, wandb.logged, strict=True):
        kind = line["kind"]
        assert all(name.startswith(f"{kind}/") for name in values)
        assert values[f"{kind}/loss"] == pytest.approx(line["loss"])


def test_its_absence_is_said_before_the_first_step(tmp_path, cfg, optim, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxllm\[wandb\]'"):
        fit(cfg, optim, TinyLoader(), TrainSettings(steps=1, wandb="project"), folder=tmp_path)

"""A tiny exported model, some text, and command lines run in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxllm import hf
from jaxllm.cli import environment, main
from tests.evaluate.tiny import TEXTS, tiny_model


@dataclass(frozen=True)
class Result:
    """What one command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command line; what environment.prepare would set stays unset."""
    monkeypatch.setattr(environment, "prepare", lambda *, streams: None)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*argv: object) -> Result:
        try:
            code = main.dispatch([str(each) for each in argv])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        text = capsys.readouterr()
        return Result(code, text.out, text.err)

    return call


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory) -> Path:
    return hf.save(model, tmp_path_factory.mktemp("export") / "hf")


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for index, text in enumerate(TEXTS):
        (root / f"{index}.txt").write_text(text, encoding="utf-8")
    return root

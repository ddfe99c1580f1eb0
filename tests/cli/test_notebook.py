"""The quickstart notebook, from its first cell to its last."""

import json
import os
from pathlib import Path

import nbformat
import pytest

from tests.cli.conftest import ROOT, subprocess_environment

NOTEBOOK = ROOT / "experiments/notebooks/quickstart.ipynb"


def cells(kind: str) -> list[str]:
    """Sources of the cells of one kind."""
    return [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == kind]


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count")


@pytest.fixture
def first_cell(tmp_path, monkeypatch):
    """Runs the install cell with a faked runtime; gives what it says and the pip commands it started."""

    def run(versions, *, source="", replace_jax=False, after=None, smi=None):
        code = cells("code")[0].replace('SOURCE = ""', f"SOURCE = {source!r}")
        code = code.replace("REPLACE_JAX = False", f"REPLACE_JAX = {replace_jax}").replace(
            "print(install())", ""
        )
        names = {}
        exec(code, names)
        installed = []

        def fake_run(command, **_):
            if "pip" in command:
                installed.append(command)
                versions.update(after or {})
            return type("Done", (), {"stdout": smi or ""})

        names["version"] = versions.get
        names["importable"] = lambda name: name in versions
        names["subprocess"] = type("Fake", (), {"run": staticmethod(fake_run)})
        names["shutil"] = type(
            "Fake", (), {"which": staticmethod(lambda name: name if smi and "nvidia" in name else None)}
        )
        return names["install"](), installed

    monkeypatch.chdir(tmp_path)
    return run


def test_it_goes_on_where_jaxllm_is_installed(first_cell):
    said, installed = first_cell({"jaxllm": "0.1.0"})
    assert said.endswith("go on.") and not installed


def test_it_asks_for_a_source(first_cell):
    said, installed = first_cell({})
    assert "STOP" in said and "SOURCE" in said and not installed


def test_it_never_swaps_an_old_jax_silently(first_cell):
    said, installed = first_cell({"jax": "0.7.2"}, source="/src/jaxllm")
    assert "STOP" in said and "0.7.2" in said and not installed
    said, installed = first_cell(
        {"jax": "0.7.2"},
        source="/src/jaxllm",
        replace_jax=True,
        after={"jax": "0.10.2"},
        smi="CUDA Version: 12.4",
    )
    assert "RESTART" in said and "jax" in said and installed[0][-1] == "/src/jaxllm[cuda12]"


def test_it_pins_a_jax_that_fits(first_cell):
    said, installed = first_cell(
        {"jax": "0.10.2"}, source="git+https://example.org/jaxllm", smi="CUDA Version: 13.0"
    )
    assert said.endswith("go on.")
    assert installed[0][-2:] == ["jaxllm @ git+https://example.org/jaxllm", "jax==0.10.2"]


def test_it_takes_the_checkout_around_it(first_cell, tmp_path, monkeypatch):
    (tmp_path / "src/jaxllm").mkdir(parents=True)
    (tmp_path / "experiments").mkdir()
    monkeypatch.chdir(tmp_path / "experiments")
    _, installed = first_cell({})
    assert installed[0][-1] == str(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning")
def test_it_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    # CI sets more; here enough for a few steps.
    monkeypatch.setenv("JAXLLM_NOTEBOOK_MINUTES", os.environ.get("JAXLLM_NOTEBOOK_MINUTES", "0.1"))
    for name, value in subprocess_environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    run = tmp_path / "runs" / "notebook"
    figures = json.loads((run / "figures.json").read_text())
    assert figures["figures"]["loss_after"] < figures["figures"]["loss_before"]
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "What the model has learned" in printed and "read_file(path" in printed
    assert Path(run / "hf" / "model.safetensors").is_file()

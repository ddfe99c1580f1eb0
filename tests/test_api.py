"""The stable names: there, documented, light to import, and ours."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxllm

ROOT = Path(__file__).parents[1]


def python(code: str, *path: Path) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that finds ``path`` before this checkout."""
    entries = [*path, ROOT / "src", ROOT]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, entries)), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", jaxllm.__all__)
def test_every_public_name_loads_and_is_documented(name):
    value = getattr(jaxllm, name)
    text = inspect.getdoc(value)
    assert text and text.splitlines()[0].strip()
    # A dataclass without a docstring gets its signature as one.
    assert not text.startswith(f"{name}(")


@pytest.mark.parametrize("name", jaxllm.__all__)
def test_every_public_function_and_method_is_documented(name):
    value = getattr(jaxllm, name)
    members = inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else [(name, value)]
    own = [
        (each, member)
        for each, member in members
        if not each.startswith("_") and (getattr(member, "__module__", "") or "").startswith("jaxllm")
    ]
    assert [each for each, member in own if not inspect.getdoc(member)] == []


def test_names_are_listed_once_and_by_dir():
    assert len(set(jaxllm.__all__)) == len(jaxllm.__all__)
    assert set(jaxllm.__all__) <= set(dir(jaxllm))
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        jaxllm.generat


def test_importing_jaxllm_is_light():
    heavy = [
        "jax",
        "flax",
        "numpy",
        "optax",
        "orbax",
        "grain",
        "torch",
        "transformers",
        "tokenizers",
        "tyro",
        "rich",
    ]
    done = python(f"import sys, json, jaxllm; print(json.dumps([m for m in {heavy} if m in sys.modules]))")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("name", ["parallel", "pallas_kernels"])
def test_the_companion_packages_are_ours(name):
    assert importlib.import_module(name).PROJECT == "jaxllm"


@pytest.mark.parametrize("name", ["parallel", "pallas_kernels"])
def test_a_shadowing_package_is_named(name, tmp_path):
    fake = tmp_path / name
    fake.mkdir()
    (fake / "__init__.py").write_text("")
    done = python("import jaxllm", tmp_path)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError")
    assert name in message and str(fake) in message and "sys.path" in message

"""The floors of the house, read from the syntax trees: imports point down, without circles, and keep out what must stay out.

Every rule is a function of a folder that gives its violations as text; each is shown to fail on a planted one.
"""

import ast
import graphlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. An import may only point to an earlier name, or stay on its floor.
FLOORS = [
    "pallas_kernels",
    "parallel",
    "jaxllm.axes",
    "jaxllm.config",
    "jaxllm.batch",
    "jaxllm.linear",
    "jaxllm.measure",
    "jaxllm.data",
    "jaxllm.quant",
    "jaxllm.cache",
    "jaxllm.model",
    "jaxllm.hf",
    "jaxllm.presets",
    "jaxllm.train",
    "jaxllm.adapters",
    "jaxllm.generation",
    "jaxllm.evaluate",
    "jaxllm.offload",
    "jaxllm.retrieval",
    "jaxllm.compress",
    "jaxllm.serve",
    "jaxllm.cli",
    "experiments",
    "tests",
]
LIBRARY = ("pallas_kernels", "parallel", "jaxllm")
# Packages that only the named file may import; None: no file of the library.
RESTRICTED = {"torch": None, "transformers": None, "lm_eval": "src/jaxllm/evaluate/lm_harness.py"}
MOST_LINES = 700


@dataclass(frozen=True)
class Import:
    """One import statement: the file, its module, its line, the full name that it asks for, and if it is in a function."""

    file: str
    module: str
    line: int
    name: str
    lazy: bool


def modules(root: Path) -> dict[str, Path]:
    """Dotted name to file of every Python file that belongs to a floor."""
    found = {}
    for base in (root / "src", root):
        for package in (*LIBRARY, "experiments", "tests"):
            for file in sorted((base / package).rglob("*.py")):
                parts = file.relative_to(base).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@lru_cache
def _tree(file: Path, _stamp: int) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def syntax(file: Path) -> ast.Module:
    """The syntax tree of a file, parsed once per state of it."""
    return _tree(file, file.stat().st_mtime_ns)


def imports(root: Path, library_only: bool = False) -> Iterator[Import]:
    """Every import, those inside functions included; ``from a import b`` asks for ``a.b``."""
    for module, file in modules(root).items():
        if library_only and module.split(".")[0] not in LIBRARY:
            continue
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        tree = syntax(file)
        functions = [
            node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        inner = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                names = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                yield Import(file.relative_to(root).as_posix(), module, node.lineno, name, id(node) in inner)


def floor(name: str) -> int | None:
    """Index of the floor that a module or imported name belongs to; None for third parties and for jaxllm itself."""
    parts = name.split(".")
    key = ".".join(parts[:2]) if parts[0] == "jaxllm" else parts[0]
    return FLOORS.index(key) if key in FLOORS else None


def upward_imports(root: Path) -> list[str]:
    """Imports that point to a later floor, and modules and imported parts of jaxllm that no floor names."""
    found = []
    for module, file in modules(root).items():
        if floor(module) is None and module not in ("jaxllm", "jaxllm.__main__"):
            found.append(f"{file.relative_to(root).as_posix()}: {module} is on no floor; add it to FLOORS")
    for each in imports(root):
        here, there = floor(each.module), floor(each.name)
        top_level = each.name.split(".")[0] == "jaxllm" and there is None
        if here is None or (there is None and not top_level):
            continue
        if top_level and each.module.split(".")[0] in LIBRARY and each.name != "jaxllm.__version__":
            found.append(
                f"{each.file}:{each.line}: {each.name}: the library imports from its floors, not from its top"
            )
        elif there is not None and there > here:
            found.append(
                f"{each.file}:{each.line}: {FLOORS[here]} imports {each.name}, which is on a later floor"
            )
    return found


def circles(root: Path) -> list[str]:
    """A circle of imports between modules, if there is one."""
    known = modules(root)
    graph: dict[str, set[str]] = {module: set() for module in known}
    for each in imports(root, library_only=True):
        name = each.name if each.name in known else each.name.rpartition(".")[0]
        if each.lazy and each.file.endswith("__init__.py") and name.startswith(f"{each.module}."):
            continue  # a package may open its own rooms when they are needed
        if name in known and name != each.module:
            graph[each.module].add(name)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


def restricted_imports(root: Path) -> list[str]:
    """torch, transformers and lm_eval in the library, functions included."""
    return [
        f"{each.file}:{each.line}: {each.name}"
        for each in imports(root, library_only=True)
        if each.name.split(".")[0] in RESTRICTED and RESTRICTED[each.name.split(".")[0]] != each.file
    ]


def version_dependence(root: Path) -> list[str]:
    """``jax.experimental`` and JAX version checks outside compat.py."""
    found = [
        f"{each.file}:{each.line}: {each.name} belongs into compat.py"
        for each in imports(root, library_only=True)
        if each.name.startswith(("jax.experimental", "jax.version", "jax.__version__"))
        and not each.file.endswith("/compat.py")
    ]
    for module, file in modules(root).items():
        if module.split(".")[0] not in LIBRARY or file.name == "compat.py":
            continue
        asked = [ast.unparse(node) for node in ast.walk(syntax(file)) if isinstance(node, ast.Attribute)]
        versions = {"jax.__version__", "jax.__version_info__", "jax.version"}.intersection(asked)
        found += [f"{file.relative_to(root).as_posix()}: {name} belongs into compat.py" for name in versions]
    return found


def tracked(root: Path) -> list[Path]:
    """Files under version control; every file where there is none."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, text=True
        ).stdout.split("\0")
        return [root / name for name in listed if name and (root / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        hidden = re.compile(r"(^|/)(\.(?!ci/)|__pycache__|build/|dist/|runs/)")
        return [
            f
            for f in sorted(root.rglob("*"))
            if f.is_file() and not hidden.search(f.relative_to(root).as_posix())
        ]


def long_files(root: Path) -> list[str]:
    """Python files over the limit: two ideas in one."""
    lengths = {f: len(f.read_bytes().splitlines()) for f in tracked(root) if f.suffix == ".py"}
    return [
        f"{file.relative_to(root).as_posix()}: {n} lines" for file, n in lengths.items() if n > MOST_LINES
    ]


# Absolute paths of somebody's machine; not URLs, not relative paths that merely contain such a folder.
PRIVATE = re.compile(rb"(?<![\w./:~$}>-])/(?:work|root|home|Users|mnt)/[\w.-]")


def private_paths(root: Path) -> list[str]:
    """Tracked text files that name a private machine path."""
    found = []
    for file in tracked(root):
        content = file.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.splitlines(), 1):
            if match := PRIVATE.search(line):
                place = f"{file.relative_to(root).as_posix()}:{number}"
                found.append(f"{place}: {line[match.start() : match.start() + 40].decode(errors='replace')}")
    return found


RULES = [upward_imports, circles, restricted_imports, version_dependence, long_files, private_paths]

PLANTED = [
    (upward_imports, {"src/jaxllm/model/bad.py": "from jaxllm.train.loop import x"}, "later floor"),
    (upward_imports, {"src/jaxllm/model/bad.py": "def f():\n    import jaxllm.train"}, "later floor"),
    (upward_imports, {"pallas_kernels/bad.py": "from parallel import mesh"}, "later floor"),
    (upward_imports, {"src/jaxllm/config.py": "import experiments.bench"}, "later floor"),
    (upward_imports, {"src/jaxllm/config.py": "from tests.conftest import seed"}, "later floor"),
    (upward_imports, {"src/jaxllm/model/bad.py": "from jaxllm import generate"}, "not from its top"),
    (upward_imports, {"src/jaxllm/model/bad.py": "from ..train import loop"}, "later floor"),
    (upward_imports, {"src/jaxllm/attic/thing.py": ""}, "on no floor"),
    (
        circles,
        {
            "src/jaxllm/model/a.py": "from jaxllm.model.b import x",
            "src/jaxllm/model/b.py": "import jaxllm.model.a",
        },
        "->",
    ),
    (circles, {"parallel/a.py": "from . import b", "parallel/b.py": "from parallel import a"}, "->"),
    (restricted_imports, {"src/jaxllm/hf/bad.py": "def f():\n    import torch.nn"}, "torch.nn"),
    (restricted_imports, {"parallel/bad.py": "from transformers import AutoModel"}, "AutoModel"),
    (restricted_imports, {"src/jaxllm/evaluate/text.py": "import lm_eval"}, "lm_eval"),
    (
        version_dependence,
        {"pallas_kernels/ssd/bad.py": "from jax.experimental import pallas as pl"},
        "compat.py",
    ),
    (
        version_dependence,
        {"src/jaxllm/model/bad.py": "import jax\nif jax.__version__ > '0.11': pass"},
        "compat.py",
    ),
    (long_files, {"src/jaxllm/model/bad.py": "x = 1\n" * (MOST_LINES + 1)}, "701 lines"),
    (private_paths, {"docs/bad.md": "see /" + "home/someone/notes"}, "bad.md:1"),
    (private_paths, {"experiments/results/bad.json": '{"folder": "/' + 'root/.cache"}'}, "bad.json:1"),
]

SOUND = {
    "src/jaxllm/__init__.py": "import importlib\nimport pallas_kernels, parallel\n",
    "src/jaxllm/config.py": "",
    "src/jaxllm/model/a.py": "import jax, numpy\nfrom jaxllm.config import ConfigError\nfrom pallas_kernels import ssd\n",
    "src/jaxllm/model/__init__.py": "from jaxllm.model.a import thing\n",
    "src/jaxllm/cli/main.py": "from jaxllm import __version__\nfrom jaxllm.model import thing\n",
    "src/jaxllm/evaluate/lm_harness.py": "from lm_eval.api.model import LM\n",
    "pallas_kernels/compat.py": "import jax\nfrom jax.experimental import pallas\nNEW = jax.__version__ > '0.11'\n",
    "tests/test_x.py": "import torch, transformers\nfrom jaxllm import generate\n",
    "docs/sound.md": "see https://example.org/home/page and docs/home/x and ~/texts/y and $HOME/work/z\n",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    """A tree of files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_stands(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_house_is_let_be(rule, tmp_path):
    assert rule(plant(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("rule", "files", "words"), PLANTED)
def test_a_planted_violation_is_found(rule, files, words, tmp_path):
    found = rule(plant(tmp_path, files))
    assert len(found) == 1 and words in found[0]


def test_the_floors_see_the_whole_library():
    """A rule that reads no file would pass for ever."""
    found = modules(ROOT)
    assert {"jaxllm.model.hybrid", "pallas_kernels.ssd.api", "parallel", "tests.test_architecture"} <= set(
        found
    )
    assert sum(each.name.startswith("jaxllm.") for each in imports(ROOT, library_only=True)) > 100

"""Pages say what is true: their code runs, their links lead somewhere, their tables are those of the results."""

import os
import re
import shlex
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments import render_tables

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*/*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
# Pages whose code runs for more than a few seconds.
SLOW = {
    "train-on-my-text.md",
    "train-on-several-devices.md",
    "bring-a-hugging-face-model.md",
    "write-a-policy.md",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its line in the page, the words behind the fence, and its text without the fence's indent."""

    line: int
    words: tuple[str, ...]
    text: str

    @property
    def runs(self) -> bool:
        """Python always runs; a shell block where it says so."""
        return self.words[:1] == ("python",) or (
            self.words[:1] in (("bash",), ("console",)) and "run" in self.words
        )


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        body = "".join(
            line[indent:] if line.strip() else line for line in match["body"].splitlines(keepends=True)
        )
        found.append(Block(text[: match.start()].count("\n") + 2, tuple(match["info"].split()), body))
    return found


def shell_commands(block: Block) -> str:
    """The commands of a shell block; in a console block those behind ``$``."""
    if block.words[0] == "bash":
        return block.text
    return "\n".join(line[2:] for line in block.text.splitlines() if line.startswith("$ "))


def run_shell(script: str, folder: Path) -> None:
    """Run a script in which ``jaxllm`` and ``python`` are those of this checkout and this interpreter."""
    programs = folder / ".programs"
    programs.mkdir(exist_ok=True)
    for name, arguments in (("jaxllm", "-m jaxllm.cli.main"), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "100",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def run_page(page: Path, folder: Path) -> int:
    """Run a page's blocks in order, Python in one namespace; how many there were."""
    namespace: dict[str, object] = {"__name__": page.stem}
    count = 0
    for block in blocks(page.read_text(encoding="utf-8")):
        if not block.runs:
            continue
        count += 1
        if block.words[0] == "python":
            # Lines of a traceback shall be those of the page.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
        else:
            run_shell(shell_commands(block), folder)
    return count


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])
        for page in PAGES
    ],
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    assert run_page(page, tmp_path) > 0


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings make on GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_formatted_code(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        assert block.words, f"{page.name}:{block.line}: say what language the block is in"
        if block.words[0] == "python":
            compile(block.text, f"{page.name}:{block.line}", "exec")
        if block.words[0] in ("bash", "console"):
            done = subprocess.run(["bash", "-n", "-c", shell_commands(block)], capture_output=True, text=True)
            assert done.returncode == 0, f"{page.name}:{block.line}: {done.stderr}"


def test_the_readme_lists_the_commands_there_are():
    from jaxllm.cli.main import COMMANDS

    listed = re.findall(r"^\| `jaxllm (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == list(COMMANDS)


def test_the_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, last in (("quickstart", ".venv/bin/jaxllm quickstart"), ("tests", ".venv/bin/pytest -n 2")):
        match = re.search(rf"<!-- command: {name} -->\n```bash\n(.+)\n```", text)
        assert match and match[1].startswith("python3 -m venv .venv && ") and match[1].endswith(last)


def test_tables_are_those_of_the_results(capsys):
    assert render_tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_figure_makes_a_table_stale(tmp_path):
    result = {
        "device": "cpu",
        "jax": "1",
        "results": [
            {
                "case": "ssd",
                "operands": "float32",
                "forward_tokens_per_s": 1234.5,
                "forward_backward_tokens_per_s": None,
                "forward_bound_tokens_per_s": 2e6,
            }
        ],
    }
    (tmp_path / "kernels.json").write_text(render_tables.json.dumps(result))
    page = "a\n<!-- table: kernels kernels.json -->\nold\n<!-- end of table -->\nb"
    fresh = render_tables.refreshed(page, tmp_path)
    assert "| ssd | float32 | 1,234 | - | 2,000,000 |" in fresh and "old" not in fresh
    assert render_tables.refreshed(fresh, tmp_path) == fresh
    assert "Not measured yet" in render_tables.refreshed(page.replace("kernels.json", "none.json"), tmp_path)
    with pytest.raises(render_tables.TableError, match="known are"):
        render_tables.refreshed(page.replace("kernels k", "odd k"), tmp_path)


def test_the_custom_loop_learns(tmp_path):
    run_shell(f"python {shlex.quote(str(ROOT / 'experiments/examples/custom_loop.py'))} > out.txt", tmp_path)
    losses = [float(line.split()[-1]) for line in (tmp_path / "out.txt").read_text().splitlines()]
    assert losses[0] > 5 and losses[-1] < 1

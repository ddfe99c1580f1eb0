"""Dispatch, help and errors: what a newcomer meets before anything has run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.cli import main
from jaxllm.cli.errors import UserError, explain
from jaxllm.config import ConfigError
from jaxllm.data.errors import CorpusError
from tests.cli.conftest import subprocess_environment

HEAVY = (
    "jax",
    "numpy",
    "flax",
    "optax",
    "orbax",
    "grain",
    "tyro",
    "rich",
    "yaml",
    "matplotlib",
    "tokenizers",
    "torch",
)


@pytest.mark.parametrize(
    "statement",
    [
        "import jaxllm",
        "from jaxllm.cli.main import dispatch; dispatch(['--help'])",
        "from jaxllm.cli.main import dispatch; dispatch(['--version'])",
    ],
)
def test_help_version_and_import_load_nothing_heavy(statement):
    code = f"import sys; {statement}; print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=subprocess_environment(), capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("name", main.COMMANDS)
def test_parsing_a_command_does_not_import_jax(name, process):
    code = (
        "import sys; from jaxllm.cli.main import dispatch\n"
        f"try: dispatch([{name!r}, '--help'])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print('jax' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=subprocess_environment(), capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "False"
    assert f"jaxllm {name}" in done.stdout


def test_help_lists_every_command(cli):
    shown = cli("--help")
    assert shown.code == 0
    assert all(
        f"  {name} " in shown.out and command.summary in shown.out for name, command in main.COMMANDS.items()
    )


def test_nothing_given_shows_the_help_as_a_mistake(cli):
    shown = cli()
    assert shown.code == 2 and "usage: " in shown.out


def test_version(cli):
    from jaxllm import __version__

    assert cli("--version").out == f"jaxllm {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["trian", "quickstart", "doctor"]),
        (["doctor", "--jsn"], ["--jsn", "--json"]),
        (["quickstart", "--minutes", "soon"], ["--minutes", "soon"]),
        (["info"], ["required"]),
    ],
)
def test_wrong_words_are_named_and_exit_with_2(argv, words, cli):
    shown = cli(*argv)
    assert shown.code == 2
    text = shown.out + shown.err
    assert all(word in text for word in words)
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            UserError("--minutes", 0, "a positive number", "Try 5."),
            ["--minutes", "0", "a positive number", "Try 5."],
        ),
        (ConfigError("pattern='X': unknown letter X"), ["unknown letter X"]),
        (CorpusError("the standard library's sources: found none"), ["found none"]),
        (FileNotFoundError(2, "No such file or directory", "run.yaml"), ["run.yaml", "no such file"]),
    ],
)
def test_a_users_mistake_is_one_message_without_traceback(error, words, cli, monkeypatch):
    from jaxllm.cli import doctor

    def fail(_):
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    shown = cli("doctor")
    assert shown.code == 2
    assert all(word in shown.err for word in words)
    assert "Traceback" not in shown.err


def test_a_bug_keeps_its_traceback(monkeypatch, cli):
    from jaxllm.cli import doctor

    monkeypatch.setattr(doctor, "run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("doctor")
    assert explain(ZeroDivisionError()) is None


def test_ctrl_c_is_not_an_error_report(monkeypatch, cli):
    from jaxllm.cli import doctor

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    shown = cli("doctor")
    assert shown.code == 130 and "Traceback" not in shown.err


def test_preparation_keeps_what_the_user_has_set(monkeypatch, tmp_path):
    import os
    import warnings

    from jaxllm.cli import environment

    # The allocator is the whole test process's: this keeps it as it is.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        environment.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    with warnings.catch_warnings():
        environment.prepare()
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) == tmp_path / "jaxllm" / "xla"


def test_simulated_devices_have_threads_to_wait_in(monkeypatch):
    import os
    import warnings

    from jaxllm.cli import environment

    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    for given, expected in ((None, max(32, os.cpu_count() or 1)), ("5", 5)):
        monkeypatch.delenv("NPROC", raising=False)
        if given is not None:
            monkeypatch.setenv("NPROC", given)
        with warnings.catch_warnings():
            environment.prepare()
        assert int(os.environ["NPROC"]) == expected


ALLOCATES = """
import ctypes, resource, sys
from pathlib import Path
from jaxllm.cli import environment

tuned = getattr(environment, sys.argv[1])() if len(sys.argv) > 1 else None
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would hide the faults
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
# Once a block of 31 MiB has been freed, glibc takes smaller ones from the heap, unless it was told a limit.
for megabytes in (31, *range(16, 31), *(64,) * 20):
    block = libc.malloc(megabytes << 20)
    ctypes.memset(block, 1, megabytes << 20)
    above = libc.malloc(1 << 16)  # in the heap, so that it cannot shrink
    ctypes.memset(above, 1, 1 << 16)
    libc.free(block)
resident = int(Path("/proc/self/statm").read_text().split()[1]) >> 8
print(tuned, resource.getrusage(resource.RUSAGE_SELF).ru_minflt, resident)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept_or_returned_unless_the_user_tunes_malloc():
    def allocate(*how: str, **variables: str) -> tuple[str, int, int]:
        done = subprocess.run(
            [sys.executable, "-c", ALLOCATES, *how],
            env=subprocess_environment() | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        tuned, faults, resident = done.stdout.split()
        return tuned, int(faults), int(resident)

    kept, returned, left = allocate("keep_freed_memory"), allocate("return_freed_memory"), allocate()
    print(kept, returned, left)
    assert kept[0] == returned[0] == "True"
    assert kept[1] < left[1] / 3
    assert returned[2] < min(kept[2], left[2]) - 15
    for how in ("keep_freed_memory", "return_freed_memory"):
        for name in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_"):
            assert allocate(how, **{name: str(2**20)})[0] == "False"


def test_only_a_conversion_returns_freed_memory(monkeypatch):
    from jaxllm.cli import environment

    prepared = {}
    monkeypatch.setattr(environment, "prepare", lambda *, streams: prepared.update({name: streams}))
    for name in ("info", "convert"):
        # --help of a subcommand ends before it does anything.
        with pytest.raises(SystemExit):
            main.dispatch([name, "--help"])
    assert prepared == {"info": False, "convert": True}


def test_doctor_prints_devices_versions_and_implementations(cli):
    shown = cli("doctor")
    assert shown.code == 0
    for word in ("cpu", "jaxlib", "python", "attention", "ssd", "causal_conv", "because"):
        assert word in shown.out


def test_doctor_json(cli):
    report = json.loads(cli("doctor", "--json").out)
    assert report["devices"][0]["platform"] == "cpu"
    assert {"jax", "jaxllm", "python"} <= set(report["versions"])
    assert all(op["implementation"] and op["reason"] for op in report["ops"])

"""``jaxllm``: finds the subcommand before it imports anything, so that help and version answer at once."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives, its line in the help, and whether it moves more bytes than it holds."""

    module: str
    summary: str
    streams: bool = False


COMMANDS = {
    "quickstart": Command(
        "jaxllm.cli.quickstart", "train a small model on this Python's own library in 5 minutes"
    ),
    "train": Command("jaxllm.cli.train", "train from a YAML file: your data, any preset, resumable"),
    "launch": Command("jaxllm.cli.launch", "train with several processes that may die, hang and come back"),
    "generate": Command("jaxllm.cli.generate", "complete a prompt, token by token"),
    "eval": Command("jaxllm.cli.evaluate", "loss, bits per byte and baselines of a checkpoint"),
    "convert": Command("jaxllm.cli.convert", "Hugging Face folder to checkpoint and back", streams=True),
    "info": Command("jaxllm.cli.info", "pattern, parameters and memory of a preset or checkpoint"),
    "plan": Command(
        "jaxllm.cli.plan", "placement and balance of context parallelism for a batch, as a picture"
    ),
    "doctor": Command("jaxllm.cli.doctor", "devices, versions, and which implementation each op takes here"),
}

DESCRIPTION = "Hybrid Mamba-attention language models in JAX."
EPILOGUE = "Start with 'jaxllm quickstart'; 'jaxllm COMMAND --help' lists a command's options."


def _version() -> str:
    from jaxllm import __version__

    return __version__


def help_text(colour: bool = False) -> str:
    """What ``jaxllm --help`` prints; written by hand, for tyro alone takes as long as the whole budget."""
    bold, plain = ("\033[1m", "\033[0m") if colour else ("", "")
    width = max(map(len, COMMANDS))
    rows = [f"  {bold}{name:<{width}}{plain}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {bold}jaxllm{plain} COMMAND [options]",
            "",
            DESCRIPTION,
            "",
            f"{bold}commands{plain}",
            *rows,
            "",
            f"{bold}options{plain}",
            f"  {'-h, --help':<{width}}  show this help",
            f"  {'--version':<{width}}  show the version",
            "",
            EPILOGUE,
        ]
    )


def _unknown(argv: Sequence[str]) -> int:
    """Hands an unknown subcommand or flag to tyro, whose message it is."""
    import tyro

    stubs = {}
    for name, command in COMMANDS.items():

        def stub() -> None: ...

        stub.__doc__ = command.summary
        stubs[name] = stub
    tyro.extras.subcommand_cli_from_dict(stubs, prog="jaxllm", description=DESCRIPTION, args=list(argv))
    return 2


def _parse(name: str, module: Any, argv: Sequence[str]) -> Any:
    # A module whose arguments depend on a file of the user's (train's YAML) parses its own.
    if hasattr(module, "parse"):
        return module.parse(argv)
    import tyro

    return tyro.cli(
        module.Args, prog=f"jaxllm {name}", args=list(argv), config=(tyro.conf.FlagCreatePairsOff,)
    )


def _show_error(lines: list[str]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    body = Text("\n".join(lines))
    Console(stderr=True).print(
        Panel(body, title="jaxllm: this needs a change", title_align="left", border_style="red", expand=False)
    )


def dispatch(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name) and give its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"jaxllm {_version()}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        return _unknown(argv)
    from jaxllm.cli import environment
    from jaxllm.cli.errors import explain

    environment.prepare(streams=COMMANDS[name].streams)
    try:
        module = import_module(COMMANDS[name].module)
        return module.run(_parse(name, module, rest))
    except KeyboardInterrupt:
        _show_error(["Stopped by Ctrl-C."])
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (| head); the interpreter must not try to flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        lines = explain(error)
        if lines is None or os.environ.get("JAXLLM_TRACEBACK"):
            raise
        _show_error(lines)
        return 2


def main() -> None:
    """Entry point of the ``jaxllm`` script."""
    sys.exit(dispatch(sys.argv[1:]))


if __name__ == "__main__":
    main()

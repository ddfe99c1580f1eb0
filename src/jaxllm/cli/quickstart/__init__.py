"""``jaxllm quickstart``: from an empty folder to a trained, exported and measured model in a few minutes."""

from dataclasses import dataclass
from pathlib import Path

from jaxllm.cli.errors import UserError

# Real code that a model of the standard library has a chance to go on with.
PROMPT = 'class Queue:\n    """A simple queue."""\n\n    def __init__(self'


@dataclass(frozen=True)
class Args:
    """Train a small hybrid model on this Python's own standard library, and show what it has learned.

    Attributes:
        minutes: training time by the clock, compilation not included; 5, or that of the run which is resumed.
        out: run folder; the default is runs/quickstart, or the next free number.
        resume: go on with the run in --out (runs/quickstart) for what is left of its minutes.
        preset: train this preset's model instead of the quickstart's own.
        data: 'stdlib', a glob of .txt, .py or .md files, FILE.jsonl:COLUMN, FILE.parquet:COLUMN, or hf:NAME:SPLIT:COLUMN.
        prompt: what the trained model completes.
        tokens: length of the completion.
        temperature: of the completion; 0 takes the likeliest token.
        seed: of the weights, the data's order and the completion.
        set: other sizes, as NAME=VALUE; see jaxllm/cli/quickstart/settings.py.
    """

    minutes: float | None = None
    out: Path | None = None
    resume: bool = False
    preset: str | None = None
    data: str = "stdlib"
    prompt: str = PROMPT
    tokens: int = 128
    temperature: float = 0.7
    seed: int = 0
    set: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UserError for values out of range."""
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise UserError(
                "--minutes", self.minutes, "a number above 0", "5 is the default; 0.3 is a trial."
            )
        if self.tokens < 1:
            raise UserError("--tokens", self.tokens, "a whole number of at least 1")
        if self.temperature < 0:
            raise UserError("--temperature", self.temperature, "0 (greedy) or above")
        if not 0 <= self.seed < 2**31:
            raise UserError("--seed", self.seed, "a whole number from 0 to 2147483647")
        if not self.prompt:
            raise UserError("--prompt", self.prompt, "some text")


def run(args: Args) -> int:
    """Run all stages; the exit code is 0 even where a baseline wins, which the closing table says."""
    args.check()
    from jaxllm.cli.quickstart.session import Session

    return Session(args).run()

"""``jaxllm generate``: complete a prompt, token by token."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from jaxllm.cli.errors import UserError

if TYPE_CHECKING:
    from jaxllm.generation.results import GenerationResult, StreamEvent
    from jaxllm.model.functional import LanguageModel


@dataclass(frozen=True)
class Args:
    """Complete a prompt with a trained model; the text is shown as it comes.

    Attributes:
        folder: a Hugging Face folder, or a run folder of jaxllm.
        prompt: text to go on from; without it and --prompt-file, standard input is read.
        prompt_file: UTF-8 file that holds the prompt.
        max_new_tokens: most tokens to write.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_k: draw from the K likeliest tokens.
        top_p: draw from the smallest set of tokens whose probability reaches P.
        min_p: draw from tokens at least P times as likely as the likeliest.
        repetition_penalty: above 1 makes tokens of prompt and completion less likely.
        presence_penalty: taken from the logit of every token that the completion has.
        frequency_penalty: taken once for each time that the completion has the token.
        seed: the same seed gives the same text.
        stop: texts that end the completion; several may be given.
        ignore_eos: go on after the end token.
        json: print one JSON object instead of the text.
        report: print times and speeds after the text; compiles first, so that they are the model's own.
    """

    folder: Positional[Path]
    prompt: str | None = None
    prompt_file: Path | None = None
    max_new_tokens: int = 128
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    json: bool = False
    report: bool = False


def read_prompt(args: Args) -> str:
    """The prompt from wherever it was given.

    Raises:
        UserError: from two places or none, an empty one, or a file that is not text.
    """
    if args.prompt is not None and args.prompt_file is not None:
        raise UserError(
            "--prompt-file", str(args.prompt_file), "either --prompt or --prompt-file", "Leave one out."
        )
    if args.prompt is not None:
        source, text = "--prompt", args.prompt
    elif args.prompt_file is not None:
        source = "--prompt-file"
        try:
            text = args.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(source, str(args.prompt_file), f"a UTF-8 text file ({error.reason})") from None
    else:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError(
                "--prompt", None, "some text", "Or give --prompt-file FILE, or pipe text into the command."
            )
        source, text = "standard input", sys.stdin.read()
    if not text:
        raise UserError(source, text, "some text to go on from")
    return text


def _events(args: Args, model: "LanguageModel", prompt: str) -> "Iterator[StreamEvent]":
    from jaxllm.generation.api import generate

    return generate(
        model,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=args.seed,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
        stream=True,
    )


def _stream(events: "Iterator[StreamEvent]", prompt: str, quiet: bool) -> "GenerationResult":
    """Show the text as it comes: the prompt dim before it on a terminal, the completion alone in a pipe."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    result = None
    if console.is_terminal and not quiet:
        console.print(Text(prompt, style="dim"), end="")
    for event in events:
        result = event.result or result
        if quiet or not event.text:
            continue
        if console.is_terminal:
            console.print(Text(event.text, style="cyan"), end="")
        else:
            sys.stdout.write(event.text)
            sys.stdout.flush()
    if not quiet:
        print()
    assert result is not None
    return result


def _warm_up(args: Args, model: "LanguageModel", prompt: str) -> float:
    """Seconds of a first try, which compiles: the step that gives later tokens is compiled at the second one."""
    started = time.perf_counter()
    for count, _ in enumerate(_events(args, model, prompt)):
        if count == 1:
            break
    return time.perf_counter() - started


def _timings(result: "GenerationResult", loaded: float, compiled: float | None) -> dict[str, Any]:
    return {
        "load_seconds": loaded,
        "compile_seconds": compiled,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "finish_reason": result.finish_reason,
        "first_token_seconds": result.time_to_first_token,
        "tokens_per_second": result.decode_tokens_per_second,
    }


def _show_report(timings: dict[str, Any]) -> None:
    from rich.console import Console

    from jaxllm.cli.display import count, duration, number, table

    made = table("generation", "", right=(1,))
    made.add_row("loading the model", duration(timings["load_seconds"]))
    made.add_row("compiling, and two tokens to see it done", duration(timings["compile_seconds"]))
    made.add_row("prompt tokens", count(timings["prompt_tokens"]))
    made.add_row("new tokens", count(timings["new_tokens"]))
    made.add_row(
        "ended by", {"stop": "a stop token or text", "length": "--max-new-tokens"}[timings["finish_reason"]]
    )
    made.add_row("first token after", duration(timings["first_token_seconds"]))
    made.add_row("tokens per second after it", number(timings["tokens_per_second"], 1))
    # Beside the text, not in it: the text may go into a file.
    Console(stderr=True, highlight=False).print(made)


def run(args: Args) -> int:
    """Stream the completion, or print it as JSON."""
    prompt = read_prompt(args)
    from jaxllm.generation.folders import load

    started = time.perf_counter()
    model = load(args.folder)
    loaded = time.perf_counter() - started
    if model.tokenizer is None:
        raise UserError(
            "folder", str(args.folder), "a model with a tokenizer.json", "Copy it there from the original."
        )
    compiled = _warm_up(args, model, prompt) if args.report else None
    result = _stream(_events(args, model, prompt), prompt, quiet=args.json)
    timings = _timings(result, loaded, compiled)
    if args.json:
        settings = {key: value for key, value in asdict(args).items() if key not in ("json", "report")}
        settings |= {"folder": str(args.folder), "prompt": prompt, "prompt_file": None}
        report = {
            "text": result.text,
            "token_ids": result.token_ids,
            "timings": timings,
            "settings": settings,
        }
        print(json.dumps(report, indent=2, ensure_ascii=False))
    if args.report:
        _show_report(timings)
    return 0

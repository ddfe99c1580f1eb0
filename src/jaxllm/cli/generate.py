"""``jaxllm generate``: complete a prompt or answer a conversation, token by token."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from jaxllm.cli.cache_options import policy_of, settings_of
from jaxllm.cli.errors import UserError
from jaxllm.cli.overrides import parse_value

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
        chat: the prompt is what a user says; the model's chat template makes the text of it.
        messages: JSON file with a conversation, a list of {"role": ..., "content": ...}; implies --chat.
        enable_thinking: what the chat template is told of thinking.
        variable: further values for the chat template, NAME=VALUE each, such as reasoning_budget=200.
        thinking_budget: in a prompt that ends with the begin of thinking, close it after N tokens of it.
        thinking_grace: let closing wait up to N tokens for a line's end.
        thinking_close: text that closes thinking, with </think> in it.
        kv_dtype: dtype of keys and values: compute, float32, bfloat16, int8 or int4.
        page_size: tokens of a page of the cache.
        policy: what attention reads of the cache and which tokens stay: dense, quest, tactic, rkv, pillar,
            streamingllm, h2o or snapkv.
        policy_set: settings of the policy, NAME=VALUE each, such as budget=2048.
        json: print one JSON object instead of the text.
        report: print times, speeds, and what was held and read of the cache after the text; compiles first, so that
            times are the model's own.
        recall: with --report: also measure how much of the true attention lies on what the policy read; slower.
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
    chat: bool = False
    messages: Path | None = None
    enable_thinking: bool = True
    variable: tuple[str, ...] = ()
    thinking_budget: int | None = None
    thinking_grace: int = 0
    thinking_close: str | None = None
    kv_dtype: str = "compute"
    page_size: int | None = None
    policy: str | None = None
    policy_set: tuple[str, ...] = ()
    json: bool = False
    report: bool = False
    recall: bool = False


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


def read_messages(args: Args) -> list[Any] | None:
    """The conversation, or None where a plain prompt is asked for.

    Raises:
        UserError: as :func:`read_prompt`; a prompt beside the file, a file that is no JSON list, or options of a chat
            without one.
    """
    if args.messages is None and not args.chat:
        if args.variable or not args.enable_thinking:
            flag, given = ("--variable", args.variable) if args.variable else ("--no-enable-thinking", True)
            raise UserError(flag, given, "only with --chat or --messages: it goes to the chat template")
        return None
    if args.messages is None:
        return [{"role": "user", "content": read_prompt(args)}]
    if args.prompt is not None or args.prompt_file is not None:
        raise UserError("--messages", str(args.messages), "either --messages or a prompt", "Leave one out.")
    allowed = 'a JSON list of {"role": ..., "content": ...}'
    try:
        messages = json.loads(args.messages.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("--messages", str(args.messages), f"{allowed} ({error})") from None
    if not isinstance(messages, list):
        raise UserError("--messages", str(args.messages), allowed)
    return messages


def template_variables(args: Args) -> dict[str, Any]:
    """What the chat template is told."""
    known = {"enable_thinking": args.enable_thinking}
    for change in args.variable:
        name, equals, text = change.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(
                "--variable", change, "NAME=VALUE", "For example: --variable reasoning_budget=200"
            )
        known[name] = parse_value(text, "--variable", change)
    return known


def cache_arguments(args: Args) -> dict[str, Any]:
    """What ``generate`` is told of the cache.

    Raises:
        UserError: as :func:`policy_of`; ``--recall`` without a report.
        ConfigError: a dtype, page size or setting that there is not.
    """
    from jaxllm.cache.kv import KVCache
    from jaxllm.generation.kv_report import KVReport

    if args.recall and not args.report:
        raise UserError("--recall", True, "only with --report")
    return {
        "kv": KVCache(args.kv_dtype, args.page_size),
        "policy": policy_of(args.policy, args.policy_set),
        "kv_report": KVReport(args.recall) if args.report else None,
    }


def _events(
    args: Args, model: "LanguageModel", prompt: str | list[int], cache: dict[str, Any]
) -> "Iterator[StreamEvent]":
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
        thinking_budget=args.thinking_budget,
        thinking_grace=args.thinking_grace,
        thinking_close=args.thinking_close,
        stream=True,
        **cache,
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


def _warm_up(args: Args, model: "LanguageModel", prompt: str | list[int], cache: dict[str, Any]) -> float:
    """Seconds of a first try, which compiles: the step that gives later tokens is compiled at the second one."""
    started = time.perf_counter()
    for count, _ in enumerate(_events(args, model, prompt, cache)):
        if count == 1:
            break
    return time.perf_counter() - started


def _timings(result: "GenerationResult", loaded: float, compiled: float | None) -> dict[str, Any]:
    return {
        "load_seconds": loaded,
        "compile_seconds": compiled,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "thinking_tokens": result.thinking_tokens,
        "finish_reason": result.finish_reason,
        "first_token_seconds": result.time_to_first_token,
        "tokens_per_second": result.decode_tokens_per_second,
    }


def _show_report(timings: dict[str, Any], kv_report: Any) -> None:
    from rich.console import Console

    from jaxllm.cli.cache_display import cache_tables
    from jaxllm.cli.display import count, duration, number, table

    made = table("generation", "", right=(1,))
    made.add_row("loading the model", duration(timings["load_seconds"]))
    made.add_row("compiling, and two tokens to see it done", duration(timings["compile_seconds"]))
    made.add_row("prompt tokens", count(timings["prompt_tokens"]))
    made.add_row("new tokens", count(timings["new_tokens"]))
    if timings["thinking_tokens"] is not None:
        made.add_row("of these thinking", count(timings["thinking_tokens"]))
    made.add_row(
        "ended by", {"stop": "a stop token or text", "length": "--max-new-tokens"}[timings["finish_reason"]]
    )
    made.add_row("first token after", duration(timings["first_token_seconds"]))
    made.add_row("tokens per second after it", number(timings["tokens_per_second"], 1))
    # Beside the text, not in it: the text may go into a file.
    console = Console(stderr=True, highlight=False)
    for each in (made, *cache_tables(kv_report)):
        console.print(each)


def run(args: Args) -> int:
    """Stream the completion, or print it as JSON."""
    messages = read_messages(args)
    prompt = read_prompt(args) if messages is None else ""
    variables = template_variables(args)
    cache = cache_arguments(args)
    from jaxllm.generation.folders import load

    started = time.perf_counter()
    model = load(args.folder)
    loaded = time.perf_counter() - started
    if model.tokenizer is None:
        raise UserError(
            "folder", str(args.folder), "a model with a tokenizer.json", "Copy it there from the original."
        )
    ids: str | list[int] = prompt
    if messages is not None:
        prompt, ids = model.render_chat(messages, **variables), model.encode_chat(messages, **variables)
    compiled = _warm_up(args, model, ids, cache) if args.report else None
    result = _stream(_events(args, model, ids, cache), prompt, quiet=args.json)
    timings = _timings(result, loaded, compiled)
    if args.json:
        settings = {
            key: value for key, value in asdict(args).items() if key not in ("json", "report", "recall")
        }
        settings |= {"folder": str(args.folder), "prompt": prompt, "prompt_file": None, "messages": messages}
        settings["policy"] = settings_of(cache["policy"])
        del settings["policy_set"]
        report = {
            "text": result.text,
            "answer": result.answer,
            "token_ids": result.token_ids,
            "timings": timings,
            "settings": settings,
        }
        if args.report:
            report["cache"] = cache["kv_report"].to_dict()
        print(json.dumps(report, indent=2, ensure_ascii=False))
    if args.report:
        _show_report(timings, cache["kv_report"])
    return 0

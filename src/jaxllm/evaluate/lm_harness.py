"""jaxllm behind lm-evaluation-harness: ``lm_eval.simple_evaluate(model=JaxLM("folder"), tasks=[...])``.

Needs the extra ``lm-eval``; the rest of jaxllm never imports it. Scores equal those of the harness's Hugging Face back end
on the exported model, tokenisation included.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import ConfigError, positive, require
from jaxllm.evaluate.scoring import STEP_TOKENS, score_windows
from jaxllm.evaluate.text import prefix_token
from jaxllm.evaluate.windows import Window
from jaxllm.generation.api import generate
from jaxllm.generation.folders import load
from jaxllm.model.functional import LanguageModel

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        f"jaxllm.evaluate.lm_harness needs lm-evaluation-harness ({error}); pip install 'jaxllm[lm-eval]'"
    ) from error

MAX_LENGTH = 2048
MAX_NEW_TOKENS = 256
# What the harness and its tasks call the most new tokens, the first of them wins.
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def adds_begin_token(tokenizer: Any) -> bool:
    """Whether Hugging Face's tokenizer would put the begin token in front of a text by itself."""
    configured = tokenizer.config.get("add_bos_token")
    if configured is not None:
        return bool(configured)
    return tokenizer._parsing.encode("", add_special_tokens=True).ids[:1] == [tokenizer.bos_id]


@register_model("jaxllm")
class JaxLM(TemplateLM):
    """A :class:`LanguageModel` as the harness wants it."""

    def __init__(
        self,
        pretrained: LanguageModel | str | Path,
        *,
        max_length: int = MAX_LENGTH,
        max_gen_toks: int = MAX_NEW_TOKENS,
        add_bos_token: bool | None = None,
        batch_size: int | str = 8,
        step_tokens: int = STEP_TOKENS,
        **ignored: Any,
    ):
        """Wrap a model.

        Args:
            pretrained: a model with its tokenizer, or the folder of one.
            max_length: most tokens of a context; longer ones are cut from the left.
            max_gen_toks: most new tokens where a task does not say.
            add_bos_token: put the begin token in front of every text; None: as the tokenizer's own files say.
            batch_size: requests generated at once; "auto" is 8. Scoring packs ``step_tokens`` tokens instead.
            step_tokens: tokens of one scoring step.
            ignored: ``device`` and ``max_batch_size``, which the harness passes to every model.

        Raises:
            ConfigError: a size below 1, an unknown argument, or a model without a tokenizer.
        """
        super().__init__()
        for name in sorted(set(ignored) - {"device", "max_batch_size"}):
            raise ConfigError(
                f"{name}={ignored[name]!r}: unknown argument; allowed are pretrained, max_length, max_gen_toks, "
                "add_bos_token, batch_size, step_tokens"
            )
        self.lm = pretrained if isinstance(pretrained, LanguageModel) else load(pretrained)
        self._prefix = prefix_token(self.lm)
        self.tokenizer = self.lm.tokenizer
        self.max_length, self.max_gen_toks = int(max_length), int(max_gen_toks)
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self.step_tokens = int(step_tokens)
        positive(max_length=self.max_length, max_gen_toks=self.max_gen_toks, batch_size=self.batch_size)
        self.add_bos_token = adds_begin_token(self.tokenizer) if add_bos_token is None else add_bos_token
        self._name = str(pretrained) if isinstance(pretrained, str | Path) else "jaxllm"

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, or the begin token where there is no end."""
        return self._prefix if self.tokenizer.eos_id is None else self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that has no context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's request cache."""
        return f"{self._name.replace('/', '__')}-{self.tokenizer.fingerprint[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens spelt out in the text are read as such, as Hugging Face does."""
        begin = self.tokenizer.id_to_token(self._prefix)
        bos = self.add_bos_token if add_special_tokens is None else self.add_bos_token and add_special_tokens
        if add_special_tokens is None and begin is not None and string.startswith(begin):
            bos = False
        return self.tokenizer.encode(string, bos=bos, parse_special=True)

    def _window(self, context: Sequence[int], continuation: Sequence[int]) -> Window:
        require(
            1 <= len(continuation) <= self.max_length,
            "continuation",
            f"{len(continuation)} tokens",
            f"must have 1 to max_length={self.max_length} tokens; raise max_length",
        )
        ids = np.array([*context, *continuation][-(self.max_length + 1) :], np.int32)
        return Window(ids, len(ids) - len(continuation))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        scores = score_windows(self.lm, windows, step_tokens=self.step_tokens)
        answers = [(-float(score.nll.sum()), bool(score.greedy.all())) for score in scores]
        for (text, _, _), answer in zip(requests, answers):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts; every token once, in windows of ``max_length``."""
        windows: list[Window] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self._prefix,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in rolling:
                windows.append(self._window(*make_disjoint_window(pair)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, score in zip(owners, score_windows(self.lm, windows, step_tokens=self.step_tokens)):
            totals[index] -= float(score.nll.sum())
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, the end token or the most new tokens."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        answers = [""] * len(requests)
        for indices in groups.values():
            options = self._generation_options(requests[indices[0]].args[1])
            room = self.max_length - options["max_new_tokens"]
            require(
                room > 0,
                "max_gen_toks",
                options["max_new_tokens"],
                f"must be below max_length={self.max_length}: the context needs room too",
            )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self._prefix] for i in indices]
            for index, result in zip(
                indices, generate(self.lm, prompts, max_batch=self.batch_size, **options)
            ):
                answers[index] = result.text or ""
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def _generation_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The harness's generation arguments as those of :func:`jaxllm.generate`."""
        known = {"until", "do_sample", *_LENGTH_NAMES, *_SAMPLING_NAMES}
        unknown = sorted(set(given) - known)
        require(not unknown, "generation_kwargs", unknown[:1], f"allowed are {', '.join(sorted(known))}")
        until = given.get("until") or []
        length = next(
            (given[name] for name in _LENGTH_NAMES if given.get(name) is not None), self.max_gen_toks
        )
        options = {name: given[name] for name in _SAMPLING_NAMES if given.get(name) is not None}
        if given.get("do_sample") is False:
            options["temperature"] = 0.0
        elif given.get("do_sample") and "temperature" not in options:
            options["temperature"] = 1.0
        stop = [until] if isinstance(until, str) else list(until)
        return options | {"max_new_tokens": int(length), "stop": [text for text in stop if text]}

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text, by the checkpoint's own template.

        Raises:
            ConfigError: the checkpoint has none, or it refuses the conversation.
        """
        return self.lm.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

"""A prompt completed before the reader's eyes, and how fast that went."""

from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from jaxllm.model.functional import LanguageModel


@dataclass(frozen=True)
class Completion:
    """A completion and its speed.

    Attributes:
        text: what the model wrote.
        tokens: how many tokens that is.
        first_token_seconds: from the call to the first token, all programs compiled.
        tokens_per_second: after the first token; None for one token.
    """

    text: str
    tokens: int
    first_token_seconds: float
    tokens_per_second: float | None


def complete(
    console: Console, model: LanguageModel, prompt: str, *, tokens: int, temperature: float, seed: int
) -> Completion:
    """Stream a completion onto the console.

    Args:
        console: where to.
        model: with its tokenizer.
        prompt: text to go on from.
        tokens: most new tokens.
        temperature: 0 takes the likeliest token.
        seed: of the draws.
    """
    from jaxllm.generation.api import generate

    # A first run of the same shapes compiles; its time would say nothing of the model's speed. Steps of a stream are
    # compiled at the second token.
    generate_options = {"temperature": temperature, "seed": seed, "max_new_tokens": tokens}
    for event in generate(model, prompt, stream=True, ignore_eos=True, **generate_options):
        if event.result is not None:
            break
    console.print(Text(prompt, style="dim"), end="")
    result = None
    for event in generate(model, prompt, stream=True, **generate_options):
        console.print(Text(event.text, style="cyan"), end="")
        result = event.result or result
    console.print()
    assert result is not None
    return Completion(
        text=result.text or "",
        tokens=len(result.token_ids),
        first_token_seconds=result.time_to_first_token,
        tokens_per_second=result.decode_tokens_per_second,
    )

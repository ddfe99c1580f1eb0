"""``thinking_budget`` of ``jaxllm.generate``: markers as text, and thinking told apart from the answer."""

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

import jaxllm
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.generation.budget import ThinkingMarkers
from jaxllm.model.functional import LanguageModel
from tests.generation.conftest import hybrid, parameters

DRAWN = dict(max_new_tokens=16, temperature=1.0, seed=5, ignore_eos=True)
TEXT = "Reached the limit. <think> so </think>\n\nline\nline"


def spelling(special: bool | None) -> Tokenizer:
    """A tokenizer that knows the markers as special or ordinary tokens, or only as pieces."""
    trained = Tokenizer.train([TEXT], 290)
    backend = Backend.from_str(trained._json)
    if special is not None:
        backend.add_tokens(
            [AddedToken(m, special=special, normalized=False) for m in ("<think>", "</think>")]
        )
    return Tokenizer(backend, bos_id=1, eos_id=2)


@pytest.fixture(scope="module")
def thinker() -> LanguageModel:
    tokenizer = spelling(False)
    cfg = hybrid("M*").replace(vocab_size=tokenizer.vocab_size)
    return LanguageModel(cfg, parameters(cfg), tokenizer)


@pytest.fixture(scope="module")
def prompts(thinker):
    return [
        thinker.tokenizer.encode(text, parse_special=True) for text in ("a <think>\n", "plain", "<think>")
    ]


def test_thinking_is_closed_and_told_apart(thinker, prompts):
    free = jaxllm.generate(thinker, prompts, **DRAWN)
    assert [r.thinking_tokens for r in free] == [None] * 3 and all(r.answer == r.text for r in free)
    close = "\nReached the limit.</think>\n\n"
    told = jaxllm.generate(thinker, prompts, thinking_budget=3, thinking_close=close, **DRAWN)
    # The second prompt opens no thinking.
    assert told[1].token_ids == free[1].token_ids and told[1].thinking_tokens is None
    assert told[1].answer == told[1].text
    encode = thinker.tokenizer.encode
    forced = encode("\nReached the limit.") + encode("</think>", parse_special=True) + encode("\n\n")
    for result, unbound in zip(told[::2], free[::2]):
        assert result.token_ids[:3] == unbound.token_ids[:3]
        assert result.token_ids[3 : 3 + len(forced)] == forced
        assert result.thinking_tokens == 3 + forced.index(encode("</think>", parse_special=True)[0]) + 1
        thought, answer = result.text.split("</think>")
        assert thought.endswith("\nReached the limit.") and answer == result.answer


def test_a_newline_closes_within_the_grace(thinker, prompts):
    tokenizer = thinker.tokenizer
    assert {tokenizer.decode([i]).count("\n") > 0 for i in tokenizer.newline_ids} == {True}
    others = set(range(tokenizer.vocab_size)) - tokenizer.newline_ids
    assert not any("\n" in tokenizer.decode([i]) for i in others)
    (free,) = jaxllm.generate(thinker, prompts[0], **DRAWN)
    newline = free.token_ids[6]
    # The one token is made a newline by telling so.
    thinker.tokenizer.newline_ids = frozenset({newline})
    try:
        (told,) = jaxllm.generate(thinker, prompts[0], thinking_budget=2, thinking_grace=9, **DRAWN)
    finally:
        del thinker.tokenizer.newline_ids
    at = next(n for n in range(1, 16) if n >= 2 and free.token_ids[n - 1] == newline)
    assert told.token_ids[: at + 1] == [
        *free.token_ids[:at],
        *tokenizer.encode("</think>", parse_special=True),
    ]
    assert told.thinking_tokens == at + 1


def test_an_unlimited_budget_only_counts(thinker, prompts):
    (free,) = jaxllm.generate(thinker, prompts[0], **DRAWN)
    (told,) = jaxllm.generate(thinker, prompts[0], thinking_budget=-1, **DRAWN)
    assert told.token_ids == free.token_ids and told.text == free.text
    assert (told.thinking_tokens, told.answer) == (16, "")


def test_markers_may_be_token_ids(thinker):
    model = LanguageModel(thinker.cfg, thinker.params)
    how = dict(thinking_budget=2, thinking_markers=([7, 8], [9]), thinking_close=[10, 9], **DRAWN)
    opened, other = jaxllm.generate(model, [[3, 7, 8], [3, 8, 7]], **how)
    assert opened.token_ids[2:4] == [10, 9] and opened.thinking_tokens == 4
    assert (opened.text, opened.answer, other.thinking_tokens) == (None, None, None)


@pytest.mark.parametrize("special", [True, False, None], ids=["special", "added", "pieces"])
@pytest.mark.parametrize(
    ("text", "opens"),
    [
        ("Question <think>\n", True),
        ("Question\n<think>", True),
        ("Question <think></think>", False),
        ("<think> I", False),
        ("think>", False),
    ],
)
def test_what_opens_thinking_is_seen_however_it_is_spelt(special, text, opens):
    tokenizer = spelling(special)
    markers = ThinkingMarkers.resolve(tokenizer, ("<think>", "</think>"), None)
    assert (len(markers.end) == 1) == (special is not None) and markers.close == markers.end
    assert markers.opens(tokenizer, tokenizer.encode(text, parse_special=True)) is opens


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(thinking_grace=3), "thinking_grace"),
        (dict(thinking_close="</think>"), "thinking_close"),
        (dict(thinking_budget=3, thinking_grace=-1), "thinking_grace"),
        (dict(thinking_budget=3, thinking_close="Enough."), "thinking_close"),
        (dict(thinking_budget=3, thinking_close=[1]), "thinking.close"),
        (dict(thinking_budget=3, thinking_close=[10**6]), "thinking_close"),
        (dict(thinking_budget=3, thinking_markers=("", "x")), "thinking_markers"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_arguments_are_named_before_anything_runs(thinker, prompts, options, named, stream):
    with pytest.raises(ValueError, match=f"^{named}="):
        jaxllm.generate(thinker, prompts[0], stream=stream, **options)


def test_text_markers_need_a_tokenizer(thinker):
    with pytest.raises(ValueError, match=r"^thinking_markers='<think>': text needs"):
        jaxllm.generate(LanguageModel(thinker.cfg, thinker.params), [1], thinking_budget=3)

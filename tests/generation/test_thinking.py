"""Reasoning budgets: the machine against the published rule in plain Python, and what it leaves untouched."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.batch import PackedBatch
from jaxllm.cache.kv import KVCache
from jaxllm.generation import steps
from jaxllm.generation.budget import CLOSING, FREE, THINKING, ThinkingBudget
from jaxllm.generation.engine import Engine
from jaxllm.generation.engine_config import EngineConfig
from jaxllm.generation.request import SamplingParams
from jaxllm.generation.sampling import Features, advance, init_sampling, sample
from jaxllm.generation.thinking import newline_table, thinking_rows
from jaxllm.model.functional import LanguageModel, merge
from tests.generation.conftest import hybrid, parameters

VOCAB, ROWS, STEPS, WIDTH = 12, 5, 24, 4
NEWLINES = frozenset({3, 7})
DRAWN = dict(temperature=1.0, top_k=30, top_p=0.95, min_p=0.01)


@dataclass
class Rule:
    """Nemotron 3's rule as published, one token at a time."""

    budget: ThinkingBudget | None
    prompt: list[int]

    def __post_init__(self):
        self.phase, self.place = "answer", 0
        if self.budget is not None:
            self.phase = "think"
            self.thought = self.prompt[len(self.prompt) - self.budget.spent :]
            self._look()

    def _look(self):
        n, budget = len(self.thought), self.budget
        if self.thought[-len(budget.end) :] == list(budget.end):
            self.phase = "answer"
        elif budget.tokens < 0:
            pass
        elif n >= budget.tokens + budget.grace or (
            n >= budget.tokens and self.thought and self.thought[-1] in NEWLINES
        ):
            self.phase = "close"

    def next(self, drawn: int) -> int:
        """The next token, where the model draws ``drawn``."""
        if self.phase == "close":
            token = self.budget.close[self.place]
            self.place += 1
            if self.place == len(self.budget.close):
                self.phase = "answer"
            return token
        if self.phase == "think":
            self.thought.append(drawn)
            self._look()
        return drawn


tokens = st.integers(0, VOCAB - 1)
shapes = st.tuples(
    st.integers(-2, 14),
    st.sampled_from([0, 0, 1, 3, 8, 2**31 - 1]),
    st.lists(tokens, min_size=1, max_size=2),
    st.lists(tokens, max_size=1),
    st.lists(tokens, max_size=1),
    st.integers(0, 6),
)
rows = st.lists(st.none() | shapes, min_size=ROWS, max_size=ROWS)


def budget_of(shape):
    if shape is None:
        return None
    tokens, grace, end, before, after, spent = shape
    return ThinkingBudget(tokens, (*before, *end, *after), tuple(end), grace, spent)


@functools.partial(jax.jit, static_argnames="features")
def play(state, script, features):
    """Tokens of slots for which the model, whatever it has read, likes ``script[t]`` best at step t."""

    def step(state, drawn):
        logits = 50.0 * jax.nn.one_hot(drawn, VOCAB)
        out = sample(logits, state, state.position, features)
        return advance(state, out.tokens, jnp.ones(ROWS, bool), features), out.tokens

    return jax.lax.scan(step, state, script)[1]


def slots(asked, prompts, features):
    many = jnp.full(ROWS, 0.7 if features.random else 0.0)
    state = init_sampling(
        ROWS,
        counted_vocab=VOCAB,
        thinking_width=WIDTH,
        newline=newline_table(NEWLINES, VOCAB),
    )
    thinking = thinking_rows(asked, prompts, NEWLINES, ROWS, WIDTH)
    state = replace(state, temperature=many, top_k=jnp.full(ROWS, 3), remaining=jnp.full(ROWS, STEPS))
    return replace(state, thinking=jax.tree.map(jnp.asarray, thinking))


@pytest.mark.parametrize(
    "features",
    [
        Features(thinking=True),
        Features(thinking=True, random=True, filters=True, penalties=True, min_tokens=True),
    ],
    ids=["greedy", "everything"],
)
@settings(max_examples=60)
@given(shapes=rows, seed=st.integers(0, 2**31), busy=st.sampled_from([3, VOCAB]))
def test_the_machine_follows_the_rule(features, shapes, seed, busy):
    """Few different tokens make ends and newlines frequent, many make them rare; every row is its own request."""
    asked = [budget_of(shape) for shape in shapes]
    rng = np.random.default_rng(seed)
    script = np.where(rng.random((STEPS, ROWS)) < 0.5, 8, rng.integers(0, busy, (STEPS, ROWS)))
    prompts = [rng.integers(0, busy, 6).tolist() for _ in asked]
    got = np.asarray(play(slots(asked, prompts, features), jnp.asarray(script, jnp.int32), features))
    for row, (budget, prompt) in enumerate(zip(asked, prompts)):
        rule = Rule(budget, prompt)
        expected, thinking = [], 0
        for drawn in script[:, row]:
            thinking += rule.phase != "answer"
            expected.append(rule.next(int(drawn)))
        assert got[:, row].tolist() == expected, (budget, prompt)
        if budget is not None and budget.tokens >= 0:
            most = max(budget.tokens + budget.grace - budget.spent, 0)
            assert thinking <= most + len(budget.close)


@pytest.mark.parametrize(("end", "close"), [((5,), (5,)), ((4, 5), (9, 4, 5))])
def test_an_end_on_the_last_allowed_token_is_not_forced_again(end, close):
    features = Features(thinking=True)
    # The model ends by itself on its fourth token, which is also where the budget closes.
    asked = [ThinkingBudget(4, close, end, 0)] * ROWS
    thought = [8] * (4 - len(end)) + list(end)
    script = np.full((STEPS, ROWS), 8)
    script[: len(thought)] = np.asarray(thought)[:, None]
    got = play(slots(asked, [[1, 2]] * ROWS, features), jnp.asarray(script, jnp.int32), features)
    assert np.array_equal(got, script)
    script[len(thought) - 1] = 8
    got = np.asarray(play(slots(asked, [[1, 2]] * ROWS, features), jnp.asarray(script, jnp.int32), features))
    assert (got[4 : 4 + len(close)] == np.asarray(close)[:, None]).all()


def test_a_bound_that_is_reached():
    """No newline and no end: exactly budget + grace tokens, then the closing ids, then the model again."""
    asked = [ThinkingBudget(5, (9, 10), (10,), grace=3), None, *[ThinkingBudget(-1, (9,), (9,))] * 3]
    features = Features(thinking=True)
    got = np.asarray(
        play(slots(asked, [[1]] * ROWS, features), jnp.full((STEPS, ROWS), 8, jnp.int32), features)
    )
    assert got[:, 0].tolist() == [8] * 8 + [9, 10] + [8] * 14
    assert (got[:, 1:] == 8).all()


@pytest.mark.parametrize(
    ("tokens", "grace", "spent", "prompt", "phase"),
    [
        (0, 4, 0, [1, 3], THINKING),  # a newline of what opened thinking is none
        (2, 4, 2, [1, 8, 3], CLOSING),
        (2, 4, 2, [1, 3, 8], THINKING),
        (3, 4, 2, [1, 8, 3], THINKING),
        (2, 4, 6, [8] * 6, CLOSING),
        (2, 4, 6, [8] * 5 + [10], FREE),
        (-1, 0, 6, [8] * 6, FREE),
    ],
)
def test_thinking_in_the_prompt_counts(tokens, grace, spent, prompt, phase):
    budget = ThinkingBudget(tokens, (9, 10), (10,), grace, spent)
    assert budget.phase(prompt, NEWLINES) == phase
    rule = Rule(budget, prompt)
    first = 9 if phase == CLOSING else 8
    assert rule.next(8) == first


def test_stop_ids_stay_barred_until_closing_and_after():
    features = Features(thinking=True, min_tokens=True)
    asked = [ThinkingBudget(2, (9, 10), (10,))] * ROWS
    stops, barred = jnp.full((ROWS, 1), 8), jnp.full(ROWS, 5)
    state = replace(slots(asked, [[1]] * ROWS, features), stop_ids=stops, barred=barred)
    got = np.asarray(play(state, jnp.full((STEPS, ROWS), 8, jnp.int32), features))
    assert got[:7, 0].tolist() == [0, 0, 9, 10, 0, 8, 8]


def test_without_budgets_the_state_has_nothing_of_them():
    assert init_sampling(2).thinking is None and init_sampling(2).newline is None
    assert not SamplingParams(thinking=ThinkingBudget(-1, (9,), (9,))).features.thinking
    assert SamplingParams(thinking=ThinkingBudget(0, (9,), (9,))).features.thinking


ROOM = dict(slots=8, capacity=32, kv=KVCache(), chunk=32)


@pytest.fixture(scope="module")
def small():
    cfg = hybrid("M*")
    return LanguageModel(cfg, parameters(cfg))


@pytest.fixture(scope="module")
def engine(small):
    config = EngineConfig(**ROOM, thinking_width=4, newline_ids=frozenset(range(0, 61, 7)))
    return Engine(small.cfg, small.params, config)


@pytest.fixture(scope="module")
def plain(small):
    return Engine(small.cfg, small.params, EngineConfig(**ROOM))


def answers(engine, prompts, params, k=8):
    """(tokens, finish reason) of every request; as many copies beside them as fill the slots, so that one program
    serves every test."""
    asked = list(zip(prompts, params))
    numbers = [engine.add(*each) for each in (asked * 8)[:8]]
    told = {number: [] for number in numbers}
    while engine.busy:
        for event in engine.step(k):
            told[event.request].append(event)
    found = [([event.token for event in told[n]], told[n][-1].finish_reason) for n in numbers]
    assert all(copy == found[i % len(asked)] for i, copy in enumerate(found))
    return found[: len(asked)]


def answer(engine, prompt, params):
    return answers(engine, [prompt], [params])[0]


def prompts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 61, n).tolist() for n in lengths]


(PROMPT,) = prompts_of(5)
CLOSE = (50, 51, 52)
MIXED = [
    ThinkingBudget(5, CLOSE, (51, 52), grace=4),
    None,
    ThinkingBudget(0, CLOSE, (51, 52)),
    ThinkingBudget(3, (58,), (58,), grace=2, spent=2),
    ThinkingBudget(-1, (58,), (58,)),
    ThinkingBudget(9, (1, 2, 3, 4), (3, 4), grace=2**40),
    ThinkingBudget(1, CLOSE, CLOSE, grace=6),
    None,
]


@pytest.mark.parametrize("how", [{}, DRAWN], ids=["greedy", "drawn"])
def test_budgets_are_kept_in_a_mixed_batch_whatever_the_steps_per_call(engine, plain, how):
    """Up to the first forced token every answer is the free one; rows without a budget are theirs to the end."""
    asked = prompts_of(5, 13, 3, 6, 2, 4, 9, 11)
    params = [
        SamplingParams(max_new_tokens=16, seed=seed, thinking=budget, **how)
        for seed, budget in enumerate(MIXED)
    ]
    told = answers(engine, asked, params, 8)
    assert answers(engine, asked, params, 1) == told
    free = answers(plain, asked, [replace(p, thinking=None) for p in params], 8)
    newlines = engine.config.newline_ids
    for budget, (tokens, _), (unbound, _) in zip(MIXED, told, free):
        assert len(tokens) == 16
        if budget is None or not budget.limited:
            assert tokens == unbound
            continue
        begin = next(
            n
            for n in range(17)
            if n + budget.spent >= budget.tokens + budget.grace
            or (n and n + budget.spent >= budget.tokens and unbound[n - 1] in newlines)
            or n == 16
        )
        assert tokens[:begin] == unbound[:begin]
        assert tokens[begin : begin + len(budget.close)] == list(budget.close[: 16 - begin])


def test_a_second_round_compiles_nothing(engine):
    def run(seed, lengths, budgets):
        params = [
            SamplingParams(max_new_tokens=16, seed=i, thinking=b, **DRAWN) for i, b in enumerate(budgets)
        ]
        answers(engine, prompts_of(*lengths, seed=seed), params)

    run(1, (5, 13, 3, 6, 2, 4, 9, 11), MIXED)
    before = steps.compiled_programs()
    run(2, (6, 12, 2, 7, 3, 5, 13, 1), MIXED[::-1])
    assert steps.compiled_programs() == before
    run(3, (4,), [None])
    without = steps.compiled_programs()
    assert without > before, "rows without a budget have programs that know of none"
    run(4, (5,), [None])
    assert steps.compiled_programs() == without


def test_a_natural_end_is_untouched(engine, plain):
    free, _ = answer(plain, PROMPT, SamplingParams(max_new_tokens=16, seed=3, **DRAWN))
    end = tuple(free[3:5])
    for tokens in (5, 9):
        budget = ThinkingBudget(tokens, (50, *end), end, grace=3)
        told, _ = answer(engine, PROMPT, SamplingParams(max_new_tokens=16, seed=3, thinking=budget, **DRAWN))
        assert told == free


def test_an_answer_that_is_taken_up_again_closes_where_it_would_have(engine):
    whole = ThinkingBudget(6, CLOSE, (51, 52), grace=6)
    params = SamplingParams(max_new_tokens=16, seed=3, **DRAWN, thinking=whole)
    told, _ = answer(engine, PROMPT, params)
    assert 50 in told[6:13]
    for cut in (1, 5):
        again = replace(params, max_new_tokens=16 - cut, thinking=replace(whole, spent=cut))
        rest, _ = answer(engine, PROMPT + told[:cut], again)
        assert told[:cut] + rest == told


def test_what_ends_an_answer_ends_it_while_closing(engine):
    params = SamplingParams(max_new_tokens=4, thinking=ThinkingBudget(2, CLOSE, (51, 52)), **DRAWN)
    told, reason = answer(engine, PROMPT, params)
    assert told[2:] == [50, 51] and reason == "length"
    told, reason = answer(engine, PROMPT, replace(params, max_new_tokens=16, stop_token_ids=(51,)))
    assert told[2:] == [50, 51] and reason == "stop"


@pytest.fixture(scope="module")
def penalised(small):
    """Forced tokens of a request with penalties and log-probabilities: its events."""
    engine = Engine(small.cfg, small.params, EngineConfig(**ROOM, penalties=True, thinking_width=4))
    strong = dict(repetition_penalty=1e6, presence_penalty=2.0, frequency_penalty=2.0)
    budget = ThinkingBudget(0, (50, 50, 51), (51,))
    engine.add([1, 2, 3], SamplingParams(max_new_tokens=12, thinking=budget, logprobs=2, **strong))
    events = []
    while engine.busy:
        events += engine.step(8)
    return events


def test_forced_tokens_count_for_penalties(penalised):
    told = [event.token for event in penalised]
    assert told[:3] == [50, 50, 51] and not {50, 51} & set(told[3:])


def test_forced_tokens_have_the_models_own_log_probability(small, penalised):
    told = [event.token for event in penalised]
    ids = np.asarray([[1, 2, 3, *told[:-1]]], np.int32)
    logits = jax.jit(lambda p: merge(small.cfg, p)(PackedBatch.from_rows(ids)))(small.params)[0, 2:]
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    np.testing.assert_allclose([e.logprob for e in penalised], expected[np.arange(12), told], atol=1e-4)
    assert [e.top_logprobs[0][0] for e in penalised[:3]] == np.argmax(expected[:3], axis=-1).tolist()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (dict(tokens=True), "thinking.tokens"),
        (dict(grace=-1), "thinking.grace"),
        (dict(spent=-1), "thinking.spent"),
        (dict(end=()), "thinking.end"),
        (dict(close=(1, -2)), "thinking.close"),
        (dict(close=(4,)), "thinking.close"),
    ],
)
def test_wrong_budgets_are_named(values, named):
    with pytest.raises(ValueError, match=f"^{named}="):
        ThinkingBudget(**dict(tokens=3, close=(4, 5), end=(5,)) | values)


def test_what_cannot_be_served_is_refused(engine, plain):
    budget = ThinkingBudget(3, (4, 5), (5,))
    with pytest.raises(ValueError, match=r"^thinking="):
        SamplingParams(thinking=budget, stop_token_ids=(4,), min_new_tokens=2)
    for wrong, named in [
        (replace(budget, spent=4), "thinking.spent"),
        (replace(budget, close=(61, 5)), "thinking.close"),
        (replace(budget, close=(1, 2, 3, 4, 5)), "thinking.close"),
    ]:
        with pytest.raises(ValueError, match=f"^{named}="):
            engine.add([1, 2, 3], SamplingParams(max_new_tokens=2, thinking=wrong))
    with pytest.raises(ValueError, match="thinking_width=0"):
        plain.add([1], SamplingParams(max_new_tokens=2, thinking=budget))
    assert not engine.busy and not plain.busy

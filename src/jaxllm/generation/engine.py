"""The engine core: slots, the host state of requests, and one ``step()`` that prefills or decodes.

It owns no time, file or socket. Offline generation and the server are clients of it.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.cache.kv import KVCache
from jaxllm.cache.policies.base import Policy
from jaxllm.cache.state import init_cache
from jaxllm.config import ModelConfig, positive, require
from jaxllm.generation.buckets import power_of_two
from jaxllm.generation.request import Event, Running, SamplingParams, union
from jaxllm.generation.sampling import Features, SamplingState, init_sampling
from jaxllm.generation.steps import StepOutput, admit, decode_step, prefill
from jaxllm.generation.thinking import newline_table, thinking_rows
from jaxllm.generation.weights import operands
from jaxllm.model.functional import Params

LEAST_LENGTH = 16
LEAST_BOUND = 64


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine's pools; one set of compiled steps per value.

    Attributes:
        slots: requests decoded at once.
        capacity: most positions of a request, prompt and output.
        kv: how keys and values are kept.
        policy: what attention reads of them, and which stay.
        stored: most tokens that a slot stores in every cache group; None: its capacity.
        chunk: longest piece of a prompt that one call reads.
        stop_width: most stop ids of a request.
        penalties: requests may use penalties (costs slots * vocabulary counts).
        vocab_limit: ids of the tokenizer, where the model has more; the others are never sampled. None: all are.
        thinking_width: longest closing or ending sequence of a thinking budget; 0: requests may have none.
        taps: what layers report of every decode step, for :attr:`Engine.reports`.
        newline_ids: ids whose text has a newline, at which a thinking budget may close; only with budgets.
    """

    slots: int
    capacity: int
    kv: KVCache
    chunk: int = 512
    stop_width: int = 4
    penalties: bool = False
    vocab_limit: int | None = None
    thinking_width: int = 0
    newline_ids: frozenset[int] = frozenset()
    policy: Policy = field(default_factory=Policy)
    stored: tuple[int, ...] | None = None
    taps: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        positive(slots=self.slots, capacity=self.capacity, chunk=self.chunk, stop_width=self.stop_width)
        require(
            self.vocab_limit is None or self.vocab_limit >= 1,
            "vocab_limit",
            self.vocab_limit,
            "must be None or at least 1",
        )
        require(self.thinking_width >= 0, "thinking_width", self.thinking_width, "must be at least 0")


class Engine:
    """Continuous batching over slot pools.

    A request waits until a slot is free, is prefilled in chunks, decodes in its slot, and leaves it. Slots are taken
    lowest first, so that decoding touches as few rows as possible.
    """

    def __init__(self, cfg: ModelConfig, params: Params, config: EngineConfig):
        self.cfg = cfg
        self.params = params
        self.config = config
        self._cache = init_cache(
            cfg, config.slots, config.capacity, config.kv, config.policy, stored=config.stored
        )
        counted = cfg.vocab_size if config.penalties else None
        self._sampling = init_sampling(
            config.slots,
            stop_width=config.stop_width,
            counted_vocab=counted,
            thinking_width=config.thinking_width,
            newline=newline_table(config.newline_ids, cfg.vocab_size) if config.thinking_width else None,
        )
        self._free = list(range(config.slots))
        self._waiting: deque[Running] = deque()
        self._reading: list[Running] = []
        self._live: dict[int, Running] = {}
        self._next = 0
        # The last call was a prefill: live requests have their turn next.
        self._prefilled = False

    @property
    def params(self) -> Params:
        """Pure parameters, as the steps take them; None while the engine is idle in the pool."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self._params = None if params is None else operands(self.cfg, params)

    def add(self, prompt: list[int], params: SamplingParams) -> int:
        """Queue a request.

        Args:
            prompt: token ids, at least one.
            params: how its tokens are chosen.

        Returns:
            the number that its events carry.

        Raises:
            ConfigError: the prompt is empty, holds an id outside the vocabulary, or does not fit the engine.
        """
        vocab = self.cfg.vocab_size
        require(len(prompt) > 0, "prompt", prompt, "must have at least one token")
        outside = [token for token in prompt if not 0 <= token < vocab]
        require(not outside, "prompt", outside[:1], f"token ids must be from 0 to {vocab - 1}")
        need = len(prompt) + params.max_new_tokens
        require(
            need <= self.config.capacity,
            "prompt",
            f"{len(prompt)} tokens with max_new_tokens={params.max_new_tokens}",
            f"together they must fit the capacity of {self.config.capacity} positions",
        )
        width = self.config.stop_width
        require(
            len(params.stop_token_ids) <= width,
            "stop_token_ids",
            params.stop_token_ids,
            f"at most {width} in this engine",
        )
        features = params.features
        require(
            self.config.penalties or not features.penalties,
            "penalties",
            False,
            "the engine was built without penalties, and this request uses one",
        )
        sampled = min(vocab, self.config.vocab_limit or vocab)
        require(
            (features.logprobs or 0) <= sampled,
            "logprobs",
            features.logprobs,
            f"at most the vocabulary of {sampled}",
        )
        if params.thinking is not None:
            params.thinking.check_fits(len(prompt), sampled, self.config.thinking_width)
        request = Running(self._next, list(prompt), params)
        self._next += 1
        self._waiting.append(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Drop a request; its slot is free at once. Unknown or finished numbers are ignored."""
        for group in (self._waiting, self._reading):
            for request in [r for r in group if r.number == number]:
                group.remove(request)
                self._release(request)
        for request in [r for r in self._live.values() if r.number == number]:
            # The device still thinks that the slot lives: without this it would go on writing to it.
            live = self._sampling.live.at[request.slot].set(False)
            self._sampling = replace(self._sampling, live=live)
            del self._live[request.slot]
            self._release(request)

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._waiting or self._reading or self._live)

    def step(self, k: int = 1, steps: int | None = None) -> list[Event]:
        """One device call: a prefill, or up to ``k`` decode steps; they take turns while both have work.

        Args:
            k: buffer of decode steps per call; one compiled program per value.
            steps: decode steps to take, at most k; None: k.

        Returns:
            the sampled tokens; of one request, in their order.
        """
        readable = bool(self._reading or (self._waiting and self._free))
        if readable and not (self._live and self._prefilled):
            self._prefilled = True
            return self._prefill()
        self._prefilled = False
        return self._decode(k, steps) if self._live else []

    def _admit(self) -> None:
        new = []
        while self._waiting and self._free:
            request = self._waiting.popleft()
            request.slot = heapq.heappop(self._free)
            new.append(request)
        if not new:
            return
        rows = power_of_two(len(new))
        slots = np.full(rows, -1, np.int32)
        slots[: len(new)] = [request.slot for request in new]
        parameters = _sampling_rows(self.cfg, self.config, new, rows)
        self._cache, self._sampling = admit(self._cache, self._sampling, slots, parameters)
        self._reading += new

    def _prefill(self) -> list[Event]:
        self._admit()
        chunk = min(self.config.chunk, self.config.capacity)
        # As many rows as fill about four chunks, so that scores and activations stay bounded.
        longest = power_of_two(min(max(len(r.prompt) - r.read for r in self._reading), chunk), LEAST_LENGTH)
        group = self._reading[: max(1, 4 * chunk // longest)]
        pieces = [request.prompt[request.read : request.read + chunk] for request in group]
        rows, length = power_of_two(len(group)), power_of_two(max(map(len, pieces)), LEAST_LENGTH)
        tokens, lengths = np.zeros((rows, length), np.int32), np.zeros((rows, 1), np.int32)
        offset, final = np.zeros((rows, 1), np.int32), np.zeros(rows, bool)
        slots = np.full((rows, 1), -1, np.int32)
        for row, (request, piece) in enumerate(zip(group, pieces)):
            tokens[row, : len(piece)] = piece
            lengths[row], offset[row], slots[row] = len(piece), request.read, request.slot
            request.read += len(piece)
            final[row] = request.read == len(request.prompt)
        index = np.arange(length, dtype=np.int32)[None]
        batch = PackedBatch(
            tokens=tokens,
            segment_ids=(index < lengths).astype(np.int32),
            positions=index + offset,
            slots=slots,
        )
        out, self._cache, self._sampling = prefill(
            self.params,
            batch,
            self._cache,
            self._sampling,
            final,
            cfg=self.cfg,
            features=self._features(group),
            bound=self._bound(int((offset + lengths).max())),
        )
        done = [request for request, last in zip(group, final) if last]
        self._reading = [request for request in self._reading if request not in done]
        for request in done:
            self._live[request.slot] = request
        return self._collect(out, dict(enumerate(group)))

    def _decode(self, k: int, steps: int | None) -> list[Event]:
        taken = k if steps is None else min(k, steps)
        requests = self._live.values()
        rows = min(power_of_two(max(self._live) + 1), self.config.slots)
        # A slot that frees up in mid-call is better filled than carried along, if anybody waits.
        least = len(requests) if self._waiting else 1
        most = max(min(r.length + taken, len(r.prompt) + r.params.max_new_tokens) for r in requests)
        out, self._cache, self._sampling = decode_step(
            self.params,
            self._cache,
            self._sampling,
            cfg=self.cfg,
            features=self._features(requests),
            rows=rows,
            bound=self._bound(most),
            k=k,
            steps=taken,
            least_live=least,
        )
        return self._collect(out, dict(self._live))

    def _features(self, requests: Iterable[Running]) -> Features:
        features = union([request.features for request in requests])
        return replace(features, vocab_limit=self.config.vocab_limit)

    def _bound(self, length: int) -> int:
        return min(power_of_two(length, LEAST_BOUND), self.config.capacity)

    def _collect(self, out: StepOutput, requests: dict[int, Running]) -> list[Event]:
        """Events of a call whose row r belongs to ``requests[r]``."""
        out = jax.tree.map(np.asarray, out)
        events = []
        for step, row in zip(*np.nonzero(out.tokens >= 0)):
            request = requests[int(row)]
            token = int(out.tokens[step, row])
            request.sampled += 1
            reason = None
            if token in request.params.stop_token_ids:
                reason = "stop"
            elif request.sampled == request.params.max_new_tokens:
                reason = "length"
            events.append(Event(request.number, token, *_logprobs(out, request, step, row), reason))
            if reason is not None:
                del self._live[request.slot]
                self._release(request)
        return events

    def _release(self, request: Running) -> None:
        if request.slot >= 0:
            heapq.heappush(self._free, request.slot)


def _logprobs(out: StepOutput, request: Running, step: Any, row: Any) -> tuple[float | None, Any]:
    asked = request.params.logprobs
    if asked is None:
        return None, None
    top = ()
    if asked:
        top = tuple(
            zip(out.top_ids[step, row, :asked].tolist(), out.top_logprobs[step, row, :asked].tolist())
        )
    return float(out.logprobs[step, row]), top


def _sampling_rows(
    cfg: ModelConfig, config: EngineConfig, requests: list[Running], rows: int
) -> SamplingState:
    """Parameters of new requests as host arrays, ``rows`` of them."""

    def column(values: list[Any], dtype: Any) -> np.ndarray:
        array = np.zeros((rows,), dtype)
        array[: len(values)] = values
        return array

    params = [request.params for request in requests]
    stop_ids = np.full((rows, config.stop_width), -1, np.int32)
    for row, p in enumerate(params):
        stop_ids[row, : len(p.stop_token_ids)] = p.stop_token_ids
    zeros, vocab = np.zeros((rows,), np.int32), cfg.vocab_size
    thinking, width = None, config.thinking_width
    if width:
        budgets, prompts = [p.thinking for p in params], [request.prompt for request in requests]
        thinking = thinking_rows(budgets, prompts, config.newline_ids, rows, width)
    return SamplingState(
        token=zeros,
        position=zeros,
        live=zeros.astype(bool),
        remaining=column([p.max_new_tokens for p in params], np.int32),
        barred=column([p.min_new_tokens for p in params], np.int32),
        stop_ids=stop_ids,
        seed=column([p.seed for p in params], np.uint32),
        temperature=column([p.temperature for p in params], np.float32),
        top_k=column([p.top_k or 0 for p in params], np.int32),
        top_p=column([1.0 if p.top_p is None else p.top_p for p in params], np.float32),
        min_p=column([p.min_p or 0.0 for p in params], np.float32),
        repetition=column([p.repetition_penalty for p in params], np.float32),
        presence=column([p.presence_penalty for p in params], np.float32),
        frequency=column([p.frequency_penalty for p in params], np.float32),
        prompted=np.zeros((rows, vocab), bool) if config.penalties else None,
        counts=np.zeros((rows, vocab), np.int32) if config.penalties else None,
        thinking=thinking,
    )

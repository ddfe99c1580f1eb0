"""The engine core: slots, the host state of requests, and one ``step()`` that prefills or decodes.

It owns no time, file or socket. Offline generation and the server are clients of it.
"""

import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.cache.apply import init_snapshots
from jaxllm.cache.sizes import OutOfPages
from jaxllm.cache.state import Cache, init_cache
from jaxllm.config import ModelConfig, require
from jaxllm.generation import seats
from jaxllm.generation.admission import (
    OwnPages,
    Room,
    SharedPages,
    Suspended,
    book_sizes,
    pool_sizes,
)
from jaxllm.generation.buckets import power_of_two
from jaxllm.generation.checks import check_request
from jaxllm.generation.engine_config import EngineConfig
from jaxllm.generation.request import Event, Running, SamplingParams, union
from jaxllm.generation.sampling import Features, init_sampling
from jaxllm.generation.sampling_rows import sampling_rows
from jaxllm.generation.steps import StepOutput, decode_step, prefill
from jaxllm.generation.thinking import newline_table
from jaxllm.generation.weights import operands
from jaxllm.model.functional import Params

LEAST_LENGTH = 16
LEAST_BOUND = 64


class Engine:
    """Continuous batching over slot pools.

    A request waits until there is room, is prefilled in chunks, decodes in its slot, and leaves it. Slots are taken
    lowest first, so that decoding touches as few rows as possible. Where requests share a pool of pages
    (``KVCache.pool_tokens``) and it runs short, the youngest one is put aside, bit by bit, until the others have made
    room again; it is the first that goes on then.

    Attributes:
        prompt_tokens_read: tokens of prompts that steps have read; those of shared prefixes are not among them.
        suspensions: how often a request had to make room for others.
    """

    def __init__(self, cfg: ModelConfig, params: Params, config: EngineConfig):
        self.cfg = cfg
        self.config = config
        self._pool = pool_sizes(cfg, config)
        pages, stored = (None, config.stored) if self._pool is None else self._pool[1:]
        self._cache = init_cache(cfg, config.slots, config.capacity, config.kv, config.policy, pages, stored)
        self._room: Room = OwnPages(config.slots)
        self._snapshots: tuple[Any, ...] = ()
        if self._pool is not None:
            books = book_sizes(config, self._cache, self._pool)
            self._room = SharedPages(books)
            self._snapshots = init_snapshots(self._cache, books.snapshots)
        counted = cfg.vocab_size if config.penalties else None
        self._sampling = init_sampling(
            config.slots,
            stop_width=config.stop_width,
            counted_vocab=counted,
            thinking_width=config.thinking_width,
            newline=newline_table(config.newline_ids, cfg.vocab_size) if config.thinking_width else None,
        )
        self._waiting: deque[Running] = deque()
        self._reading: list[Running] = []
        self._live: dict[int, Running] = {}
        self._next = 0
        # The last call was a prefill: live requests have their turn next.
        self._prefilled = False
        #: Of the last call, where it decoded with taps: (tokens i32[k, R], what layers reported, [k, layers, R, ...]).
        self.report: tuple[np.ndarray, dict[str, np.ndarray]] | None = None
        self.prompt_tokens_read = self.suspensions = 0
        self._read_with: list[Any] = []
        self.params = params

    @property
    def params(self) -> Params:
        """Pure parameters, as the steps take them; None while the engine is idle in the pool.

        Other ones than before make shared prefixes void, and may come only while no request runs.
        """
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        if params is not None and isinstance(self._room, SharedPages):
            leaves = jax.tree.leaves(params)
            # An array of the device never changes; what the host holds may have, in place.
            same = len(leaves) == len(self._read_with) and all(
                isinstance(leaf, jax.Array) and known() is leaf
                for leaf, known in zip(leaves, self._read_with)
            )
            if not same:
                require(not self.busy, "params", "other arrays", "only while the engine has no request")
                self._room.forget()
            self._read_with = [weakref.ref(leaf) for leaf in leaves]
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
        check_request(self.cfg, self.config, self._pool, prompt, params)
        request = Running(self._next, list(prompt), params)
        self._next += 1
        self._waiting.append(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Drop a request; its slot is free at once. Unknown or finished numbers are ignored."""
        for group in (self._waiting, self._reading):
            for request in [r for r in group if r.number == number]:
                group.remove(request)
                if request.slot >= 0:
                    self._room.release(request)
        for request in [r for r in self._live.values() if r.number == number]:
            # The device still thinks that the slot lives: without this it would go on writing to it.
            live = self._sampling.live.at[request.slot].set(False)
            self._sampling = replace(self._sampling, live=live)
            del self._live[request.slot]
            self._room.release(request)

    @property
    def cache(self) -> Cache:
        """The pools, as the last call left them."""
        return self._cache

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
        if not (self._live and self._prefilled):
            self._admit()
            if self._reading:
                self._prefilled = True
                return self._prefill()
        self._prefilled = False
        return self._decode(k, steps) if self._live else []

    @property
    def _running(self) -> list[Running]:
        return [*self._live.values(), *self._reading]

    def _admit(self) -> None:
        new, back = [], []
        while self._waiting and self._room.admit(self._waiting[0], [*self._running, *new, *back]):
            request = self._waiting.popleft()
            (new if request.suspended is None else back).append(request)
        if new:
            rows = power_of_two(len(new))
            slots = np.full(rows, -1, np.int32)
            slots[: len(new)] = [request.slot for request in new]
            parameters = sampling_rows(self.cfg, self.config, new, rows)
            if self._pool is None:
                self._cache, self._sampling = seats.admit(self._cache, self._sampling, slots, parameters)
            else:
                self._sampling = seats.seat(self._sampling, slots, parameters)
            self._reading += new
        if back:
            self._flush()
        for request in back:
            _, contents, row = request.suspended
            self._cache, self._sampling = seats.unpark(
                self._cache, self._sampling, request.slot, contents, row
            )
            request.suspended = None
            self._live[request.slot] = request

    def _flush(self) -> None:
        """What the host has decided since the last step reaches the device."""
        decided = self._room.flush()
        if decided is not None:
            self._cache, self._snapshots = seats.update(self._cache, self._snapshots, decided)

    def _grow(self, steps: int) -> int:
        """Decode steps for which all live requests have room; the youngest ones leave until there are any."""
        while True:
            try:
                return self._room.grow(list(self._live.values()), steps)
            except OutOfPages:
                running = self._running
                if len(running) == 1:
                    raise
                self._suspend(max(running, key=lambda request: request.number))

    def _suspend(self, request: Running) -> None:
        """Out of its slot, and first in the queue."""
        assert isinstance(self._room, SharedPages)
        if request in self._reading:
            self._reading.remove(request)
        else:
            contents, row, self._sampling = seats.park(self._cache, self._sampling, request.slot)
            request.suspended = Suspended(self._room.allocator.held[request.slot], contents, row)
            del self._live[request.slot]
        self._room.release(request)
        self._waiting.appendleft(request)
        self.suspensions += 1

    def _prefill(self) -> list[Event]:
        self._flush()
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
            self.prompt_tokens_read += len(piece)
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
            fresh=not offset.any(),
        )
        self._room.settle(group, self._cache, reading=True)
        done = [request for request, last in zip(group, final) if last]
        self._reading = [request for request in self._reading if request not in done]
        for request in done:
            self._live[request.slot] = request
        return self._collect(out, dict(enumerate(group)))

    def _decode(self, k: int, steps: int | None) -> list[Event]:
        taken = self._grow(k if steps is None else min(k, steps))
        if not self._live:
            # All have made room for older ones that are still reading.
            return []
        self._flush()
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
            taps=self.config.taps,
        )
        events = self._collect(out, dict(self._live))
        self._room.settle(self._live.values(), self._cache, reading=False)
        return events

    def _features(self, requests: Iterable[Running]) -> Features:
        features = union([request.features for request in requests])
        return replace(features, vocab_limit=self.config.vocab_limit)

    def _bound(self, length: int) -> int:
        return min(power_of_two(length, LEAST_BOUND), self.config.capacity)

    def _collect(self, out: StepOutput, requests: dict[int, Running]) -> list[Event]:
        """Events of a call whose row r belongs to ``requests[r]``."""
        out = jax.tree.map(np.asarray, out)
        self.report = None if out.aux is None else (out.tokens, out.aux)
        events = []
        for step, row in zip(*np.nonzero(out.tokens >= 0)):
            request = requests[int(row)]
            token = int(out.tokens[step, row])
            request.output.append(token)
            reason = None
            if token in request.params.stop_token_ids:
                reason = "stop"
            elif request.sampled == request.params.max_new_tokens:
                reason = "length"
            events.append(Event(request.number, token, *_logprobs(out, request, step, row), reason))
            if reason is not None:
                del self._live[request.slot]
                self._room.release(request)
        return events


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

"""The validation loss of a run, in part on the way and in whole before and after."""

import time
from collections.abc import Callable, Sequence
from math import log
from typing import Any

import jax
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig
from jaxllm.data.loader import unread_validation_batches, validation_batches
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.data.tokens import TokenCorpus
from jaxllm.data.unread import UnreadBatch
from jaxllm.model.functional import Params, abstract_params
from jaxllm.train.context import ContextSettings, Scatterer, Slots
from jaxllm.train.placement import param_shardings
from jaxllm.train.step import make_eval_step
from parallel.context.scattered import Scattered
from parallel.mesh import place_rows, row_share
from parallel.sharding import Placement


class Validation:
    """Scores parameters on the validation split; every target stands in exactly one batch."""

    def __init__(
        self,
        cfg: ModelConfig,
        tokens: TokenCorpus,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seq_len: int,
        part: int,
        place: Placement | None = None,
        context: ContextSettings | None = None,
    ):
        """Makes the batches; compiles nothing yet.

        Args:
            cfg: the model.
            tokens: validation corpus.
            tokenizer: what it was made with.
            batch_size: rows of a batch.
            seq_len: tokens of a row.
            part: tokens of :meth:`partial`, at least one batch, spread evenly.
            place: of the parameters; every process then reads its own rows, or where devices share documents its own
                tokens of all rows.
            context: how devices along ``context`` share them.
        """
        self.cfg, self.place = cfg, place
        self._scatterer = None
        if place is not None and place.size("context") > 1:
            self._scatterer = Scatterer(cfg, context or ContextSettings(), place.mesh)
        self.batches: list[PackedBatch] | list[UnreadBatch]
        if self._scatterer is not None:
            self.batches = unread_validation_batches(tokens, batch_size, seq_len)
        else:
            index, count = (0, 1) if place is None else row_share(place.mesh)
            share = {"process_index": index, "process_count": count}
            self.batches = list(validation_batches(tokens, batch_size, seq_len, **share))
        wanted = max(1, min(len(self.batches), part // (batch_size * seq_len)))
        self.few = [self.batches[int(i)] for i in np.linspace(0, len(self.batches) - 1, wanted).round()]
        self.targets = tokens.n_targets
        self.bits_per_nat = tokens.n_targets / (log(2) * max(1, tokenizer.token_bytes(tokens.tokens)))
        self._step: Callable[..., object] | None = None
        self._where: Any = None
        self._planned: dict[int, Slots] = {}

    def compile(self) -> float:
        """Compile ahead; the seconds that it took."""
        begin = time.perf_counter()
        if self._scatterer is not None:
            # Once, so that one program has room for every batch.
            for batch in self.batches:
                self._scatterer.grow(batch)
            # These are scored again and again.
            self._planned = {id(batch): self._scatterer(batch) for batch in self.few}
        params = abstract_params(self.cfg)
        if self.place is not None:
            self._where = param_shardings(self.cfg, self.place)
            params = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params, self._where
            )
        step = make_eval_step(self.cfg, place=self.place)
        self._step = step.lower(params, *self._placed(self.batches[0])).compile()
        return time.perf_counter() - begin

    def _placed(self, batch: PackedBatch | UnreadBatch) -> tuple[PackedBatch, Scattered | None]:
        if self._scatterer is not None:
            slots = self._planned.get(id(batch)) or self._scatterer(batch)
            return self._scatterer.place(slots)
        placed = jax.device_put(batch) if self.place is None else place_rows(self.place.mesh, batch)
        return placed, None

    def partial(self, params: Params, step: int) -> dict[str, float]:
        """The trainer's hook: loss on some of the targets."""
        return {"validation_loss": self._loss(params, self.few)}

    def whole(self, params: Params) -> float:
        """Nats per token over all targets."""
        return self._loss(params, self.batches)

    def _loss(self, params: Params, batches: Sequence[PackedBatch | UnreadBatch]) -> float:
        if self._step is None:
            self.compile()
        assert self._step is not None
        if self.place is not None:
            # A model that was stacked anew may lie elsewhere.
            params = jax.device_put(params, self._where)
        nats = weight = 0.0
        for batch in batches:
            sums = jax.device_get(self._step(params, *self._placed(batch)))
            nats, weight = nats + float(sums.nats), weight + float(sums.weight)  # type: ignore[attr-defined]
        return nats / weight

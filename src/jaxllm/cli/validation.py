"""The validation loss of a run, in part on the way and in whole before and after."""

import time
from collections.abc import Callable
from math import log

import jax
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig
from jaxllm.data.loader import validation_batches
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.data.tokens import TokenCorpus
from jaxllm.model.functional import Params, abstract_params
from jaxllm.train.step import make_eval_step


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
    ):
        """Makes the batches; compiles nothing yet.

        Args:
            cfg: the model.
            tokens: validation corpus.
            tokenizer: what it was made with.
            batch_size: rows of a batch.
            seq_len: tokens of a row.
            part: tokens of :meth:`partial`, at least one batch, spread evenly.
        """
        self.cfg = cfg
        self.batches: list[PackedBatch] = list(validation_batches(tokens, batch_size, seq_len))
        wanted = max(1, min(len(self.batches), part // (batch_size * seq_len)))
        self.few = [self.batches[int(i)] for i in np.linspace(0, len(self.batches) - 1, wanted).round()]
        self.targets = tokens.n_targets
        self.bits_per_nat = tokens.n_targets / (log(2) * max(1, tokenizer.token_bytes(tokens.tokens)))
        self._step: Callable[..., object] | None = None

    def compile(self) -> float:
        """Compile ahead; the seconds that it took."""
        begin = time.perf_counter()
        self._step = make_eval_step(self.cfg).lower(abstract_params(self.cfg), self.batches[0]).compile()
        return time.perf_counter() - begin

    def partial(self, params: Params, step: int) -> dict[str, float]:
        """The trainer's hook: loss on some of the targets."""
        return {"validation_loss": self._loss(params, self.few)}

    def whole(self, params: Params) -> float:
        """Nats per token over all targets."""
        return self._loss(params, self.batches)

    def _loss(self, params: Params, batches: list[PackedBatch]) -> float:
        if self._step is None:
            self.compile()
        assert self._step is not None
        nats = weight = 0.0
        for batch in batches:
            sums = jax.device_get(self._step(params, jax.device_put(batch)))
            nats, weight = nats + float(sums.nats), weight + float(sums.weight)  # type: ignore[attr-defined]
        return nats / weight

"""Training batches of the long-context models: three kinds of rows, a length curriculum, one character per token."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.long_tasks import PIECES, filler
from jaxllm.batch import PackedBatch
from jaxllm.config import require
from jaxllm.data.tokenizer import Tokenizer

# The least vocabulary there is: three special tokens and the 256 bytes, so that nothing is merged.
VOCABULARY = 259
KINDS = ("recall", "arithmetic", "text")
# Weight of a character's loss by what it is; "given" characters cannot be known.
WEIGHTS = {"answer": 1.0, "text": 0.2, "given": 0.0}


def byte_tokenizer() -> Tokenizer:
    """One token per byte."""
    return Tokenizer.train([], VOCABULARY)


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum.

    Attributes:
        length: tokens of a row.
        rows: rows of a batch.
        steps: batches.
        mix: shares of the ``KINDS`` among the rows.
    """

    length: int
    rows: int
    steps: int
    mix: tuple[float, ...]

    def __post_init__(self) -> None:
        fits = len(self.mix) == len(KINDS) and abs(sum(self.mix) - 1) < 1e-9
        require(fits, "mix", self.mix, f"must be shares of {KINDS}")


def document_row(
    rng: np.random.Generator, kind: str, length: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens i32[length + 1], the begin token first, and the weights f32[length] of all but that one."""
    if kind == "text":
        parts = [(filler(rng, "train", length), WEIGHTS["text"])]
    else:
        parts = [(piece.text, WEIGHTS[piece.kind]) for piece in PIECES[kind](rng, length)]
    tokens = tokenizer.encode("".join(text for text, _ in parts), bos=True)
    weights = np.repeat([weight for _, weight in parts], [len(text) for text, _ in parts])
    return np.asarray(tokens, np.int32), weights.astype(np.float32)


def batch_of(rows: list[tuple[np.ndarray, np.ndarray]]) -> PackedBatch:
    """One document per row, with NumPy leaves."""
    tokens = np.stack([row[0] for row in rows])
    shape = tokens[:, 1:].shape
    return PackedBatch(
        tokens=tokens[:, :-1],
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
        targets=tokens[:, 1:, None],
        loss_mask=np.stack([row[1] for row in rows]),
    )


class CurriculumBatches:
    """Batches by step: what batch s holds depends on the seed and s alone, so that a resumed run sees the same ones."""

    def __init__(self, tokenizer: Tokenizer, stages: tuple[Stage, ...], seed: int = 0):
        """Stands before step 0.

        Args:
            tokenizer: of single bytes.
            stages: one after the other; the last one goes on for ever.
            seed: of all draws.
        """
        self.tokenizer, self.stages, self.seed = tokenizer, stages, seed
        self.step = 0

    def stage_at(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def batch_at(self, step: int) -> PackedBatch:
        """Batch ``step``; does not move the loader."""
        stage = self.stage_at(step)
        rngs = [np.random.default_rng([self.seed, step, row]) for row in range(stage.rows)]
        kinds = [str(rng.choice(KINDS, p=stage.mix)) for rng in rngs]
        rows = [document_row(rng, kind, stage.length, self.tokenizer) for rng, kind in zip(rngs, kinds)]
        return batch_of(rows)

    def __next__(self) -> PackedBatch:
        batch = self.batch_at(self.step)
        self.step += 1
        return batch

    def _identity(self) -> dict[str, Any]:
        stages = [[stage.length, stage.rows, stage.steps, list(stage.mix)] for stage in self.stages]
        return {"stages": stages, "seed": self.seed}

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON values."""
        return {"step": self.step, **self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken.

        Raises:
            ConfigError: it is of other stages, another mix or another seed.
        """
        given = {name: state.get(name) for name in self._identity()}
        require(given == self._identity(), "state", given, f"must be that of this run, {self._identity()}")
        self.step = int(state["step"])

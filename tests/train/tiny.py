"""Tiny models and batches for the training tests."""

from typing import Any

import jax
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig, Precision, RopeConfig
from jaxllm.train.optim import OptimConfig

VOCAB = 61


def tiny_config(pattern: str = "M*-", precision: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """A model of a few thousand parameters with every letter of ``pattern``."""
    fields: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=16,
        pattern=pattern,
        mamba=MambaConfig(num_heads=2, head_dim=8, state_size=8, chunk_size=8),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeConfig()),
        mlp=MLPConfig(intermediate_size=24),
        tie_embeddings=True,
        precision=Precision(**(precision or {})),
    )
    return ModelConfig(**{**fields, **changes})


def tiny_batch(rows: int = 4, length: int = 16, *, seed: int = 0, vocab: int = VOCAB) -> PackedBatch:
    """Two documents and some padding per row, with weights that differ between rows."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    index = np.arange(length)
    cut = rng.integers(2, length - 2, (rows, 1))
    end = length - rng.integers(0, 3, (rows, 1))
    segments = np.where(index >= end, 0, np.where(index < cut, 1, 2)).astype(np.int32)
    positions = np.where(index < cut, index, index - cut).astype(np.int32)
    targets = np.roll(tokens, -1, axis=1)
    last = (index == cut - 1) | (index >= end - 1)
    targets = np.where(last, -1, targets).astype(np.int32)[..., None]
    mask = ((targets[..., 0] >= 0) * rng.uniform(0.5, 1.5, (rows, 1))).astype(np.float32)
    return PackedBatch(
        tokens=tokens, segment_ids=segments, positions=positions, targets=targets, loss_mask=mask
    )


def constant_lr(lr: float = 1e-2, **changes: Any) -> OptimConfig:
    """An optimiser without warm-up or decay of the rate."""
    return OptimConfig(lr=lr, schedule="constant", warmup_steps=0, **changes)


class TinyLoader:
    """Batches that are a function of their number; resumable like the real loader."""

    def __init__(self, rows: int = 4, length: int = 16, poison: frozenset[int] = frozenset()):
        self.rows, self.length, self.poison = rows, length, poison
        self.step = 0

    def __next__(self) -> PackedBatch:
        batch = tiny_batch(self.rows, self.length, seed=self.step)
        if self.step in self.poison:
            batch = batch.replace(loss_mask=np.where(batch.loss_mask > 0, np.inf, 0).astype(np.float32))
        self.step += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def copied(tree: Any) -> Any:
    """NumPy copies that outlive donation."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def assert_identical(ours: Any, theirs: Any) -> None:
    """Bit for bit the same, NaNs included."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes()

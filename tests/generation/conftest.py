"""Small hybrid models shared by the tests of generation."""

import jax
import numpy as np
import pytest

from jaxllm.config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig, RopeConfig
from jaxllm.model import functional
from jaxllm.model.functional import LanguageModel

VOCAB = 61


def hybrid(pattern: str, *, rope: bool = True, groups: int = 1, window: int = 5) -> ModelConfig:
    """A model of some thousand parameters with grouped queries; ``groups`` are the Mamba groups."""
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        pattern=pattern,
        mamba=MambaConfig(num_heads=4, head_dim=8, state_size=8, n_groups=groups, chunk_size=8),
        attention=AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=8, window=window, rope=RopeConfig() if rope else None
        ),
        mlp=MLPConfig(32),
        # Larger than in training, so that logits differ by far more than rounding does.
        init_std=0.2,
    )


def parameters(cfg: ModelConfig, seed: int = 0):
    return functional.init_params(cfg, seed)


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    cfg = hybrid("M*-W")
    return LanguageModel(cfg, parameters(cfg))


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def full(lm):
    """Logits of the whole sequence by the training forward: [T] -> [T, V]."""
    from jaxllm.batch import PackedBatch

    forward = jax.jit(lambda p, tokens: functional.merge(lm.cfg, p)(PackedBatch.from_rows(tokens)))

    def logits(ids: list[int]) -> np.ndarray:
        # Right padding is inert for what stands before it, and one shape compiles once.
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(forward(lm.params, tokens))[0, : len(ids)]

    return logits

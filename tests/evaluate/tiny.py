"""A tiny hybrid model, the texts that it is tested on, and its exported form."""

from jaxllm import AttentionConfig, LanguageModel, MambaConfig, MLPConfig, ModelConfig
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.model.functional import init_params

TEXTS = [
    "A state space model reads a text once and keeps a state of fixed size.",
    "Attention keeps every key and value; a window keeps the last ones.",
    "é, ü and 漢字 are several bytes each.",
    "x",
    "for i in range(10):\n    print(i * i)\n" * 12,
]


def tiny_config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        pattern="M-*-",
        mamba=MambaConfig(num_heads=4, head_dim=16, state_size=16, n_groups=2, chunk_size=16),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
        mlp=MLPConfig(64),
        init_std=0.2,
    )


def tiny_model() -> LanguageModel:
    tokenizer = Tokenizer.train(TEXTS, 300)
    cfg = tiny_config(tokenizer.vocab_size)
    return LanguageModel(cfg, init_params(cfg, seed=3), tokenizer)

"""Shares of a model's forward FLOPs by letter, and what a degraded task costs by which of them leave out their backward pass."""

import functools
from dataclasses import dataclass

from jaxllm.config import AttentionConfig, MLPConfig, ModelConfig, RopeConfig
from jaxllm.presets import preset
from jaxllm.train.flops import forward_flops_per_token
from parallel.failover.recovery import Mecefo

HEAD = "head"
# Letters whose backward pass is left out: attention as published, and our extension to all sequence mixers.
POLICIES = {"attention": "*W", "every mixer": "*WMGJ"}


@dataclass(frozen=True)
class Published:
    """A model of arXiv 2510.16415, and what was measured of it on 32 A100.

    Attributes:
        cfg: widths and depths of the public configurations that its training recipe comes from (GaLore's).
        batch: sequences.
        tokens: of each; the paper's is not known, this is the recipe's.
        steps: of the run.
        rates: tokens/s of (Bamboo, Oobleck, MeCeFO) without failures.
        drops: percent that they lose at the high rate.
    """

    cfg: ModelConfig
    batch: int
    steps: int
    rates: tuple[float, float, float]
    drops: tuple[float, float, float]
    tokens: int = 256

    @property
    def step_seconds(self) -> float:
        """Of MeCeFO's step without failures."""
        return self.batch * self.tokens / self.rates[2]


def _llama(layers: int, hidden: int, heads: int, intermediate: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        pattern="*-" * layers,
        attention=AttentionConfig(heads, heads, hidden // heads, rope=RopeConfig()),
        mlp=MLPConfig(intermediate, "swiglu"),
    )


PUBLISHED = {
    "350M": Published(_llama(24, 1024, 16, 2736), 8192, 6_000, (438e3, 704e3, 1199e3), (7.04, 10.14, 1.07)),
    "1B": Published(_llama(24, 2048, 32, 5461), 4096, 20_000, (154e3, 291e3, 471e3), (8.21, 13.87, 2.98)),
    "7B": Published(
        _llama(32, 4096, 32, 11008), 1024, 60_000, (12.4e3, 67.0e3, 111.1e3), (20.84, 28.09, 4.18)
    ),
}
HYBRIDS = ("nemotron-h-8b", "nemotron-3-nano-30b-a3b", "jet-nemotron-4b", "llama-3.1-8b")


@functools.cache
def shares(cfg: ModelConfig, tokens: int) -> dict[str, float]:
    """Of the forward FLOPs of an average token, by letter of the pattern and of the head; they sum to 1."""
    counted = {letter: _one_and_head(cfg, letter, tokens) for letter in sorted(set(cfg.pattern))}
    found = {letter: cfg.pattern.count(letter) * one for letter, (one, _) in counted.items()}
    found[HEAD] = next(head for _, head in counted.values())
    whole = sum(found.values())
    return {name: flops / whole for name, flops in found.items()}


def _one_and_head(cfg: ModelConfig, letter: str, tokens: int) -> tuple[float, float]:
    """FLOPs of one sub-block and of the head: those of models of one and two such sub-blocks, soon counted."""
    one, two = (forward_flops_per_token(cfg.replace(pattern=letter * n), tokens) for n in (1, 2))
    return two - one, 2 * one - two


def degraded(cfg: ModelConfig, tokens: int, policy: str = "attention") -> Mecefo:
    """MeCeFO's costs for a model, the head dealt evenly over the stages: it and all that is not skipped costs 3 units."""
    skipped = sum(share for letter, share in shares(cfg, tokens).items() if letter in POLICIES[policy])
    return Mecefo(skipped=skipped)


def low_rank_units(cfg: ModelConfig) -> float:
    """Units of the two low-rank products of a dense MLP's weight gradient at rank d/16: 1/16 + d / (16 F), not nothing."""
    assert cfg.mlp is not None
    return (1 + cfg.hidden_size / cfg.mlp.intermediate_size) / 16


def hybrid(name: str) -> ModelConfig:
    """A preset without its prediction blocks, which no count of FLOPs covers."""
    return preset(name).replace(mtp=None)

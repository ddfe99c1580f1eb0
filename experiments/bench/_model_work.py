"""The rows of the whole-model benchmark: models, sizes, the work that each must do and the memory that it takes."""

from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxllm import preset
from jaxllm.cache.state import init_cache
from jaxllm.config import (
    AttentionConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    Precision,
    RopeConfig,
)
from jaxllm.model.functional import abstract_params, flatten, param_axes
from jaxllm.train.memory import estimate_training_memory
from jaxllm.train.step import StepSettings
from pallas_kernels.dispatch import IMPLEMENTATIONS

# bfloat16 FLOP/s of the data sheets, dense; what utilisation is held against.
PEAKS = {"H100": 989.5e12, "H200": 989.5e12, "H800": 989.5e12, "GH200": 989.5e12}
SETTINGS = StepSettings(remat="layer")
CHUNK = 4096


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        kind: "train", "prefill" or "decode".
        model: a name of :func:`models`.
        batch: rows.
        length: tokens of a row; of decode those of its prompt.
        new: tokens decoded.
        attention: its implementation.
        ours: the other ops take a kernel of ours where there is one; False: XLA, as where no kernel runs.
        aims: least values by name of a figure.
    """

    kind: str
    model: str
    batch: int
    length: int
    new: int = 0
    attention: str = "mosaic_gpu"
    ours: bool = True
    aims: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind} {self.model} b{self.batch} {self.length}+{self.new} {self.attention}"

    def implementations(self) -> dict[str, str]:
        """What every op takes, for ``dispatch.naming``."""
        named = {
            op: "mosaic_gpu" if self.ours and "mosaic_gpu" in names else "xla"
            for op, names in IMPLEMENTATIONS.items()
        }
        if self.kind == "decode":
            # Its kernel takes no single tokens, and it has no step.
            named["dynamic_conv"] = "xla"
        return named | {"attention": self.attention}


def _hybrid(pattern: str, width: int, **parts: Any) -> ModelConfig:
    """A model in the layout of Nemotron-H around one width; heads of 128 for attention, of 64 for Mamba-2."""
    return ModelConfig(
        vocab_size=32768,
        hidden_size=width,
        pattern=pattern,
        mamba=MambaConfig(num_heads=2 * width // 64, n_groups=8),
        attention=AttentionConfig(num_heads=width // 128, num_kv_heads=width // 512),
        **parts,
    )


def models(quick: bool) -> dict[str, ModelConfig]:
    """The models by name; ``quick`` ones have the same letters and no size."""
    if quick:
        tiny = preset("nemotron_3_tiny").replace(vocab_size=256)
        mlp = MLPConfig(64)
        return {
            "M*-E": tiny.replace(pattern="M*-E", mlp=mlp, scan_layers=True),
            "nano": tiny.replace(pattern="ME*"),
        }
    experts = MoEConfig(num_experts=32, top_k=4, intermediate_size=1024, shared_intermediate_size=2048)
    trained = {
        "M*-E": _hybrid("M*-E" * 12, 2048, mlp=MLPConfig(8192), moe=experts),
        "M-*": _hybrid("M-M-M-*-" * 6, 2048, mlp=MLPConfig(8192)),
        "dense": replace(
            _hybrid("*-" * 24, 2048, mlp=MLPConfig(8192, "swiglu")),
            attention=AttentionConfig(num_heads=16, num_kv_heads=8, rope=RopeConfig()),
        ),
    }
    found = {name: cfg.replace(scan_layers=True) for name, cfg in trained.items()}
    return found | {"nano": preset("nemotron_3_nano_30b_a3b"), "jet-2b": preset("jet_nemotron_2b")}


def precise(cfg: ModelConfig, kind: str) -> ModelConfig:
    """bfloat16 everywhere; training keeps float32 masters."""
    return cfg.replace(precision=Precision("float32" if kind == "train" else "bfloat16", "bfloat16"))


def rows(quick: bool) -> list[Row]:
    """What is measured, what matters most first: a run that is out of time leaves out the end."""
    if quick:
        sizes = (("train", "M*-E", 2, 0), ("prefill", "nano", 1, 0), ("decode", "nano", 2, 8))
        return [Row(kind, model, batch, 64, new, "xla", False) for kind, model, batch, new in sizes]
    long, aim = (32768, 1024), (("output_tokens_per_s", 598.0),)
    first = [
        Row("train", "M*-E", 4, 4096, aims=(("mfu", 0.45),)),
        Row("prefill", "nano", 1, long[0]),
        Row("decode", "nano", 64, *long, "xla", aims=aim),
        Row("train", "dense", 4, 4096),
        Row("train", "M-*", 4, 4096),
        Row("prefill", "jet-2b", 1, long[0]),
    ]
    decode = [
        Row("decode", model, batch, *long, "xla")
        for batch in (64, 256, 1, 16, 128, 4)
        for model in ("nano", "jet-2b")
        if (model, batch) != ("nano", 64)
    ]
    # Our kernel reads the keys once for each query head; XLA writes the scores.
    return [*first, *decode, Row("decode", "nano", 64, *long), Row("train", "M*-E", 4, 4096, 0, "xla")]


def _states(cfg: ModelConfig, length: int) -> tuple[int, int]:
    """Bytes of one row: keys and values that attention reads, and recurrent states."""
    read = state = 0
    cache = jax.eval_shape(lambda: init_cache(cfg, 1, length))
    for letter, layer in zip(cfg.pattern, cache.layers, strict=True):
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer))
        if letter in "*W":
            # A window's ring holds no more than it reads.
            read += size
        else:
            state += size
    return read, state


def decode_bytes(cfg: ModelConfig, batch: int, length: int) -> float:
    """What one decode step must move: weights once, of the experts those that some row draws; states in and out, keys in.

    Rows draw their experts independently and evenly, as random weights have it.
    """
    axes, weights = param_axes(cfg), 0.0
    for name, leaf in flatten(abstract_params(cfg)).items():
        size = leaf.size * leaf.dtype.itemsize
        if name.startswith("embed.") and not cfg.tie_embeddings:
            size = size * batch // cfg.vocab_size
        if axes[name][0].name == "experts" and leaf.ndim > 1 and cfg.moe is not None:
            size *= 1 - (1 - cfg.moe.top_k / cfg.moe.num_experts) ** batch
        weights += size
    read, state = _states(cfg, length)
    return weights + batch * (read + 2 * state)


def memory(cfg: ModelConfig, row: Row) -> int:
    """Bytes that the row takes, about."""
    if row.kind == "train":
        return estimate_training_memory(cfg, row.batch, row.length, settings=SETTINGS).total
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in flatten(abstract_params(cfg)).values())
    capacity = row.length + row.new
    cache = jax.eval_shape(lambda: init_cache(cfg, row.batch, capacity))
    layers = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer)) for layer in cache.layers
    ]
    # The layer that is read may be copied, and its scores are written out.
    heads = 0 if cfg.attention is None else cfg.attention.num_heads
    tokens = row.batch if row.kind == "decode" else min(CHUNK, row.length)
    scores = 2 * 4 * tokens * heads * capacity if row.attention == "xla" else 0
    logits = 3 * 4 * row.batch * cfg.vocab_size
    copies = (
        0 if cfg.moe is None else 8 * tokens * cfg.moe.top_k * (cfg.hidden_size + cfg.moe.intermediate_size)
    )
    return weights + sum(layers) + max(layers) + scores + logits + copies

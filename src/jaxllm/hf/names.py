"""Tensor names: one table per family, read in both directions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.model.functional import abstract_params, flatten


@dataclass(frozen=True)
class Layout:
    """How a stored tensor lies relative to ours; both functions give views where they can.

    Attributes:
        shape: our shape to the stored one.
        load: stored array to ours.
        store: our array to the stored one.
    """

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    load: Callable[[np.ndarray], np.ndarray]
    store: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda s: s, lambda a: a, lambda a: a)
# Linear weights: [out, in] there, [in, out] here.
FLIP = Layout(lambda s: s[::-1], lambda a: a.T, lambda a: a.T)
# Depthwise convolution: [channels, 1, k] there, [k, channels] here.
CONV = Layout(lambda s: (s[1], 1, s[0]), lambda a: a[:, 0].T, lambda a: a.T[:, None])


def taps(width: int) -> Layout:
    """Generated convolution kernels: [channels * width, ...] there, the tap fastest; [..., width * channels] here."""

    def load(a: np.ndarray) -> np.ndarray:
        return np.moveaxis(a.reshape(-1, width, *a.shape[1:]), (0, 1), (-1, -2)).reshape(*a.shape[1:], -1)

    def store(a: np.ndarray) -> np.ndarray:
        a = np.moveaxis(a.reshape(*a.shape[:-1], width, -1), (-1, -2), (0, 1))
        return a.reshape(-1, *a.shape[2:])

    return Layout(lambda s: s[::-1], load, store)


MAMBA = {
    "mixer.in_proj.weight": ("mixer.in_proj.weight", FLIP),
    "mixer.in_proj.bias": ("mixer.in_proj.bias", SAME),
    "mixer.conv_weight": ("mixer.conv1d.weight", CONV),
    "mixer.conv_bias": ("mixer.conv1d.bias", SAME),
    "mixer.A_log": ("mixer.A_log", SAME),
    "mixer.D": ("mixer.D", SAME),
    "mixer.dt_bias": ("mixer.dt_bias", SAME),
    "mixer.norm.weight": ("mixer.norm.weight", SAME),
    "mixer.out_proj.weight": ("mixer.out_proj.weight", FLIP),
    "mixer.out_proj.bias": ("mixer.out_proj.bias", SAME),
}


def _linears(ours: str, theirs: str, names: tuple[str, ...]) -> dict[str, tuple[str, Layout]]:
    weights = {f"{ours}.{name}.weight": (f"{theirs}.{name}.weight", FLIP) for name in names}
    return weights | {f"{ours}.{name}.bias": (f"{theirs}.{name}.bias", SAME) for name in names}


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
HYBRID_LAYER = (
    {"norm.weight": ("norm.weight", SAME)}
    | MAMBA
    | _linears("mixer", "mixer", QKVO)
    | _linears("mixer", "mixer", ("up_proj", "down_proj"))
)
HYBRID_MODEL = {
    "embed.weight": ("backbone.embeddings.weight", SAME),
    "norm_f.weight": ("backbone.norm_f.weight", SAME),
    "lm_head.weight": ("lm_head.weight", FLIP),
}
ATTENTION_LAYER = (
    {"norm.weight": ("input_layernorm.weight", SAME)}
    | _linears("mixer", "self_attn", QKVO)
    | {f"mixer.{name}.weight": (f"self_attn.{name}.weight", SAME) for name in ("q_norm", "k_norm")}
)
JET_LAYER = (
    {"norm.weight": ("input_layernorm.weight", SAME)}
    | _linears("mixer", "self_attn", (*QKVO, "a_proj", "b_proj", "g_proj"))
    | {f"mixer.{name}": (f"self_attn.{name}", SAME) for name in ("A_log", "dt_bias", "o_norm.weight")}
)
GENERATOR = "mixer.generator."
MLP_LAYER = {"norm.weight": ("post_attention_layernorm.weight", SAME)} | _linears(
    "mixer", "mlp", ("gate_proj", "up_proj", "down_proj")
)
TRANSFORMER_MODEL = {
    "embed.weight": ("model.embed_tokens.weight", SAME),
    "norm_f.weight": ("model.norm.weight", SAME),
    "lm_head.weight": ("lm_head.weight", FLIP),
}
HYBRIDS = ("nemotron_h", "mamba2")


@dataclass(frozen=True)
class Stored:
    """Where one of our parameters is stored.

    Attributes:
        name: in the file.
        shape: in the file.
        layout: between there and here.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout


def _mtp_rule(path: str, length: int) -> tuple[str, Layout]:
    """``mtp.1.layers.0.norm.weight`` is stored as ``mtp.layers.2.norm.weight`` where a block has two letters.

    The norms and the projection before a block are stored with its first letter, the norm after it with its last.
    """
    _, number, rest = path.split(".", 2)
    first = int(number) * length
    if rest.startswith("layers."):
        _, inner, rest = rest.split(".", 2)
        name, layout = HYBRID_LAYER[rest]
        return f"mtp.layers.{first + int(inner)}.{name}", layout
    index = first + length - 1 if rest.startswith("final_layernorm.") else first
    return f"mtp.layers.{index}.{rest}", FLIP if rest == "eh_proj.weight" else SAME


def _rule(path: str, cfg: ModelConfig, family: str) -> tuple[str, Layout]:
    """(stored name, layout) of our parameter ``path``."""
    hybrid, pattern = family in HYBRIDS, cfg.pattern
    if path.startswith("mtp.") and cfg.mtp is not None:
        return _mtp_rule(path, len(cfg.mtp.pattern))
    if not path.startswith("layers."):
        return (HYBRID_MODEL if hybrid else TRANSFORMER_MODEL)[path]
    _, number, rest = path.split(".", 2)
    index = int(number)
    if hybrid:
        name, layout = HYBRID_LAYER[rest]
        return f"backbone.layers.{index}.{name}", layout
    # A Hugging Face layer is a pair of ours.
    if rest.startswith(GENERATOR) and cfg.jet is not None:
        inner = rest.removeprefix(GENERATOR)
        name = f"self_attn.dynamic_conv1d.kernel_generator.{inner}"
        layout = taps(cfg.jet.conv_kernel) if inner.startswith("w2.") else FLIP
    else:
        name, layout = {"-": MLP_LAYER, "J": JET_LAYER}.get(pattern[index], ATTENTION_LAYER)[rest]
    return f"model.layers.{index // 2}.{name}", layout


def tensor_names(cfg: ModelConfig, family: str) -> dict[str, Stored]:
    """Every parameter of ``cfg`` by dotted path (as :func:`jaxllm.model.functional.flatten` gives it): its place."""
    out = {}
    for path, leaf in flatten(abstract_params(cfg)).items():
        name, layout = _rule(path, cfg, family)
        out[path] = Stored(name, tuple(layout.shape(leaf.shape)), layout)
    return out


def disk_name(name: str, family: str) -> str:
    """The name on disk of a tensor that may be named as transformers 5 names Nemotron-H's in memory."""
    if family == "nemotron_h" and name.startswith("model."):
        return "backbone." + name.removeprefix("model.")
    return name

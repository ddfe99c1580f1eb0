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


def _experts(ours: str, template: str, **parts: tuple[str, ...]) -> dict[str, tuple[tuple[str, ...], Layout]]:
    """Stacked experts, each of whose parts is a tensor of its own: ``{}`` in the name is the expert's number."""
    return {
        f"{ours}.{name}": (tuple(template.replace("*", part) for part in theirs), FLIP)
        for name, theirs in parts.items()
    }


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
HYBRID_LAYER = (
    {"norm.weight": ("norm.weight", SAME)}
    | MAMBA
    | _linears("mixer", "mixer", QKVO)
    | _linears("mixer", "mixer", ("up_proj", "down_proj"))
    | _linears("mixer.shared_experts", "mixer.shared_experts", ("up_proj", "down_proj"))
    | _linears("mixer", "mixer", ("gate", "fc1_latent_proj", "fc2_latent_proj"))
    | {"mixer.gate.e_score_correction_bias": ("mixer.gate.e_score_correction_bias", SAME)}
    | _experts("mixer.experts", "mixer.experts.{}.*.weight", up_proj=("up_proj",), down_proj=("down_proj",))
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
_POST_NORM = {"norm.weight": ("post_attention_layernorm.weight", SAME)}
MOE_LAYER = {
    "mixtral": _POST_NORM
    | {"mixer.gate.weight": ("block_sparse_moe.gate.weight", FLIP)}
    | _experts(
        "mixer.experts",
        "block_sparse_moe.experts.{}.*.weight",
        gate_up_proj=("w1", "w3"),
        down_proj=("w2",),
    ),
    "qwen3_moe": _POST_NORM
    | {"mixer.gate.weight": ("mlp.gate.weight", FLIP)}
    | _experts(
        "mixer.experts",
        "mlp.experts.{}.*.weight",
        gate_up_proj=("gate_proj", "up_proj"),
        down_proj=("down_proj",),
    ),
}
TRANSFORMER_MODEL = {
    "embed.weight": ("model.embed_tokens.weight", SAME),
    "norm_f.weight": ("model.norm.weight", SAME),
    "lm_head.weight": ("lm_head.weight", FLIP),
}
HYBRIDS = ("nemotron_h", "mamba2")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: a parameter of ours, or a part of one.

    Attributes:
        path: of our parameter.
        index: the part; empty for all of it.
        name: in the file.
        shape: in the file.
        layout: between there and here.
    """

    path: str
    index: tuple[int | slice, ...]
    name: str
    shape: tuple[int, ...]
    layout: Layout


Names = str | tuple[str, ...]


def _mtp_rule(path: str, length: int) -> tuple[str, Names, Layout]:
    """``mtp.1.layers.0.norm.weight`` is stored as ``mtp.layers.2.norm.weight`` where a block has two letters.

    The norms and the projection before a block are stored with its first letter, the norm after it with its last.
    """
    _, number, rest = path.split(".", 2)
    first = int(number) * length
    if rest.startswith("layers."):
        _, inner, rest = rest.split(".", 2)
        names, layout = HYBRID_LAYER[rest]
        return f"mtp.layers.{first + int(inner)}.", names, layout
    index = first + length - 1 if rest.startswith("final_layernorm.") else first
    return f"mtp.layers.{index}.", rest, FLIP if rest == "eh_proj.weight" else SAME


def _rule(path: str, cfg: ModelConfig, family: str) -> tuple[str, Names, Layout]:
    """(prefix, stored name or the names of an expert's parts, layout) of our parameter ``path``."""
    hybrid, pattern = family in HYBRIDS, cfg.pattern
    if path.startswith("mtp.") and cfg.mtp is not None:
        return _mtp_rule(path, len(cfg.mtp.pattern))
    if not path.startswith("layers."):
        names, layout = (HYBRID_MODEL if hybrid else TRANSFORMER_MODEL)[path]
        return "", names, layout
    _, number, rest = path.split(".", 2)
    index = int(number)
    if hybrid:
        names, layout = HYBRID_LAYER[rest]
        return f"backbone.layers.{index}.", names, layout
    # A Hugging Face layer is a pair of ours.
    prefix = f"model.layers.{index // 2}."
    if rest.startswith(GENERATOR) and cfg.jet is not None:
        inner = rest.removeprefix(GENERATOR)
        layout = taps(cfg.jet.conv_kernel) if inner.startswith("w2.") else FLIP
        return prefix, f"self_attn.dynamic_conv1d.kernel_generator.{inner}", layout
    layers = {"-": MLP_LAYER, "J": JET_LAYER, "E": MOE_LAYER.get(family, {})}
    names, layout = layers.get(pattern[index], ATTENTION_LAYER)[rest]
    return prefix, names, layout


def _places(path: str, shape: tuple[int, ...], prefix: str, names: Names, layout: Layout) -> list[Stored]:
    """The tensors that hold one parameter of ``shape``."""
    if isinstance(names, str):
        return [Stored(path, (), prefix + names, tuple(layout.shape(shape)), layout)]
    experts, inputs, outputs = shape
    width = outputs // len(names)
    return [
        Stored(
            path,
            (expert, slice(None), slice(part * width, (part + 1) * width)),
            prefix + name.format(expert),
            tuple(layout.shape((inputs, width))),
            layout,
        )
        for expert in range(experts)
        for part, name in enumerate(names)
    ]


def tensor_names(cfg: ModelConfig, family: str) -> list[Stored]:
    """Every tensor of a checkpoint of ``cfg``: its name, and which parameter or part of one it is.

    Paths are those of :func:`jaxllm.model.functional.flatten`. Stacked experts are a tensor each on disk, gated ones two.
    """
    return [
        place
        for path, leaf in flatten(abstract_params(cfg)).items()
        for place in _places(path, leaf.shape, *_rule(path, cfg, family))
    ]


def disk_name(name: str, family: str) -> str:
    """The name on disk of a tensor that may be named as transformers 5 names Nemotron-H's in memory."""
    if family == "nemotron_h" and name.startswith("model."):
        return "backbone." + name.removeprefix("model.")
    return name

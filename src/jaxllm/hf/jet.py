"""config.json of Jet-Nemotron (arXiv 2508.15884): Qwen2 layers whose attention may be a JetBlock or have a window.

The released code rounds norms after the weight, unlike Qwen2's ("last"), and has biases on q, k and v.
"""

import math
from typing import Any

from jaxllm.config import ConfigError, JetConfig, ModelConfig, require
from jaxllm.hf.fields import Fields, number
from jaxllm.hf.transformer import expect, read_layers, write_layers

LETTER_OF_LAYER = {"jet": "J", "attn": "*", "swa": "W"}
LAYER_OF_LETTER = {letter: name for name, letter in LETTER_OF_LAYER.items()}
SECTION = "efficient_attention_config"
# Which kernels to use, not what they compute.
KERNELS = {"mode", "dconv_implementation"}
# Defaults of the released JetBlockConfig.
JET_DEFAULTS: dict[str, Any] = {
    "num_heads": 6,
    "head_dim": 256,
    "expand_v": 2.0,
    "norm_eps": 1e-5,
    "conv_size": 4,
    "dconv_generator_reduction": 8,
}


def _read_jet(section: dict[str, Any]) -> JetConfig:
    """The settings of JetBlock; ``norm_eps`` may be a string, ``expand_v`` is a decimal cut off after a few places."""
    unknown = sorted(set(section) - set(JET_DEFAULTS) - KERNELS)
    require(not unknown, f"{SECTION}.jet", unknown, f"known are {', '.join((*JET_DEFAULTS, *KERNELS))}")
    given = JET_DEFAULTS | section
    head_dim, expand = given["head_dim"], number(given["expand_v"])
    width = round(head_dim * expand)
    require(
        width >= 1 and math.isclose(head_dim * expand, width, rel_tol=1e-5),
        f"{SECTION}.jet.expand_v",
        expand,
        f"times head_dim={head_dim} must be a whole number",
    )
    return JetConfig(
        num_heads=given["num_heads"],
        key_head_dim=head_dim,
        value_head_dim=width,
        conv_kernel=given["conv_size"],
        generator_reduction=given["dconv_generator_reduction"],
        norm_eps=number(given["norm_eps"]),
    )


def read_jet_nemotron(fields: Fields) -> ModelConfig:
    """Layers named "jet", "attn" and "swa" in ``layer_types``, their settings in ``efficient_attention_config``."""
    types = fields.need("layer_types")
    unknown = sorted(set(types) - set(LETTER_OF_LAYER))
    require(not unknown, "layer_types", unknown, f"known are {', '.join(LETTER_OF_LAYER)}")
    layers = fields.get("num_hidden_layers", len(types))
    require(len(types) == layers, "layer_types", types, f"needs num_hidden_layers={layers} entries")
    letters = "".join(LETTER_OF_LAYER[each] for each in types)
    sections = fields.get(SECTION, {})
    unknown = sorted(set(sections) - {"jet", "swa"})
    require(not unknown, SECTION, unknown, "known are jet, swa")
    for letter, name in (("J", "jet"), ("W", "swa")):
        require(letter not in letters or name in sections, SECTION, sections, f"layer_types needs {name}")
    window = sections.get("swa", {})
    unknown = sorted(set(window) - {"window_size"})
    require(not unknown, f"{SECTION}.swa", unknown, "known is window_size")
    require("W" not in letters or "window_size" in window, f"{SECTION}.swa", window, "needs window_size")
    fields.only("use_mrope", False, "positions are those of text")
    fields.only("use_sliding_window", False, "layer_types says which layers have a window")
    fields.skip("max_window_layers", "sliding_window")
    return read_layers(
        fields,
        eps=1e-6,
        head_dim=fields.get("head_dim"),
        qkv_bias=True,
        out_bias=False,
        qk_norm=False,
        mlp_bias=False,
        letters=letters,
        window=window.get("window_size") if "W" in letters else None,
        norm_cast="last",
        jet=_read_jet(sections["jet"]) if "J" in letters else None,
    )


def _write_jet(jet: JetConfig) -> dict[str, Any]:
    # Rounded up: the released code cuts heads * head_dim * expand_v to a whole number.
    expand = math.ceil(jet.value_head_dim / jet.key_head_dim * 1e10) / 1e10
    return {
        "mode": "chunk",
        "expand_v": expand,
        "num_heads": jet.num_heads,
        "head_dim": jet.key_head_dim,
        "norm_eps": str(jet.norm_eps),
        "conv_size": jet.conv_kernel,
        "dconv_generator_reduction": jet.generator_reduction,
        "dconv_implementation": "triton",
    }


def write_jet_nemotron(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of Jet-Nemotron; ``jet.chunk_size``, which changes no result, has none."""
    if cfg.attention is None or cfg.mlp is None:
        raise ConfigError("attention=None: the family's configuration names heads and MLPs")
    out = write_layers(cfg, letters="J*W", norm_cast="last")
    expect(cfg.attention, "attention", qk_norm=False, qkv_bias=True, out_bias=False)
    expect(cfg.mlp, "mlp", bias=False)
    mixers = cfg.pattern[::2]
    sections: dict[str, Any] = {}
    if cfg.jet is not None and "J" in mixers:
        sections["jet"] = _write_jet(cfg.jet)
    if "W" in mixers:
        sections["swa"] = {"window_size": cfg.attention.window}
    return out | {
        "layer_types": [LAYER_OF_LETTER[letter] for letter in mixers],
        SECTION: sections,
        "max_window_layers": len(mixers),
        "use_mrope": False,
    }

"""Ready configurations: five models to train here, and published ones by name.

Published ones are their config.json on the Hugging Face hub; their vocabularies are those of the checkpoints.
"""

import difflib
from collections.abc import Callable

from jaxllm.config import ConfigError, ModelConfig
from jaxllm.presets import jet, mamba2, nemotron, transformer

PRESETS: dict[str, Callable[[], ModelConfig]] = {
    function.__name__: function
    for function in (
        nemotron.quickstart,
        nemotron.small,
        nemotron.medium,
        nemotron.nemotron_h_4b,
        nemotron.nemotron_h_8b,
        nemotron.nemotron_h_56b,
        nemotron.nemotron_3_tiny,
        nemotron.nemotron_3_nano_30b_a3b,
        nemotron.nemotron_3_super,
        mamba2.mamba2_130m,
        mamba2.mamba2_370m,
        mamba2.mamba2_780m,
        mamba2.mamba2_1_3b,
        mamba2.mamba2_2_7b,
        transformer.llama_3_2_1b,
        transformer.llama_3_1_8b,
        transformer.qwen2_5_0_5b,
        transformer.qwen2_5_7b,
        transformer.qwen3_0_6b,
        transformer.qwen3_8b,
        jet.jet_tiny,
        jet.jet_nemotron_2b,
        jet.jet_nemotron_4b,
    )
}


def preset(name: str) -> ModelConfig:
    """The configuration called ``name``; hyphens and dots may stand for underscores.

    Raises:
        ConfigError: there is no such preset; the message has the nearest name and all names.
    """
    key = name.lower().replace("-", "_").replace(".", "_")
    if key not in PRESETS:
        near = difflib.get_close_matches(key, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"preset={name!r}: {hint}presets are {', '.join(PRESETS)}")
    return PRESETS[key]()

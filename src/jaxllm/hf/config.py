"""Hugging Face config.json to ModelConfig and back, for the families of :data:`FAMILIES`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxllm.config import ConfigError, ModelConfig
from jaxllm.hf import jet, mamba, moe, transformer
from jaxllm.hf.fields import Fields


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face.

    Attributes:
        architecture: class in transformers.
        read: config.json fields to ModelConfig.
        write: ModelConfig to config.json fields; raises ConfigError where the family cannot express it.
    """

    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]


# In the order in which config_to_hf tries them.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", transformer.read_llama, transformer.write_llama),
    "qwen2": Family("Qwen2ForCausalLM", transformer.read_qwen2, transformer.write_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", transformer.read_qwen3, transformer.write_qwen3),
    "mixtral": Family("MixtralForCausalLM", moe.read_mixtral, moe.write_mixtral),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", moe.read_qwen3_moe, moe.write_qwen3_moe),
    "nemotron_h": Family("NemotronHForCausalLM", mamba.read_nemotron_h, mamba.write_nemotron_h),
    "mamba2": Family("Mamba2ForCausalLM", mamba.read_mamba2, mamba.write_mamba2),
    "jet_nemotron": Family("JetNemotronForCausalLM", jet.read_jet_nemotron, jet.write_jet_nemotron),
}


def family_of(data: dict[str, Any]) -> str:
    """The family of a config.json.

    Raises:
        ConfigError: no or an unknown ``model_type``.
    """
    name = data.get("model_type")
    if name not in FAMILIES:
        raise ConfigError(f"model_type={name!r}: jaxllm reads {', '.join(sorted(FAMILIES))}")
    return name


def config_from_hf(data: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes; its precision is the default, float32.

    Every field must be understood: unknown ones are an error, so is a value that would change the forward pass in a
    way that jaxllm does not have.

    Raises:
        ConfigError: an unknown family or field, a missing field, or an unsupported value; the message names it.
    """
    name = family_of(data)
    fields = Fields(data, name)
    quantised = fields.get("quantization_config")
    if quantised is not None:
        method = quantised
        if isinstance(quantised, dict):
            # The second spelling is ModelOpt's.
            method = quantised.get("quant_method") or quantised.get("quant_algo") or "unknown"
        raise ConfigError(
            f"quantization_config: the weights are stored quantised (quant_method {method!r}), and jaxllm reads float32, "
            "bfloat16 and float16 only. Give the folder of the same model in bfloat16 (released beside FP8 and NVFP4 "
            "ones), or dequantise it with the tool that made it, save it and remove quantization_config (and hf_quant_config.json)"
        )
    cfg = FAMILIES[name].read(fields)
    fields.finish()
    return cfg


def choose_family(cfg: ModelConfig) -> str:
    """The family that expresses ``cfg``: Mamba-2 for ``M`` alone with norm_cast "first", Nemotron-H for M, *, - .

    Raises:
        ConfigError: no family does; the message has each one's reason.
    """
    reasons = {}
    for name in FAMILIES:
        try:
            config_to_hf(cfg, name)
        except ConfigError as error:
            reasons[name] = str(error)
        else:
            return name
    listed = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    raise ConfigError(f"pattern={cfg.pattern!r}: no Hugging Face family expresses this model\n{listed}")


def config_to_hf(cfg: ModelConfig, family: str) -> dict[str, Any]:
    """The config.json of ``cfg``, which transformers 4 and 5 read; :func:`config_from_hf` gives ``cfg`` back.

    Args:
        cfg: a model whose pattern and options the family has.
        family: a key of :data:`FAMILIES`.

    Raises:
        ConfigError: an unknown family, or one that cannot express ``cfg``.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family={family!r}: jaxllm writes {', '.join(FAMILIES)}")
    head = {"architectures": [FAMILIES[family].architecture], "model_type": family}
    common = {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tie_embeddings,
        "use_cache": True,
    }
    try:
        if cfg.mtp is not None and family != "nemotron_h":
            raise ConfigError(f"mtp={cfg.mtp}: the family has no multi-token prediction")
        return head | common | FAMILIES[family].write(cfg)
    except ConfigError as error:
        raise ConfigError(f"{family} cannot express this model: {error}") from None

"""Model configuration: frozen dataclasses, validated on construction, with a JSON round trip."""

from jaxllm.config.attention import AttentionConfig, RopeConfig
from jaxllm.config.checks import ConfigError, one_of, positive, positive_fields, require
from jaxllm.config.codec import decode
from jaxllm.config.feedforward import MLPConfig, MoEConfig
from jaxllm.config.model import LETTERS, ModelConfig, MTPConfig
from jaxllm.config.precision import Precision
from jaxllm.config.recurrent import GatedDeltaConfig, JetConfig, MambaConfig

__all__ = [
    "LETTERS",
    "AttentionConfig",
    "ConfigError",
    "GatedDeltaConfig",
    "JetConfig",
    "MLPConfig",
    "MTPConfig",
    "MambaConfig",
    "MoEConfig",
    "ModelConfig",
    "Precision",
    "RopeConfig",
    "decode",
    "one_of",
    "positive",
    "positive_fields",
    "require",
]

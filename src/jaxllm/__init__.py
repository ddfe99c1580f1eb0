"""Hybrid Mamba-attention language models in JAX: trained, compressed, quantised and served by one library.

The names in ``__all__`` are the stable API. They load on first use, so that ``import jaxllm`` stays fast.
"""

import importlib
from typing import Any

_HOMES = {
    "AttentionConfig": "jaxllm.config",
    "ConfigError": "jaxllm.config",
    "GatedDeltaConfig": "jaxllm.config",
    "GenerationResult": "jaxllm.generation.results",
    "H2O": "jaxllm.cache.policies",
    "HybridLM": "jaxllm.model.hybrid",
    "JetConfig": "jaxllm.config",
    "KVCache": "jaxllm.cache.kv",
    "KVReport": "jaxllm.generation.kv_report",
    "LanguageModel": "jaxllm.model.functional",
    "MLPConfig": "jaxllm.config",
    "MambaConfig": "jaxllm.config",
    "MoEConfig": "jaxllm.config",
    "ModelConfig": "jaxllm.config",
    "PackedBatch": "jaxllm.batch",
    "Pillar": "jaxllm.cache.policies",
    "Policy": "jaxllm.cache.policies",
    "Precision": "jaxllm.config",
    "Quest": "jaxllm.cache.policies",
    "RKV": "jaxllm.cache.policies",
    "RopeConfig": "jaxllm.config",
    "SnapKV": "jaxllm.cache.policies",
    "StreamingLLM": "jaxllm.cache.policies",
    "Tactic": "jaxllm.cache.policies",
    "generate": "jaxllm.generation.api",
    "load": "jaxllm.generation.folders",
    "preset": "jaxllm.presets",
}

__version__ = "0.1.0"
__all__ = [
    "H2O",
    "RKV",
    "AttentionConfig",
    "ConfigError",
    "GatedDeltaConfig",
    "GenerationResult",
    "HybridLM",
    "JetConfig",
    "KVCache",
    "KVReport",
    "LanguageModel",
    "MLPConfig",
    "MambaConfig",
    "MoEConfig",
    "ModelConfig",
    "PackedBatch",
    "Pillar",
    "Policy",
    "Precision",
    "Quest",
    "RopeConfig",
    "SnapKV",
    "StreamingLLM",
    "Tactic",
    "generate",
    "load",
    "preset",
]


def _check_companions() -> None:
    """``parallel`` and ``pallas_kernels`` are short names: another package of that name on the path would shadow ours."""
    for name in ("pallas_kernels", "parallel"):
        module = importlib.import_module(name)
        if getattr(module, "PROJECT", None) != "jaxllm":
            raise ImportError(
                f"'import {name}' found {getattr(module, '__file__', module)!r}, which is not part of jaxllm. Remove or "
                f"rename that module, or put the folder that holds jaxllm's {name} first on sys.path."
            )


_check_companions()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

"""Hugging Face checkpoints in and out: Nemotron-H (and Nemotron 3), Mamba-2, Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE
and Jet-Nemotron.

``load`` and ``save`` take folders; nothing is downloaded and neither torch nor transformers is imported.
"""

from jaxllm.hf.checkpoint import load, read_config, read_generation_config, save, tensor_dtypes
from jaxllm.hf.config import FAMILIES, choose_family, config_from_hf, config_to_hf
from jaxllm.hf.names import tensor_names
from jaxllm.hf.tensors import CheckpointError

__all__ = [
    "FAMILIES",
    "CheckpointError",
    "choose_family",
    "config_from_hf",
    "config_to_hf",
    "load",
    "read_config",
    "read_generation_config",
    "save",
    "tensor_dtypes",
    "tensor_names",
]

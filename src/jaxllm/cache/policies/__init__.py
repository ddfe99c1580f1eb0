"""Cache policies: what attention reads of the stored tokens, and what stays stored. One file each."""

from jaxllm.cache.policies.base import Policy
from jaxllm.cache.policies.h2o import H2O
from jaxllm.cache.policies.pillar import Pillar
from jaxllm.cache.policies.quest import Quest
from jaxllm.cache.policies.rkv import RKV
from jaxllm.cache.policies.snapkv import SnapKV
from jaxllm.cache.policies.streaming import StreamingLLM
from jaxllm.cache.policies.tactic import Tactic

__all__ = ["H2O", "RKV", "Pillar", "Policy", "Quest", "SnapKV", "StreamingLLM", "Tactic"]

"""What decoding held and read of the cache: a report that a caller hands to ``generate``."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxllm.cache.state import Cache
from jaxllm.cache.traffic import Held, Traffic, held, traffic
from jaxllm.config import ModelConfig

_ATTENTION = "*W"


@dataclass(frozen=True)
class LayerReport:
    """One attention layer; means are over all decode steps of all prompts, a step being one token of one prompt.

    Attributes:
        layer: its place in the model's pattern.
        policy: name of its policy, "dense" or "window".
        dtype: of its keys and values.
        stored: mean of the tokens stored.
        most_stored: the most of any step.
        read: mean of the tokens that a KV head read.
        selected: tokens read over tokens stored; None without a step.
        read_bytes: mean bytes of the keys and values read, scales included.
        policy_bytes: mean bytes that the policy itself read.
        recall: mean share of the true attention probability, over all that is stored, that lies on what was read;
            None unless asked for.
        least_recall: the least of any step and KV head.
    """

    layer: int
    policy: str
    dtype: str
    stored: float
    most_stored: int
    read: float
    selected: float | None
    read_bytes: float
    policy_bytes: float
    recall: float | None = None
    least_recall: float | None = None


class KVReport:
    """Bytes of the cache held and read, and what was selected: handed to ``generate(kv_report=...)`` and read after it.

    Prompts are read with dense attention and not counted, nor is a prompt's first token, which comes out of that.
    Bytes are those of the tokens that a policy names, of their scales and of the arrays it looks them up in; a device
    that works in blocks may move more. What a policy has evicted counts neither as stored nor for the recall. A second
    ``generate`` with the same report starts it anew.

    Attributes:
        recall: also measure the share of the true attention on what was read, at the price of dense attention.
        held: bytes of the cache; None before ``generate``.
    """

    def __init__(self, recall: bool = False):
        self.recall = recall
        self.held: Held | None = None
        self._layers: list[tuple[int, Traffic]] = []
        self._seen: dict[str, list[np.ndarray]] = {}

    def taps(self, cfg: ModelConfig) -> frozenset[str]:
        """What the layers of a model shall report for this."""
        if not set(_ATTENTION) & set(cfg.pattern):
            return frozenset()
        return frozenset({"kv_read", "kv_stored"} | ({"kv_recall"} if self.recall else set()))

    def begin(self, cfg: ModelConfig, cache: Cache) -> None:
        """Forget everything; what follows is about ``cache``."""
        self.held = held(cache)
        self._layers = [
            (index, traffic(state))
            for index, (letter, state) in enumerate(zip(cfg.pattern, cache.layers, strict=True))
            if letter in _ATTENTION
        ]
        self._seen = {}

    def add(self, tokens: np.ndarray, aux: dict[str, np.ndarray]) -> None:
        """The taps of one call.

        Args:
            tokens: i32[k, R], -1 where a row took no step.
            aux: name to [k, layers, R, K].
        """
        taken = tokens >= 0
        for name, value in aux.items():
            # [steps of all rows in the order of time, layers, K]
            self._seen.setdefault(name, []).append(np.moveaxis(value, 1, 2)[taken])

    def _all(self, name: str) -> np.ndarray | None:
        return np.concatenate(self._seen[name]) if name in self._seen else None

    @property
    def steps(self) -> int:
        """Decode steps counted, one for each token of each prompt."""
        return sum(map(len, self._seen.get("kv_read", ())))

    def stored_tokens(self) -> np.ndarray:
        """i32[steps, layers]: tokens that each layer stored in each step, in the order of time."""
        stored = self._all("kv_stored")
        return np.zeros((0, len(self._layers)), np.int32) if stored is None else stored[..., 0]

    def read_bytes(self) -> np.ndarray:
        """[steps, layers]: bytes that each layer read in each step, its policy's own included."""
        read, stored = self._all("kv_read"), self._all("kv_stored")
        if read is None or stored is None:
            return np.zeros((0, len(self._layers)))
        columns = [
            layer.keys_values(read[:, at], stored[:, at]) + layer.of_policy(stored[:, at])
            for at, (_, layer) in enumerate(self._layers)
        ]
        return np.stack(columns, axis=1)

    @property
    def layers(self) -> list[LayerReport]:
        """One entry for each attention layer, in the model's order."""
        read, stored, recall = (self._all(name) for name in ("kv_read", "kv_stored", "kv_recall"))
        found = []
        for at, (index, layer) in enumerate(self._layers):
            if read is None or stored is None:
                found.append(LayerReport(index, layer.policy, layer.dtype, 0.0, 0, 0.0, None, 0.0, 0.0))
                continue
            mine, there = read[:, at], stored[:, at]
            found.append(
                LayerReport(
                    layer=index,
                    policy=layer.policy,
                    dtype=layer.dtype,
                    stored=float(there.mean()),
                    most_stored=int(there.max()),
                    read=float(mine.mean()),
                    selected=float(mine.sum() / there.sum()),
                    read_bytes=float(np.mean(layer.keys_values(mine, there))),
                    policy_bytes=float(np.mean(layer.of_policy(there))),
                    recall=None if recall is None else float(recall[:, at].mean()),
                    least_recall=None if recall is None else float(recall[:, at].min()),
                )
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        layers = self.layers
        return {
            "held_bytes": None if self.held is None else asdict(self.held) | {"total": self.held.total},
            "steps": self.steps,
            "read_bytes_per_step": sum(layer.read_bytes for layer in layers),
            "policy_bytes_per_step": sum(layer.policy_bytes for layer in layers),
            "layers": [asdict(layer) for layer in layers],
        }

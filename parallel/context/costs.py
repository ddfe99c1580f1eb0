"""What things cost in the simulation of context parallelism: one set of constants, published or derived from what is.

The machine is the first of arXiv 2605.08524 ("GPU-X"), whose name is withheld: 5,920 FLOPs per byte of its network, 78
multiprocessors, 25 GB/s to other nodes fit NVIDIA's H20 with one 200 Gb/s adapter for each GPU.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import numpy as np

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = get_args(Pass)
# Five products of matrices where forward has two: scores again, and the gradients of values, scores, queries and keys.
_BACKWARD = 2.5


class AttentionShape(NamedTuple):
    """Heads of one attention layer; the defaults are those of Llama-3-70B, which arXiv 2605.08524 measures.

    Attributes:
        heads: H, of queries.
        kv_heads: K.
        head_dim: d.
        bytes: of a number that travels.
        gradient_bytes: of a partial sum of the gradients of keys and values that travels; 2 is what MagiAttention takes
            unless told otherwise, 4 what ``parallel.context.context_attention`` sends.
    """

    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    bytes: int = 2
    gradient_bytes: int = 2

    @property
    def pair_flops(self) -> int:
        """Of one (query token, key token) pair in the forward pass: two products, of all heads."""
        return 4 * self.heads * self.head_dim

    def flops(self, way: Pass) -> float:
        """Of one pair in a pass."""
        return self.pair_flops * (_BACKWARD if way == "backward" else 1.0)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * self.kv_heads * self.head_dim * self.bytes

    @property
    def gradient_kv_bytes(self) -> int:
        """Partial gradients of keys and values of one token."""
        return 2 * self.kv_heads * self.head_dim * self.gradient_bytes

    @property
    def query_bytes(self) -> int:
        """Queries, or outputs, of one token."""
        return self.heads * self.head_dim * self.bytes


@dataclass(frozen=True)
class Costs:
    """The constants; one set serves every figure, sensitivities vary one at a time.

    Attributes:
        peak: FLOP/s. H20, bfloat16, dense (data sheet); with ``network`` the 5,920 FLOPs per byte of the paper.
        kernel_best: share of the peak that attention of long chunks reaches (paper: over 0.9 of one GPU's with perfect
            balance).
        kernel_tokens: chunks of l tokens reach ``kernel_best * (1 - exp(-l / kernel_tokens))``: a fourth at 512 tokens
            (paper), nine tenths at 4,096. Queries against more or fewer keys count as the square of equal area.
        copy_share: multiprocessors kept for copies while a kernel runs: 6 of 78 (paper).
        node: GPUs of a node (HGX H20).
        network: bytes/s of a GPU to other nodes, each way: 200 Gb/s.
        nvlink: bytes/s of a GPU inside its node, each way: half of 900 GB/s (data sheet).
        network_latency: seconds of a message between nodes: NCCL's model of itself, ring and protocol Simple, 8.4 us
            for the call and 14 us for the network (``src/graph/tuning.cc``).
        nvlink_latency: inside a node: 8.4 us and 3.4 us (same).
        memory: bytes/s of a GPU's own memory: 4.0 TB/s (H20's data sheet).
        room: tokens whose keys and values a worker can hold beside its own. Unlimited: those of a layer are 2 to 4 GB of
            the 96 GB here; smaller ones are a figure of their own.
        crowding: tokens of a worker, over an equal share, that groups may lay on one.
    """

    peak: float = 148e12
    kernel_best: float = 0.9
    kernel_tokens: float = 1780.0
    copy_share: float = 6 / 78
    node: int = 8
    network: float = 25e9
    nvlink: float = 450e9
    network_latency: float = 22.4e-6
    nvlink_latency: float = 11.8e-6
    memory: float = 4.0e12
    room: float = math.inf
    crowding: float = 2.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            least = 0.0 if each.name in ("copy_share", "network_latency", "nvlink_latency") else None
            if value < 0 or (least is None and value == 0):
                raise ValueError(
                    f"costs {each.name}={value!r}: must be {'at least' if least == 0 else 'above'} 0"
                )
        for name in ("kernel_best", "copy_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"costs {name}={getattr(self, name)!r}: is a share, must be at most 1")

    def rate(self, tokens: np.ndarray, copying: bool) -> np.ndarray:
        """FLOP/s of attention of chunks of ``tokens`` tokens; ``copying``: while transfers run beside it."""
        share = self.kernel_best * -np.expm1(-tokens / self.kernel_tokens)
        return self.peak * share * (1 - self.copy_share if copying else 1.0)

    def crossing(self, sender: np.ndarray, receiver: np.ndarray) -> np.ndarray:
        """bool: which transfers leave a node; workers of a node are numbered one after the other."""
        return sender // self.node != receiver // self.node

    def neighbour(self, workers: int) -> tuple[float, float]:
        """Bytes/s and latency of a step in a ring of ``workers`` neighbours, whose slowest link decides."""
        if workers <= self.node:
            return self.nvlink, self.nvlink_latency
        return self.network, self.network_latency

    def all_to_all_seconds(self, size: np.ndarray, workers: int) -> np.ndarray:
        """Every worker receives ``size`` bytes, equally from all others; messages to different peers overlap.

        Args:
            size: f64[...].
            workers: at least 2.
        """
        outside = max(workers - self.node, 0) / (workers - 1)
        latency = self.network_latency if outside else self.nvlink_latency
        return np.maximum(size * outside / self.network, size * (1 - outside) / self.nvlink) + latency

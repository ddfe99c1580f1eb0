"""Floating-point operations of a training step, and the machine's peak to hold them against."""

import time

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.model.functional import active_sizes, param_axes


def forward_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Multiply-adds count two; matrix products only, as in the usual 2 * parameters rule.

    Attention counts the keys that causality (and the window) leaves: ``4 H d`` per query and visible key, for the
    average query of a row that is one document. The scan counts reading and writing states, ``4 H P N`` per token, and
    the lower triangle inside chunks of Q, ``Q (H P + G N)``. The delta rule reads a state twice and writes it once,
    ``6 Hv dk dv``, and multiplies triangles of Q for ``Q (2 H dk + Hv dk + 2 Hv dv)``; the triangular inverse is left
    out. Embedding look-ups are free; the head counts. Of the routed experts a token's ``top_k`` count.
    """
    cfg = cfg.replace(scan_layers=False)
    total, axes = 0.0, param_axes(cfg)
    for name, size in active_sizes(cfg).items():
        if len(axes[name]) > 1 and not name.startswith("embed."):
            total += 2 * size
    if cfg.tie_embeddings:
        total += 2 * cfg.vocab_size * cfg.hidden_size
    for letter in cfg.pattern:
        if letter in "*W" and cfg.attention is not None:
            a = cfg.attention
            seen = (seq_len + 1) / 2
            if letter == "W" and a.window is not None and a.window < seq_len:
                seen = a.window - a.window * (a.window - 1) / (2 * seq_len)
            total += 4 * a.num_heads * a.head_dim * seen
        if letter == "M" and cfg.mamba is not None:
            m = cfg.mamba
            chunk = min(m.chunk_size, seq_len)
            total += 4 * m.num_heads * m.head_dim * m.state_size
            total += chunk * (m.num_heads * m.head_dim + m.n_groups * m.state_size)
        d = {"G": cfg.delta, "J": cfg.jet}.get(letter)
        if d is not None:
            heads = d.value_size // d.value_head_dim
            total += 6 * d.value_size * d.key_head_dim
            total += min(d.chunk_size, seq_len) * (2 * d.key_size + heads * d.key_head_dim + 2 * d.value_size)
    return total


def training_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Forward and backward, three times the forward; recomputation is not counted, as in model FLOPs utilisation."""
    return 3 * forward_flops_per_token(cfg, seq_len)


def measured_peak(operand: str = "float32", size: int = 1024, repeats: int = 3) -> float:
    """FLOP/s of the best of a few square matrix products on the first device, with float32 accumulation.

    On an accelerator the size grows to 8192, so that the launch does not count. This is what a dense product reaches
    here, not a data sheet's number, so a utilisation against it says how much of the reachable is used.
    """
    if jax.default_backend() != "cpu":
        size = max(size, 8192)
    a = jnp.ones((size, size), operand)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best

"""torch.compile's attention: flex_attention, told what a query sees; the only peer with documents, windows and soft caps."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.cases import Case

Arrays = dict[str, Any]
_PLACES = ("q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids")


def torch_flex(case: Case, arrays: Arrays, *, compiled: bool = True) -> Callable[[], Any]:
    """A call of the case on its own arrays, with gradients where the case has them; out is [B, T, H, d].

    The mask of blocks is made before the clock runs, as a model makes it once for all of its layers.

    Args:
        case: of attention, without a mask of pairs.
        arrays: its inputs.
        compiled: else step by step, which shows that the rules are the same and says nothing of speed.
    """
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = "cuda" if compiled else "cpu"
    window, soft_cap = (case.options.get(name) for name in ("window", "soft_cap"))
    q_positions, kv_positions, q_ids, kv_ids = (
        torch.from_numpy(np.array(arrays[name])).to(device) for name in _PLACES
    )

    def heads_first(name: str) -> Any:
        values = torch.from_numpy(np.array(arrays[name], np.float32)).to(device, torch.bfloat16)
        return values.transpose(1, 2).contiguous().requires_grad_(bool(case.gradients))

    def visible(b: Any, _h: Any, query: Any, key: Any) -> Any:
        distance = q_positions[b, query] - kv_positions[b, key]
        seen = (q_ids[b, query] == kv_ids[b, key]) & (kv_ids[b, key] != 0) & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    def capped(score: Any, _b: Any, _h: Any, _query: Any, _key: Any) -> Any:
        return score if soft_cap is None else soft_cap * torch.tanh(score / soft_cap)

    q, k, v = map(heads_first, "qkv")
    blocks = create_block_mask(visible, q.shape[0], None, q.shape[2], k.shape[2], device=device)
    attend = torch.compile(flex_attention) if compiled else flex_attention
    scale = case.options.get("scale")

    def call() -> Any:
        out = attend(q, k, v, score_mod=capped, block_mask=blocks, scale=scale, enable_gqa=True)
        if case.gradients:
            torch.autograd.grad(out.sum(), (q, k, v))
        return out.transpose(1, 2)

    return call

"""Which key a query sees: the one definition that every implementation shares."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool


class Marks(NamedTuple):
    """What decides, together with the window, which key a query sees.

    Attributes:
        q_positions: i32[B, T], position of each query in its document.
        kv_positions: i32[B, S], of each key.
        q_segment_ids: i32[B, T], document of each query; 0 = padding.
        kv_segment_ids: i32[B, S], of each key; 0 = padding or an empty slot.
        mask: bool[B, T, S], False hides a key; None hides none.
    """

    q_positions: Any
    kv_positions: Any
    q_segment_ids: Any
    kv_segment_ids: Any
    mask: Any = None


def visible(marks: Marks, window: int | None) -> Bool[Array, "B T S"]:
    """Same document, not padding, not later, within the window, and not hidden by the mask."""
    q_id, kv_id = marks.q_segment_ids[:, :, None], marks.kv_segment_ids[:, None, :]
    distance = marks.q_positions[:, :, None] - marks.kv_positions[:, None, :]
    seen = (q_id == kv_id) & (kv_id != 0) & (distance >= 0)
    seen = seen if window is None else seen & (distance < window)
    return seen if marks.mask is None else seen & marks.mask

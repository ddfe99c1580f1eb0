"""Which key a query sees: the one definition that every implementation shares."""

from jaxtyping import Array, Bool, Int


def visible(
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    window: int | None,
    mask: Bool[Array, "B T S"] | None,
) -> Bool[Array, "B T S"]:
    """Same document, not padding, not later, within the window, and not hidden by the mask."""
    q_id, kv_id = q_segment_ids[:, :, None], kv_segment_ids[:, None, :]
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    seen = (q_id == kv_id) & (kv_id != 0) & (distance >= 0)
    seen = seen if window is None else seen & (distance < window)
    return seen if mask is None else seen & mask

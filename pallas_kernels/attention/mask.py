"""Which key a query sees: the one definition that every implementation shares."""

from jaxtyping import Array, Bool, Int


def visible(
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Same document, not padding, not later, and within the window."""
    q_id, kv_id = q_segment_ids[:, :, None], kv_segment_ids[:, None, :]
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    seen = (q_id == kv_id) & (kv_id != 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)

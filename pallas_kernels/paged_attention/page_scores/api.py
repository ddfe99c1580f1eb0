"""Public entry of Quest's page scores."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import require, require_floats, require_integers, require_shape
from pallas_kernels.paged_attention.checks import check_scored


def page_scores(
    q: Float[Array, "B H d"],
    page_min: Float[Array, "P K d"],
    page_max: Float[Array, "P K d"],
    *,
    table: Int[Array, "B K n"],
    num_pages: Int[Array, "B K"],
    reduce: str = "max",
    debug: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B K n"] | Float[Array, "B H n"]:
    """``sum_c max(q_c min_c, q_c max_c)`` of each page: at least ``q . k`` for every key k of the page.

    Source: Quest (arXiv 2406.10774), algorithm 1. Scores are those of unscaled dot products: order is all that counts.

    Args:
        q: one query after RoPE per query head; head h uses KV head ``h // (H // K)``.
        page_min: least value of each channel over a page's keys, as they are attended to (after RoPE; dequantised).
        page_max: greatest value, likewise.
        table: physical page of each of a row's pages.
        num_pages: pages to score, from the first; the others score -inf and may hold anything, NaN included.
        reduce: "max" gives each KV head the greatest bound of its query heads (a bound of the group's best score);
            "none" keeps query heads apart.
        debug: check the values of ``table`` and ``num_pages`` as :func:`pallas_kernels.paged_attention.paged_attention`
            does. Without it an index out of range scores an arbitrary page.
        implementation: "auto", "xla" or "reference".

    Returns:
        float32 scores [B, K, n] for "max", [B, H, n] for "none".

    Raises:
        ValueError: a shape, a dtype, ``reduce`` or ``implementation`` is not as above, or K does not divide H.
    """
    require(q.ndim == 3, "q.shape", q.shape, "three dimensions [B, H, d]")
    B, H, d = q.shape
    require(min(q.shape) >= 1, "q.shape", q.shape, "at least one row, head and channel [B, H, d]")
    shape = page_min.shape
    require(len(shape) == 3 and shape[2] == d and min(shape) >= 1, "page_min.shape", shape, f"[P, K, {d}]")
    require_shape("page_max", page_max, shape, "P, K, d")
    K = shape[1]
    require(H % K == 0, "page_min.shape", shape, f"K = {K} (second) to divide H = {H}")
    require(table.ndim == 3 and table.shape[2] >= 1, "table.shape", table.shape, f"[{B}, {K}, n]")
    require_shape("table", table, (B, K, table.shape[2]), "B, K, n")
    require_shape("num_pages", num_pages, (B, K), "B, K")
    require_floats(q=q, page_min=page_min, page_max=page_max)
    require_integers(table=table, num_pages=num_pages)
    require(reduce in ("max", "none"), "reduce", reduce, "'max' or 'none'")
    if debug:
        check_scored(shape[0], table, num_pages)
    options = {"table": table, "num_pages": num_pages, "reduce": reduce}
    module = dispatch.choose("paged_attention.page_scores", implementation, q, page_min, page_max, **options)
    return module.run(q, page_min, page_max, **options)

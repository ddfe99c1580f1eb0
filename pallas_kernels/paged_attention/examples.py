"""Random calls of paged attention at given shapes, as the cases of its kernels."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Case
from pallas_kernels.paged_attention.api import OpenTail, paged_attention
from pallas_kernels.paged_attention.quantized import QuantizedPages, quantize_pages
from pallas_kernels.paged_attention.selection import indices, translate


def call(
    *,
    implementation,
    k_tail=None,
    v_tail=None,
    tail_length=None,
    tail_positions=None,
    bits=0,
    k_scale=None,
    k_offset=None,
    v_scale=None,
    v_offset=None,
    k_pages,
    v_pages,
    **arguments,
):
    """``paged_attention``, its output, log-sum-exp and mass where asked; tail and quantised pages as named arrays."""
    if bits:
        k_pages = QuantizedPages(k_pages, k_scale, k_offset, bits)
        v_pages = QuantizedPages(v_pages, v_scale, v_offset, bits)
    tail = None if k_tail is None else OpenTail(k_tail, v_tail, tail_length, tail_positions)
    arguments |= {"k_pages": k_pages, "v_pages": v_pages, "tail": tail}
    found = paged_attention(**arguments, implementation=implementation)
    return found.out, found.lse, found.mass


def draw(
    key,
    *,
    B: int,
    H: int,
    K: int,
    d: int,
    page: int,
    n: int,
    W: int = 1,
    t: int = 0,
    kept: int = 0,
    full: bool = True,
    bits: int = 0,
    per_channel: bool = False,
    granularity: str = "page",
):
    """Permuted pages; ``kept`` of each row's pages or tokens selected (0: no selection); rows full, or of any length.

    ``bits`` 0: plain pages; ``per_channel``: scales of keys.
    """
    keys = jax.random.split(key, 9)
    P = B * n + 1

    def normal(index, *shape):
        return jax.random.normal(keys[index], shape, jnp.bfloat16)

    pages = jnp.broadcast_to(jax.random.permutation(keys[3], P)[: B * n].reshape(B, 1, n), (B, K, n))
    least = n * page if full else 0
    kv_len = jax.random.randint(keys[4], (B, K), least, n * page + 1)
    start = jnp.max(kv_len, axis=1)
    length = jnp.full((B,), max(t, W if t else 0), jnp.int32)
    arrays = {
        "q": normal(0, B, W, H, d),
        "k_pages": normal(1, P, K, page, d),
        "v_pages": normal(2, P, K, page, d),
        "table": pages.astype(jnp.int32),
        "kv_len": kv_len,
        "q_positions": (start + (t or W))[:, None] + jnp.arange(-W, 0),
    }
    if t:
        arrays |= {
            "k_tail": normal(5, B, K, t, d),
            "v_tail": normal(6, B, K, t, d),
            "tail_length": length,
            "tail_positions": start[:, None] + jnp.arange(t),
        }
    for name in ("k", "v") if bits else ():
        by_channel = per_channel and name == "k"
        pool = quantize_pages(arrays[f"{name}_pages"], bits=bits, per_channel=by_channel)
        arrays |= {f"{name}_pages": pool.codes, f"{name}_scale": pool.scale, f"{name}_offset": pool.offset}
    if kept:
        size = n if granularity == "page" else n * page
        order = jax.vmap(jax.vmap(partial(jax.random.permutation, x=size)))(jax.random.split(keys[7], (B, K)))
        logical = order[..., :kept].astype(jnp.int32)
        arrays |= {
            "logical": logical,
            "table": translate(arrays["table"], logical, page=page, granularity=granularity),
        }
    return arrays


def padding(arrays, granularity: str = "page"):
    """Tokens of the pools that no query may be influenced by: not selected, behind a row's length, in pages of nobody."""
    P, K, page, _ = arrays["k_pages"].shape
    table, kv_len = arrays["table"], arrays["kv_len"]
    token = indices(table.shape, page, arrays.get("logical"), None, granularity)
    there = (token >= 0) & (token < kv_len[..., None, None])
    heads = jnp.arange(K)[:, None, None]
    read = jnp.zeros((P, K, page), bool).at[table[..., None], heads, token % page].max(there)
    names = ("k_pages", "v_pages", "k_scale", "k_offset", "v_scale", "v_offset")

    def unread(array):
        of_page = array.shape[2] == 1 < page
        return ~read.any(axis=2)[..., None, None] if of_page else ~read[..., None]

    return {name: unread(arrays[name]) for name in names if name in arrays}


def _bytes(shape: dict, keys: int, mass: bool) -> float:
    """Bytes of the keys and values that a call reads, keys twice where their mean probability is wanted."""
    bits, d, single = shape.get("bits", 0), shape["d"], shape.get("granularity") == "token"
    if not bits:
        return keys * (3 if mass else 2) * 2.0 * d
    value = d * bits / 8 + 4
    key = d * bits / 8 + 4 * d / (1 if single else shape["page"]) if shape.get("per_channel") else value
    return keys * (value + (2 if mass else 1) * key)


def case(name: str, stands_for: str, registers: int = 208, options: dict | None = None, **shape) -> Case:
    """One case; its bytes are those of the keys and values that are read."""
    bits = shape.get("bits", 0)
    B, K, d, W, H = (shape.get(x, 1) for x in ("B", "K", "d", "W", "H"))
    single = shape.get("granularity") == "token"
    sealed = (shape.get("kept") or shape["n"]) * (1 if single else shape["page"])
    keys = B * K * (sealed + shape.get("t", 0))
    mass = bool((options or {}).get("return_mass"))
    return Case(
        name=name,
        op="paged_attention",
        function=call,
        inputs=partial(draw, **shape),
        options={
            **(options or {}),
            **({"bits": bits} if bits else {}),
            **({"granularity": "token"} if single else {}),
        },
        implementations=("triton",) if single else ("mosaic_gpu",),
        padding=partial(padding, granularity=shape.get("granularity", "page")),
        stands_for=stands_for,
        # Codes are taken apart in registers, and 256 channels fill half of them.
        registers=255 if bits or d > 128 else registers,
        small=name.startswith("small"),
        flops=(6.0 if mass else 4.0) * keys * (H // K) * W * d,
        bytes_moved=_bytes(shape, keys, mass),
    )

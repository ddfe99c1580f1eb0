"""What is proven, tuned and measured of paged attention: small calls that exercise it, and decode at the presets' shapes."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Case
from pallas_kernels.paged_attention.api import OpenTail, paged_attention
from pallas_kernels.paged_attention.quantized import QuantizedPages, quantize_pages
from pallas_kernels.paged_attention.selection import translate


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
    """``paged_attention``, its output and log-sum-exp; tail and quantised pages as named arrays."""
    if bits:
        k_pages = QuantizedPages(k_pages, k_scale, k_offset, bits)
        v_pages = QuantizedPages(v_pages, v_scale, v_offset, bits)
    tail = None if k_tail is None else OpenTail(k_tail, v_tail, tail_length, tail_positions)
    arguments |= {"k_pages": k_pages, "v_pages": v_pages, "tail": tail}
    found = paged_attention(**arguments, implementation=implementation)
    return found.out, found.lse


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
):
    """Permuted pages; ``kept`` of each row's n pages selected (0: no selection); rows full, or of any length.

    ``bits`` 0: plain pages.
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
        pool = quantize_pages(arrays[f"{name}_pages"], bits=bits)
        arrays |= {f"{name}_pages": pool.codes, f"{name}_scale": pool.scale, f"{name}_offset": pool.offset}
    if kept:
        order = jax.vmap(jax.vmap(partial(jax.random.permutation, x=n)))(jax.random.split(keys[7], (B, K)))
        logical = order[..., :kept].astype(jnp.int32)
        arrays |= {
            "logical": logical,
            "table": translate(arrays["table"], logical, page=page, granularity="page"),
        }
    return arrays


def padding(arrays):
    """Tokens of the pools that no query may be influenced by: those behind a row's length, and pages of nobody."""
    P, K, page, _ = arrays["k_pages"].shape
    table, kv_len = arrays["table"], arrays["kv_len"]
    logical = arrays.get("logical", jnp.broadcast_to(jnp.arange(table.shape[2]), table.shape))
    there = logical[..., None] * page + jnp.arange(page) < kv_len[..., None, None]
    heads = jnp.broadcast_to(jnp.arange(K)[:, None], table.shape)
    read = jnp.zeros((P, K, page), bool).at[table, heads].max(there)
    names = ("k_pages", "v_pages", "k_scale", "k_offset", "v_scale", "v_offset")
    return {name: ~read[..., None] for name in names if name in arrays}


def _case(name: str, stands_for: str, registers: int = 208, options: dict | None = None, **shape) -> Case:
    """One case; its bytes are those of the keys and values that are read."""
    bits = shape.get("bits", 0)
    B, K, d, W, H = (shape.get(x, 1) for x in ("B", "K", "d", "W", "H"))
    keys = B * K * ((shape.get("kept") or shape["n"]) * shape["page"] + shape.get("t", 0))
    return Case(
        name=name,
        op="paged_attention",
        function=call,
        inputs=partial(draw, **shape),
        options={**(options or {}), **({"bits": bits} if bits else {})},
        padding=padding,
        stands_for=stands_for,
        # Codes are taken apart in registers.
        registers=255 if bits else registers,
        small=name.startswith("small"),
        flops=4.0 * keys * (H // K) * W * d,
        bytes_moved=2.0 * keys * (d * bits / 8 + 4 if bits else 2 * d),
    )


_SMALL = {"B": 2, "H": 4, "K": 2, "full": False}
CASES = [
    _case("small page16 d64", "several pages a tile, odd lengths", d=64, page=16, n=7, **_SMALL),
    _case("small page32 selected", "a selection of pages", d=64, page=32, n=5, kept=3, **_SMALL),
    _case("small page64 d128 tail W5", "a window with an open tail", d=128, page=64, n=2, W=5, t=9, **_SMALL),
    _case(
        "small window and soft cap",
        "sliding window, soft cap, two tiles of query rows",
        d=64,
        page=16,
        n=7,
        W=40,
        options={"window": 50, "soft_cap": 3.0},
        **_SMALL,
    ),
    _case("small 8 bits", "8-bit pages", d=64, page=64, n=3, bits=8, **_SMALL),
    _case("small 4 bits", "4-bit pages, tail", d=128, page=64, n=2, bits=4, t=9, **_SMALL),
    _case(
        "small 4 bits d64 selected",
        "a selection of 4-bit pages",
        d=64,
        page=64,
        n=3,
        kept=2,
        bits=4,
        **_SMALL,
    ),
    _case("8B decode 32k", "llama_3_1_8b decode", B=8, H=32, K=8, d=128, page=64, n=512, t=80),
    _case("8B decode 32k page16", "llama_3_1_8b decode", B=8, H=32, K=8, d=128, page=16, n=2048, t=32),
    _case("8B decode 32k one row", "llama_3_1_8b decode, batch 1", B=1, H=32, K=8, d=128, page=64, n=512),
    _case("8B window 8 32k", "llama_3_1_8b verifying", B=8, H=32, K=8, d=128, page=64, n=512, W=8, t=80),
    _case(
        "8B Quest 64k",
        "llama_3_1_8b, 256 of 4096 pages",
        B=8,
        H=32,
        K=8,
        d=128,
        page=16,
        n=4096,
        kept=256,
        t=32,
    ),
    _case("Nano decode 32k", "nemotron_3_nano_30b_a3b decode", B=16, H=32, K=2, d=128, page=64, n=512, t=80),
    _case("Jet 2B decode 64k", "jet_nemotron_2b decode", B=16, H=12, K=2, d=128, page=64, n=1024, t=80),
    _case("Jet 4B decode 64k", "jet_nemotron_4b decode", B=16, H=16, K=2, d=128, page=64, n=1024, t=80),
    _case("1B decode 8k d64", "llama_3_2_1b decode", B=32, H=32, K=8, d=64, page=32, n=256),
    _case("8B decode 32k 8 bits", "llama_3_1_8b decode", B=8, H=32, K=8, d=128, page=64, n=512, t=80, bits=8),
    _case("8B decode 32k 4 bits", "llama_3_1_8b decode", B=8, H=32, K=8, d=128, page=64, n=512, t=80, bits=4),
    _case(
        "Nano decode 32k 4 bits",
        "nemotron_3_nano_30b_a3b decode",
        B=16,
        H=32,
        K=2,
        d=128,
        page=64,
        n=512,
        bits=4,
    ),
]

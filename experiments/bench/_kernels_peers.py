"""Whom the GPU kernels are held against, and why a peer cannot take a case: a missing package is a line of the table."""

import importlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench._kernels_flex import torch_flex
from pallas_kernels import compat
from pallas_kernels.cases import Case
from pallas_kernels.target import target
from pallas_kernels.timing import seconds

Arrays = dict[str, Any]
# From the inputs and the repeats to seconds, or why there is none.
Peer = Callable[[Arrays, int], float] | str
# Block sizes of queries and keys that JAX's example is tried with there; the best counts.
_MGPU_TILES = ((64, 256), (64, 128), (64, 64))


def _absent(*modules: str) -> str | None:
    """Why one of the modules cannot be imported; None where all can."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # a package for another JAX may fail in any way
            return f"{name} cannot be imported ({type(error).__name__}: {error})".splitlines()[0][:160]
    return None


def _causal(forward: Callable[..., Any], gradients: bool) -> Callable[[Arrays], Any]:
    """A call on q, k, v, with their gradients where they are asked for."""

    def call(arrays: Arrays) -> Any:
        q, k, v = (arrays[name] for name in "qkv")
        if not gradients:
            return forward(q, k, v)
        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(jnp.ones_like(out))

    return call


def torch_sdpa(case: Case) -> Callable[[], Any]:
    """``scaled_dot_product_attention`` of torch, causal by row: its masks know no documents."""
    import torch

    shapes = case.avals()
    device = "cuda" if target().platform == "cuda" else "cpu"

    def heads_first(name: str) -> Any:
        B, T, H, d = shapes[name].shape
        draw = torch.randn(B, H, T, d, dtype=torch.bfloat16, device=device)
        return draw.requires_grad_(bool(case.gradients))

    q, k, v = map(heads_first, "qkv")

    def call() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if case.gradients:
            torch.autograd.grad(out.sum(), (q, k, v))
        return out

    return call


def _torch_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of device events, the second-level cache written over between calls."""
    import torch

    flush = torch.empty(2**27, dtype=torch.uint8, device="cuda")
    call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _cudnn(case: Case) -> Peer:
    """cuDNN's causal attention by row index, the fastest it has: a bound for calls of one document, not the same op."""
    if compat.cudnn_version() is None:
        return "no cuDNN is installed"

    def forward(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    call = _causal(forward, bool(case.gradients))
    return lambda arrays, n: seconds(call, arrays, repeats=n)


def _no_torch() -> str | None:
    """Why torch cannot take a case on a GPU; None where it can."""
    reason = _absent("torch")
    if reason is not None:
        return reason
    return None if importlib.import_module("torch").cuda.is_available() else "torch sees no GPU"


def _torch(case: Case) -> Peer:
    return _no_torch() or (lambda _arrays, n: _torch_seconds(torch_sdpa(case), n))


def _torch_compiled(case: Case) -> Peer:
    return _no_torch() or (lambda arrays, n: _torch_seconds(torch_flex(case, arrays), n))


def _pallas_attention(case: Case) -> Peer:
    """JAX's example of a Mosaic kernel, causal by row; it does not scale the scores, which costs no time."""
    name = "jax.experimental.pallas.ops.gpu.attention_mgpu"
    reason = _absent(name)
    if reason is not None:
        return reason
    if case.gradients:
        return "its backward pass has no causal mask"
    module = importlib.import_module(name)

    def best(arrays: Arrays, repeats: int) -> float:
        times, errors = [], []
        for block_q, block_kv in _MGPU_TILES:
            config = module.TuningConfig(
                block_q=block_q, block_kv=block_kv, max_concurrent_steps=2, causal=True
            )
            call = _causal(lambda q, k, v, config=config: module.attention(q, k, v, config), False)
            try:
                times.append(seconds(call, arrays, repeats=repeats))
            except Exception as error:  # a tile that does not fit
                errors.append(error)
        if not times:
            raise errors[0]
        return min(times)

    return best


def _jla_attention(case: Case) -> Peer:
    """jax-linear-attention's Mosaic kernel: causal, documents by segment id."""
    name = "jla.ops.mosaic_gpu.attention"
    reason = _absent(name)
    if reason is not None:
        return reason
    module = importlib.import_module(name)
    window = case.options.get("window")

    def call(arrays: Arrays) -> Any:
        ids = arrays["q_segment_ids"]

        def forward(q: Any, k: Any, v: Any) -> Any:
            return module.flash_attention(q, k, v, segment_ids=ids, sliding_window=window)

        return _causal(forward, bool(case.gradients))(arrays)

    return lambda arrays, n: seconds(call, arrays, repeats=n)


def _attention_peers(case: Case) -> dict[str, Peer]:
    by_row = documents = pairs = None
    if "mask" in case.avals():
        by_row = documents = pairs = "it has no mask of pairs"
    elif case.avals()["q"].shape[1] != case.avals()["k"].shape[1]:
        by_row = documents = "it is causal by row index, and there are fewer queries than keys"
    elif case.options.get("soft_cap") is not None:
        by_row = documents = "it has no soft cap"
    elif case.options.get("window") is not None:
        by_row = "it has no window by position"
    return {
        "cuDNN, causal by row": by_row or _cudnn(case),
        "torch SDPA": by_row or _torch(case),
        "torch.compile, flex_attention": pairs or _torch_compiled(case),
        "pallas.ops.gpu attention_mgpu, causal by row": by_row or _pallas_attention(case),
        "jax-linear-attention": documents or _jla_attention(case),
    }


def _pallas_paged(case: Case) -> Peer:
    """JAX's example of paged attention (Triton): one query a row, the same pages for every head, no open tail."""
    avals = case.avals()
    if avals["q"].shape[1] != 1:
        return "it takes one query a row"
    if avals["k_pages"].dtype != jnp.bfloat16:
        return "its scales are multiplied in before the product, and of 8 bits only"
    if "logical" in avals or case.options.get("window") is not None:
        return "it has no selection and no window"
    name = "jax.experimental.pallas.ops.gpu.paged_attention"
    reason = _absent(name)
    if reason is not None:
        return reason
    module = importlib.import_module(name)
    pages = avals["table"].shape[2]
    splits = next(n for n in (16, 8, 4, 2, 1) if pages % n == 0)
    block = next(n for n in (8, 4, 2, 1) if pages // splits % n == 0)

    def run(arrays: Arrays, repeats: int) -> float:
        # Laid out as it wants it, before the clock runs.
        pools = [jnp.swapaxes(arrays[name], 0, 1) for name in ("k_pages", "v_pages")]
        rows = arrays["q"][:, 0], *pools, arrays["table"][:, 0], arrays["kv_len"][:, 0]

        def call(q: Any, k: Any, v: Any, table: Any, lengths: Any) -> Any:
            return module.paged_attention(
                q, k, v, table, lengths, k_splits=splits, pages_per_compute_block=block
            )

        return seconds(call, *rows, repeats=repeats)

    return run


def _dense(case: Case) -> Peer:
    """The product of bfloat16 that stands for a quantised one: what quantising has to beat."""
    avals = case.avals()
    (M, K), N = avals["x"].shape, avals["codes"].shape[0]

    def run(_arrays: Arrays, repeats: int) -> float:
        x, w = (jnp.ones(shape, jnp.bfloat16) for shape in ((M, K), (N, K)))
        return seconds(lambda x, w: jnp.einsum("mk,nk->mn", x, w), x, w, repeats=repeats)

    return run


def peers(case: Case) -> dict[str, Peer]:
    """Contenders by name."""
    found: dict[str, Peer] = {"xla": lambda arrays, n: seconds(case.call("xla"), arrays, repeats=n)}
    if case.op == "attention":
        found |= _attention_peers(case)
    if case.op == "paged_attention":
        found["pallas.ops.gpu paged_attention, sealed pages only"] = _pallas_paged(case)
    if case.op == "quantized_matmul":
        found["a product of bfloat16"] = _dense(case)
    return found

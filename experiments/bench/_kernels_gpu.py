"""The cases of every op on a GPU: time, share of the bound measured in the same run, and peers."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, dispatch
from pallas_kernels.cases import Case
from pallas_kernels.target import target
from pallas_kernels.timing import seconds

Call = Callable[[dict[str, Any]], Any]


def bounds(repeats: int, size: int = 8192, megabytes: int = 2048) -> dict[str, float]:
    """What this device reaches: FLOP/s of a bfloat16 product and bytes/s of a copy (each byte read and written)."""
    a = jnp.ones((size, size), jnp.bfloat16)
    product = seconds(
        lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32).astype(a.dtype), a, repeats=repeats
    )
    words = jnp.zeros(megabytes * 2**18, jnp.int32)
    copy = seconds(lambda w: w + 1, words, repeats=repeats)
    return {"flops_per_s": 2 * size**3 / product, "bytes_per_s": 2 * words.nbytes / copy}


def least(case: Case, reached: dict[str, float]) -> float | None:
    """Seconds that the case must take at what the device reaches; None where it counts neither FLOPs nor bytes."""
    times = [
        amount / reached[name]
        for amount, name in ((case.flops, "flops_per_s"), (case.bytes_moved, "bytes_per_s"))
        if amount is not None
    ]
    return max(times, default=None)


def _torch_attention(case: Case) -> Call:
    """``scaled_dot_product_attention`` of torch, causal by row: its masks know no documents."""
    import torch

    shapes = case.avals()
    device = "cuda" if target().platform == "cuda" else "cpu"

    def heads_first(name: str) -> Any:
        B, T, H, d = shapes[name].shape
        return torch.randn(
            B, H, T, d, dtype=torch.bfloat16, device=device, requires_grad=bool(case.gradients)
        )

    q, k, v = map(heads_first, "qkv")

    def call(_arrays: dict[str, Any]) -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if case.gradients:
            torch.autograd.grad(out.sum(), (q, k, v))
        return out

    return call


def _torch_seconds(call: Call, repeats: int) -> float:
    """Median of device events, the second-level cache written over between calls."""
    import statistics

    import torch

    flush = torch.empty(2**27, dtype=torch.uint8, device="cuda")
    call({})
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call({})
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _cudnn_attention(case: Case) -> Call:
    """cuDNN's causal attention by row index, the fastest it has: a bound for calls of one document, not the same op."""

    def forward(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def call(arrays: dict[str, Any]) -> Any:
        q, k, v = (arrays[name] for name in "qkv")
        if not case.gradients:
            return forward(q, k, v)
        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(jnp.ones_like(out))

    return call


def peers(case: Case) -> dict[str, Callable[[dict[str, Any], int], float] | str]:
    """Contenders by name: from the inputs and the repeats to seconds, or why there is none."""
    found: dict[str, Any] = {"xla": lambda arrays, n: seconds(case.call("xla"), arrays, repeats=n)}
    if case.op != "attention":
        return found
    reason = None
    if case.options.get("soft_cap") is not None or case.options.get("window") is not None:
        reason = "it has no soft cap, and no window by position"
    elif case.avals()["q"].shape[1] != case.avals()["k"].shape[1]:
        reason = "it is causal by row index, and there are fewer queries than keys"
    if compat.cudnn_version() is None:
        found["cuDNN, causal by row"] = "no cuDNN is installed"
    else:
        found["cuDNN, causal by row"] = reason or (
            lambda arrays, n: seconds(_cudnn_attention(case), arrays, repeats=n)
        )
    if importlib.util.find_spec("torch") is None:
        found["torch SDPA"] = "torch is not installed"
    elif not importlib.import_module("torch").cuda.is_available():
        found["torch SDPA"] = "torch sees no GPU"
    else:
        found["torch SDPA"] = reason or (lambda arrays, n: _torch_seconds(_torch_attention(case), n))
    return found


def measure(case: Case, implementation: str, reached: dict[str, float], repeats: int) -> dict[str, Any]:
    """One case through one implementation, beside its peers, as plain JSON values."""
    arrays = jax.jit(case.inputs)(jax.random.key(0))
    own = seconds(case.call(implementation), arrays, repeats=repeats)
    bound = least(case, reached)
    others: dict[str, Any] = {}
    for name, contender in peers(case).items():
        try:
            others[name] = contender if isinstance(contender, str) else contender(arrays, repeats)
        except Exception as error:  # a peer that fails is a line of the table, not the end of the run
            others[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return {
        "op": case.op,
        "case": case.name,
        "stands_for": case.stands_for,
        "implementation": implementation,
        "seconds": own,
        "flops": case.flops,
        "bytes": case.bytes_moved,
        "bound_share": None if bound is None else bound / own,
        "peers": others,
    }


def run(cases: list[Case], repeats: int, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Every case that fits this device.

    Raises:
        RuntimeError: none does.
    """
    device = target()
    work = [
        (case, name)
        for case in cases
        for name in case.implementations
        if dispatch.unfit(name, device) is None
    ]
    if not work:
        raise RuntimeError(f"no kernel is made for this device ({device.kind})")
    reached = bounds(repeats)
    results = []
    for case, name in work:
        results.append(measure(case, name, reached, repeats))
        show(results[-1])
    return {"device": device.kind, "jax": compat.JAX, "bounds": reached, "results": results}

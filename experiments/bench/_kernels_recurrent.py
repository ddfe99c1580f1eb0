"""Recurrent ops and short convolutions on the CPU beside torch's forms, at the widths of presets, as in ``_kernels_torch``.

torch's forms are those of transformers (the chunked scan and the step of Mamba-2, the chunked and the recurrent gated delta
rule, ``conv1d``), which compute in float32 whatever their inputs; of the chunks they may take, the one that is fastest here.
The convolution with a kernel per token has none there: the sum over unfolded inputs stands for it.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench._kernels_torch import DTYPES, Pair
from pallas_kernels.cases import Case
from pallas_kernels.causal_conv import cases as conv_cases
from pallas_kernels.causal_conv.step import cases as conv_steps
from pallas_kernels.dynamic_conv import cases as dynamic_cases
from pallas_kernels.gated_delta import cases as delta_cases
from pallas_kernels.gated_delta.step import cases as delta_steps
from pallas_kernels.ssd import cases as ssd_cases
from pallas_kernels.ssd.step import cases as ssd_steps

Tensors = dict[str, Any]
Form = Callable[..., Any]

# Heads, groups, channels of a head and of its state.
SSD = {"Nano": (64, 8, 64, 128), "8B": (128, 8, 64, 128)}
# Heads of keys and of values, channels of either.
DELTA = {"Jet 2B": (12, 12, 96, 256), "Jet 4B": (16, 16, 128, 256)}
CONV = {"Nano": 6144, "8B": 10240}
DYNAMIC = {"Jet 2B": 3072}
# Chunks that torch's forms are given: those of Mamba-2's and the gated delta rule's presets, and a smaller one.
SSD_CHUNKS, DELTA_CHUNKS = (64, 128, 256), (32, 64)
# Which axes torch wants the other way round.
TURNED = {
    "causal_conv": {"x": (1, 2), "weight": (0, 1)},
    "dynamic_conv": {"kernels": (2, 3)},
    "causal_conv.step": {"weight": (0, 1), "pool": (1, 2)},
}


def _ssd(t: Tensors, chunk: int) -> Any:
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    return mamba2_chunk_scan(t["x"], t["dt"], t["A"], t["B"], t["C"], chunk_size=chunk, D=t["D"])


def _ssd_step(t: Tensors) -> Any:
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_selective_state_update

    rows, H, P = t["x"].shape
    # As its mixer hands them over: widened to the shape of the states, without a copy.
    dt, D = t["dt"][..., None].expand(rows, H, P), t["D"][:, None].expand(H, P)
    A = t["A"][:, None, None].expand(H, *t["pool"].shape[2:])
    return mamba2_selective_state_update(t["pool"], t["x"], dt, A, t["B"], t["C"], D=D)


def _delta(t: Tensors, chunk: int) -> Any:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    # It scales the queries by itself.
    return torch_chunk_gated_delta_rule(
        t["q"] * t["q"].shape[-1] ** 0.5, t["k"], t["v"], t["g"], t["beta"], chunk_size=chunk
    )[0]


def _delta_step(t: Tensors) -> Any:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    q, k, v, g, beta = (t[name][:, None] for name in ("q", "k", "v", "g", "beta"))
    o, t["pool"] = torch_recurrent_gated_delta_rule(
        q * q.shape[-1] ** 0.5, k, v, g, beta, initial_state=t["pool"], output_final_state=True
    )
    return o[:, 0]


def _conv(t: Tensors) -> Any:
    from transformers.models.nemotron_h.modeling_nemotron_h import causal_conv1d_fn

    return causal_conv1d_fn(t["x"], t["weight"], t["bias"], activation="silu").transpose(1, 2)


def _conv_step(t: Tensors) -> Any:
    from transformers.models.nemotron_h.modeling_nemotron_h import causal_conv1d_update

    return causal_conv1d_update(t["x"][..., None], t["pool"], t["weight"], t["bias"], activation="silu")[
        ..., 0
    ]


def _dynamic(t: Tensors) -> Any:
    import torch

    taps = t["kernels"].shape[-1]
    window = torch.nn.functional.pad(t["x"], (0, 0, taps - 1, 0)).unfold(1, taps, 1)
    return torch.nn.functional.silu((window * t["kernels"]).sum(-1))


def _drawn(case: Case, dtype: str) -> dict[str, jax.Array]:
    """Inputs of one document a row and of idle rows nowhere; what the case has in bfloat16 in ``dtype``."""
    made = jax.jit(case.inputs)(jax.random.key(0))
    kept = {name: a for name, a in made.items() if name not in ("initial_state", "slots", "fresh")}
    return {name: a.astype(dtype) if a.dtype == jnp.bfloat16 else a for name, a in kept.items()}


def _to_torch(case: Case, arrays: dict[str, jax.Array]) -> Tensors:
    """Copies, laid out as torch's form wants them."""
    import torch

    found = {}
    for name, a in arrays.items():
        tensor = torch.from_numpy(np.array(a, np.float32)).to(getattr(torch, a.dtype.name))
        found[name] = _turned(case, name, tensor).contiguous()
    return found


def _turned(case: Case, name: str, tensor: Any) -> Any:
    axes = TURNED.get(case.op, {}).get(name)
    return tensor if axes is None else tensor.transpose(*axes)


def _fastest(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """The call whose second run takes least."""

    def second(call: Callable[[], Any]) -> float:
        call()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return calls[0] if len(calls) == 1 else min(calls, key=second)


def _work(case: Case, dtype: str) -> dict[str, float | None]:
    """FLOPs and bytes of a case that is stated for bfloat16."""
    wide = jnp.dtype(dtype).itemsize / 2
    return {"flops": case.flops, "bytes": None if case.bytes_moved is None else wide * case.bytes_moved}


def _calls(
    make: Callable[..., Case], name: str, dtype: str, form: Form, chunks: tuple[int, ...] = ()
) -> Iterator[Pair]:
    """The outputs, and the gradients of their sum by all inputs; ``make`` takes the gradients that the work counts."""
    import torch

    case = make()
    arrays = _drawn(case, dtype)
    tensors = _to_torch(case, arrays)
    options = {}
    if "operand_dtype" in case.options:
        options["operand_dtype"] = None if dtype == "float32" else jnp.bfloat16
    forms = [partial(form, chunk=chunk) for chunk in chunks] or [form]

    def forward(arrays: dict[str, jax.Array]) -> jax.Array:
        return case.function(**arrays, **options)[0]

    def plain(one: Form) -> Any:
        with torch.no_grad():
            return one(tensors)

    run = jax.jit(forward)
    yield Pair(
        name,
        dtype,
        "forward",
        lambda: jax.block_until_ready(run(arrays)),
        _fastest([partial(plain, one) for one in forms]),
        **_work(case, dtype),
    )
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    # A list: jit sorts the names of a dictionary.
    grad = jax.grad(lambda arrays: jnp.sum(forward(arrays), dtype=jnp.float32))
    both = jax.jit(lambda arrays: [g for _, g in sorted(grad(arrays).items())])

    def gradients(one: Form) -> list[Any]:
        found = torch.autograd.grad(one(leaves).float().sum(), list(leaves.values()))
        return [_turned(case, key, g) for key, g in sorted(zip(leaves, found, strict=True))]

    yield Pair(
        name,
        dtype,
        "forward and backward",
        lambda: jax.block_until_ready(both(arrays)),
        _fastest([partial(gradients, one) for one in forms]),
        **_work(make(gradients=tuple(arrays)), dtype),
    )


def _step(name: str, case: Case, form: Form) -> Pair:
    """One token a row in float32, states in slots that both libraries move on in place or hand on."""
    import torch

    arrays = _drawn(case, "float32")
    tensors = _to_torch(case, arrays)
    pool = arrays.pop("pool")
    run = jax.jit(lambda arrays, pool: case.function(**arrays, pool=pool), donate_argnums=1)

    def ours() -> jax.Array:
        nonlocal pool
        y, pool = run(arrays, pool)
        jax.block_until_ready(pool)
        return y

    def theirs() -> Any:
        with torch.no_grad():
            return form(tensors)

    return Pair(name, "float32", "decode", ours, theirs, flops=case.flops, bytes=case.bytes_moved)


def scans(quick: bool) -> Iterator[Pair]:
    """SSD and its step."""
    for preset, (H, G, P, N) in ({"small": (4, 2, 64, 64)} if quick else SSD).items():
        T = 160 if quick else 1024
        name = f"ssd {preset} B1 T{T}"
        make = partial(ssd_cases.case, name, 1, T, H, G, P, N)
        for dtype in DTYPES:
            yield from _calls(make, name, dtype, _ssd, SSD_CHUNKS[:1] if quick else SSD_CHUNKS)
        for B in (2,) if quick else (1, 64):
            name = f"ssd.step {preset} B{B}"
            yield _step(name, ssd_steps.case(name, B, B, H, G, P, N, dtype=jnp.float32), _ssd_step)


def delta_rules(quick: bool) -> Iterator[Pair]:
    """The gated delta rule and its step."""
    for preset, (H, Hv, dk, dv) in ({"small": (1, 2, 64, 64)} if quick else DELTA).items():
        T = 160 if quick else 1024
        name = f"gated_delta {preset} B1 T{T}"
        make = partial(delta_cases.case, name, 1, T, H, Hv, dk, dv)
        for dtype in DTYPES:
            yield from _calls(make, name, dtype, _delta, DELTA_CHUNKS[1:] if quick else DELTA_CHUNKS)
        for B in (2,) if quick else (1, 64):
            name = f"gated_delta.step {preset} B{B}"
            yield _step(name, delta_steps.case(name, B, B, H, Hv, dk, dv, dtype=jnp.float32), _delta_step)


def convolutions(quick: bool) -> Iterator[Pair]:
    """The short convolution and its step."""
    for preset, D in ({"small": 128} if quick else CONV).items():
        T = 64 if quick else 2048
        name = f"causal_conv {preset} B1 T{T}"
        for dtype in DTYPES:
            yield from _calls(partial(conv_cases.case, name, 1, T, D, None), name, dtype, _conv)
        for B in (2,) if quick else (1, 64):
            name = f"causal_conv.step {preset} B{B}"
            yield _step(name, conv_steps.case(name, B, B, D, dtype=jnp.float32), _conv_step)


def dynamic_convolutions(quick: bool) -> Iterator[Pair]:
    """The convolution with a kernel per token."""
    for preset, D in ({"small": 128} if quick else DYNAMIC).items():
        T = 64 if quick else 2048
        name = f"dynamic_conv {preset} B1 T{T}"
        for dtype in DTYPES:
            yield from _calls(partial(dynamic_cases.case, name, 1, T, D, None), name, dtype, _dynamic)

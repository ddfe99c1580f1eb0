"""Which implementation of an op runs.

Implementations are modules ``pallas_kernels.<op>.<implementation>``, imported at their first use. Each has
``run`` (the op, arguments already checked), ``supports`` (same arguments; None, or the reason why not) and
``REASON`` (why ``auto`` takes it). What runs on some devices only is asked there, and ``auto`` takes it only with a
pass record of its device tests (``pallas_kernels.records``); a kernel of Triton on Hopper and later only.
"""

import contextlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import jax

from pallas_kernels import records
from pallas_kernels.target import Target, target

# Fastest first: ``auto`` takes the first that fits the device, is verified on it, and supports the call.
IMPLEMENTATIONS = {
    "attention": ("mosaic_gpu", "cudnn", "xla", "reference"),
    "causal_conv": ("mosaic_gpu", "xla", "reference"),
    "causal_conv.step": ("mosaic_gpu", "xla", "reference"),
    "causal_conv.window": ("xla", "reference"),
    "dynamic_conv": ("mosaic_gpu", "xla", "reference"),
    "gated_delta": ("mosaic_gpu", "xla", "reference"),
    "gated_delta.step": ("mosaic_gpu", "xla", "reference"),
    "gated_delta.window": ("xla", "reference"),
    "grouped_matmul": ("mosaic_gpu", "xla", "reference"),
    "norm_quant": ("mosaic_gpu", "xla", "reference"),
    "paged_attention": ("mosaic_gpu", "triton", "xla", "reference"),
    "paged_attention.page_scores": ("xla", "reference"),
    "quantized_matmul": ("mosaic_gpu", "xla", "reference"),
    "segmented_matmul": ("mosaic_gpu", "xla", "reference"),
    "ssd": ("mosaic_gpu", "xla", "reference"),
    "ssd.step": ("mosaic_gpu", "xla", "reference"),
    "ssd.window": ("xla", "reference"),
}
# These run wherever XLA does.
EVERYWHERE = ("xla", "reference")
# Kernels are tuned and verified from this generation on. Before it ``auto`` takes XLA and cuDNN.
_HOPPER = (9, 0)
VERIFY = "unverified here, run python -m pallas_kernels.verify"


def _module(op: str, name: str) -> ModuleType:
    return import_module(f"pallas_kernels.{op}.{name}")


def unfit(name: str, device: Target) -> str | None:
    """None where an implementation of this name can run on the device (or is interpreted); else why not."""
    if name in EVERYWHERE:
        return None
    from pallas_kernels import compat

    if name in ("mosaic_gpu", "triton") and compat.interpreting():
        return None
    if name == "mosaic_gpu" and device.capability != (9, 0):
        return f"it needs a Hopper GPU, not {device.kind}"
    if device.platform != "cuda":
        return f"it needs an NVIDIA GPU, not {device.kind}"
    if name == "cudnn" and compat.cudnn_version() is None:
        return "no cuDNN is installed"
    if device.capability is not None and device.capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or later, not {device.kind}"
    return None


def _left_out(name: str, device: Target) -> str | None:
    """Why ``auto`` leaves out what is there for a call that names it; None where it takes it, once it is verified."""
    if name != "triton" or device.platform != "cuda":
        return None
    if device.capability is None or device.capability < _HOPPER:
        return f"before Hopper it runs where it is named only, and this is {device.kind}"
    return None


def _unverified(op: str, name: str, device: Target) -> str | None:
    return None if name in EVERYWHERE else records.verified(op, name, device.kind)


# What a call that leaves the choice open takes, by op. A user context is part of the key of JAX's traces.
_named = jax.make_user_context(())


def _require_known(op: str, implementation: str) -> None:
    names = IMPLEMENTATIONS[op]
    if implementation != "auto" and implementation not in names:
        allowed = ", ".join(repr(name) for name in ("auto", *names))
        raise ValueError(f"implementation={implementation!r}: expected one of {allowed} for {op}")


@contextlib.contextmanager
def naming(implementations: Mapping[str, str]) -> Iterator[None]:
    """Calls traced inside that say "auto" take the implementation named for their op, or raise why they cannot.

    A model calls many ops with one argument ``implementation``: so a whole step is told what each of them shall take.

    Raises:
        ValueError: an op or an implementation is unknown.
    """
    for op, name in implementations.items():
        if op not in IMPLEMENTATIONS:
            raise ValueError(f"op={op!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
        _require_known(op, name)
    with _named(tuple(sorted((dict(_named.value) | dict(implementations)).items()))):
        yield


def choose(op: str, implementation: str, *args: object, **options: object) -> ModuleType:
    """The module that will run this call of ``op`` on the device that is traced for.

    Args:
        op: name of the op.
        implementation: "auto" (what :func:`naming` says, else the fastest that runs) or one of ``IMPLEMENTATIONS[op]``.
        args: positional arguments of the call.
        options: keyword arguments of the call.

    Raises:
        ValueError: ``implementation`` is unknown, or cannot run this call here. Nothing falls back silently.
    """
    _require_known(op, implementation)
    if implementation == "auto":
        implementation = dict(_named.value).get(op, "auto")
    names = IMPLEMENTATIONS[op]
    device = target()
    refusals = []
    for name in names if implementation == "auto" else (implementation,):
        refusal = unfit(name, device)
        if refusal is None and implementation == "auto":
            refusal = _left_out(name, device) or _unverified(op, name, device)
        if refusal is None:
            module = _module(op, name)
            refusal = module.supports(*args, **options)
            if refusal is None:
                return module
        refusals.append(f"{name}: {refusal}")
    raise ValueError(
        f"implementation={implementation!r}: cannot run this call of {op} ({'; '.join(refusals)})"
    )


class Choice(NamedTuple):
    """What ``auto`` takes for an ordinary call of an op, why, and which implementations only lack a pass record."""

    op: str
    implementation: str
    reason: str
    unverified: tuple[str, ...]


def explain(device: Target | None = None) -> list[Choice]:
    """The choice for each op on a device, by default this one; a call that an implementation refuses takes the next."""
    device = target() if device is None else device
    found = []
    for op, names in IMPLEMENTATIONS.items():
        passed_over, unverified = [], []
        for name in names:
            refusal = unfit(name, device) or _left_out(name, device)
            if refusal is None and _unverified(op, name, device) is not None:
                refusal = VERIFY
                unverified.append(name)
            if refusal is None:
                break
            passed_over.append(f"{name}: {refusal}")
        if set(names) <= set(EVERYWHERE):
            passed_over = ["no GPU kernel of this op is present"]
        reason = "; ".join([_module(op, name).REASON, *passed_over])
        found.append(Choice(op, name, reason, tuple(unverified)))
    return found

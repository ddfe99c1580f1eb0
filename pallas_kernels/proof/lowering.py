"""L1: a function lowered for CUDA or TPU on any machine, and what stands in the text."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from pallas_kernels import compat

MOSAIC = "mosaic_gpu_v2"
TRITON = "__gpu$xla.gpu.triton"
_KERNEL = {"mosaic_gpu": MOSAIC, "triton": TRITON, "cudnn": "__cudnn$"}
_NAME = re.compile(r'\bname = "([^"]+)"')
_SHAPE = re.compile(r"tensor<([0-9x]*)")


def _lowered(fn: Any, avals: tuple[Any, ...], statics: dict[str, Any], kind: str, platform: str) -> str:
    # A jitted function is taken as it is, its static arguments and donation included: the device is part of the key
    # under which JAX keeps its traces.
    jitted = fn if hasattr(fn, "trace") else jax.jit(lambda *arrays: fn(*arrays))
    with compat.abstract_device(kind, platform):
        return jitted.trace(*avals, **statics).lower(lowering_platforms=(platform,)).as_text()


def lower_cuda(fn: Callable[..., Any], *avals: Any, kind: str = "NVIDIA H200", **statics: Any) -> str:
    """StableHLO of ``fn`` for an NVIDIA GPU of this kind.

    Args:
        fn: a function, jitted or not.
        avals: shapes and dtypes, or arrays.
        kind: as ``jax.Device.device_kind`` says it.
        statics: keyword arguments of a jitted ``fn``.
    """
    return _lowered(fn, avals, statics, kind, "cuda")


def lower_tpu(fn: Callable[..., Any], *avals: Any, kind: str = "TPU v5e", **statics: Any) -> str:
    """StableHLO of ``fn`` for a TPU; arguments as of :func:`lower_cuda`."""
    return _lowered(fn, avals, statics, kind, "tpu")


def require_kernel(text: str, implementation: str, name: str = "") -> None:
    """Raise unless the text calls a kernel of this implementation (whose name holds ``name``): no silent fallback.

    Raises:
        AssertionError: there is none.
    """
    target = _KERNEL[implementation]
    calls = [line for line in text.splitlines() if "custom_call" in line and target in line]
    if not calls:
        raise AssertionError(f"the lowered text has no custom call of {implementation} ({target})")
    if not any(name in line for line in calls):
        raise AssertionError(f"none of the {len(calls)} kernels of {implementation} is called {name!r}")


def triton_names(text: str) -> set[str]:
    """Names of the Triton kernels that the text calls."""
    return {name for line in text.splitlines() if TRITON in line for name in _NAME.findall(line)}


@dataclass(frozen=True)
class Outside:
    """Operations of XLA beside the kernels, whose own code stands in attributes of their calls."""

    dots: int
    sorts: int
    gathers: tuple[int, ...]  # elements of the result of each gather

    def large_gathers(self, elements: int) -> int:
        """How many gathers have a result of at least this many elements."""
        return sum(size >= elements for size in self.gathers)


def outside(text: str) -> Outside:
    """What XLA itself has to do in a lowered program."""
    dots = sorts = 0
    gathers = []
    for line in text.splitlines():
        dots += "stablehlo.dot_general" in line or "stablehlo.dot " in line
        sorts += "stablehlo.sort" in line or "chlo.top_k" in line
        if "stablehlo.gather" in line or "stablehlo.dynamic_gather" in line:
            size = 1
            for part in _SHAPE.findall(line)[-1].split("x"):
                size *= int(part) if part else 1
            gathers.append(size)
    return Outside(dots, sorts, tuple(gathers))

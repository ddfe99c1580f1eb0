"""The machine and the versions that a figure was measured with."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "jaxllm",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tokenizers",
    "safetensors",
    "numpy",
)
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
OPTIONAL = ("torch", "transformers", "datasets", "pyarrow")


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python and every package above that is installed."""
    found = {name: version_of(name) for name in (*PACKAGES, *PLUGINS, *OPTIONAL)}
    if found["jaxllm"] is None:
        from jaxllm import __version__

        found["jaxllm"] = __version__
    return {"python": platform.python_version()} | {
        name: version for name, version in found.items() if version
    }


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Feature flags of the CPU; empty where the system does not list them."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return next(
        (frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset()
    )


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model name."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Main memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def has_bfloat16_products() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX, AVX-512 BF16)."""
    return bool({"amx_bf16", "avx512_bf16"} & cpu_flags())


def describe() -> dict[str, Any]:
    """System and CPU, as plain JSON values."""
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "bfloat16_products": has_bfloat16_products(),
    }


def devices() -> list[dict[str, Any]]:
    """JAX's devices, as plain JSON values; imports JAX."""
    import jax

    found = []
    for device in jax.devices():
        try:
            stats = device.memory_stats() or {}
        except (RuntimeError, NotImplementedError):
            stats = {}
        found.append(
            {
                "id": device.id,
                "platform": device.platform,
                "kind": device.device_kind,
                "memory_bytes": stats.get("bytes_limit"),
            }
        )
    return found

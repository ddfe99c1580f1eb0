"""The device that a trace is for: that of the mesh in use, or else the default device."""

import re
from dataclasses import dataclass
from typing import Any

import jax

# Compute capability 9.0: WGMMA and TMA as the Mosaic kernels use them are of this generation only.
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


@dataclass(frozen=True)
class Target:
    """A device.

    Attributes:
        platform: "cpu", "cuda", "rocm", "tpu", ...
        kind: "NVIDIA H200", ...
        capability: compute capability of an NVIDIA GPU; None where it is not known.
    """

    platform: str
    kind: str
    capability: tuple[int, int] | None = None


def _target(device: Any) -> Target:
    platform, kind = device.platform, device.device_kind
    if platform == "gpu":
        platform = "rocm" if kind.startswith(("AMD", "gfx")) else "cuda"
    if platform != "cuda":
        return Target(platform, kind)
    # An abstract device has a name only.
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    if major.isdigit() and minor.isdigit():
        return Target(platform, kind, (int(major), int(minor)))
    return Target(platform, kind, (9, 0) if _HOPPER.search(kind) else None)


def target() -> Target:
    """The device that what is traced now will run on; a lowering for another one names it by an abstract mesh."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.values["jax_default_device"]
        if not hasattr(device, "device_kind"):
            device = jax.devices(device)[0] if isinstance(device, str) else jax.devices()[0]
    return _target(device)

"""Accelerators that the machine has, whatever JAX is installed, and the line that installs the JAX for them.

Nothing here imports JAX: it reads /proc and /dev, asks nvidia-smi, and works on machines without any driver.
"""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

# First driver branch of each CUDA major version (NVIDIA's CUDA compatibility table).
_CUDA_13_DRIVER, _CUDA_12_DRIVER = 580, 525
_GOOGLE_PCI_VENDOR = "0x1ae0"


@dataclass(frozen=True)
class Accelerator:
    """What the operating system shows.

    Attributes:
        kind: "nvidia" or "tpu".
        names: product names, one per device; may be empty where only a device file is seen.
        driver: version of the NVIDIA driver.
        cuda: highest CUDA version that the driver runs, such as (12, 4).
    """

    kind: str
    names: tuple[str, ...] = ()
    driver: str | None = None
    cuda: tuple[int, int] | None = None

    @property
    def extra(self) -> str | None:
        """The extra of jaxllm that fits; None for a driver too old for any."""
        if self.kind == "tpu":
            return "tpu"
        if self.cuda is not None:
            return "cuda13" if self.cuda[0] >= 13 else "cuda12" if self.cuda[0] == 12 else None
        major = int(self.driver.split(".")[0]) if self.driver else _CUDA_12_DRIVER
        return "cuda13" if major >= _CUDA_13_DRIVER else "cuda12" if major >= _CUDA_12_DRIVER else None

    def __str__(self) -> str:
        names = ", ".join(sorted(set(self.names))) or {"nvidia": "NVIDIA device", "tpu": "TPU"}[self.kind]
        count = f"{len(self.names)} x " if len(self.names) > 1 else ""
        driver = f", driver {self.driver}" if self.driver else ""
        cuda = f", CUDA {self.cuda[0]}.{self.cuda[1]}" if self.cuda else ""
        return f"{count}{names}{driver}{cuda}"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _nvidia_smi() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        return subprocess.run([command, "-q"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def detect_nvidia(root: Path = Path("/"), smi: str | None = None) -> Accelerator | None:
    """The NVIDIA devices of this machine.

    Args:
        root: where proc and dev stand; tests give a folder of their own.
        smi: what ``nvidia-smi -q`` prints; None runs it if something else points to a device.
    """
    proc = root / "proc/driver/nvidia"
    seen = (
        proc.exists()
        or (root / "dev/nvidia0").exists()
        or (smi is None and shutil.which("nvidia-smi") is not None)
    )
    if not seen and not smi:
        return None
    smi = _nvidia_smi() if smi is None else smi
    driver = re.search(r"Driver Version\s*:\s*([\d.]+)", smi) or re.search(
        r"Kernel Module.*?\s(\d+\.[\d.]+)", _read(proc / "version")
    )
    cuda = re.search(r"CUDA Version\s*:\s*(\d+)\.(\d+)", smi)
    cards = sorted(proc.glob("gpus/*/information"))
    names = re.findall(r"Product Name\s*:\s*(.+)", smi) or re.findall(
        r"Model:\s*(.+)", "\n".join(_read(card) for card in cards)
    )
    devices = sorted((root / "dev").glob("nvidia[0-9]*"))
    if not (names or cards or devices):
        return None
    return Accelerator(
        kind="nvidia",
        names=tuple(name.strip() for name in names),
        driver=driver.group(1) if driver else None,
        cuda=(int(cuda.group(1)), int(cuda.group(2))) if cuda else None,
    )


def detect_tpu(root: Path = Path("/")) -> Accelerator | None:
    """The TPU of this machine: its device files, or Google's vendor number on the PCI bus."""
    chips = sorted((root / "dev").glob("accel[0-9]*"))
    if not chips and (root / "dev/vfio").exists():
        vendors = (root / "sys/bus/pci/devices").glob("*/vendor")
        # Google's network cards share the vendor; only accelerators have PCI class 0x12xxxx or 0xff....
        chips = [
            v
            for v in vendors
            if _read(v).strip() == _GOOGLE_PCI_VENDOR and _read(v.parent / "class")[:4] in ("0x12", "0xff")
        ]
    return Accelerator(kind="tpu", names=("TPU",) * len(chips)) if chips else None


def detect(root: Path = Path("/")) -> Accelerator | None:
    """The accelerator of this machine, or None."""
    return detect_nvidia(root) or detect_tpu(root)


def requirement(extra: str) -> str:
    """What to hand to pip to get ``extra``, from wherever this jaxllm was installed."""
    try:
        source = json.loads(metadata.distribution("jaxllm").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        source = {}
    url = source.get("url", "")
    if url.startswith("file://"):
        path = unquote(urlparse(url).path)
        editable = "-e " if source.get("dir_info", {}).get("editable") else ""
        return f'{editable}"{path}[{extra}]"'
    if "vcs_info" in source:
        return f'"jaxllm[{extra}] @ {source["vcs_info"]["vcs"]}+{url}"'
    return f'"jaxllm[{extra}]"'


def install_line(accelerator: Accelerator) -> str:
    """The exact command for this machine, or what to do first."""
    if accelerator.extra is None:
        return f"update the NVIDIA driver ({accelerator.driver or 'unknown'}) to {_CUDA_12_DRIVER} or newer first"
    return f"python -m pip install {requirement(accelerator.extra)}"


def advice(backend: str, root: Path = Path("/")) -> tuple[Accelerator, str] | None:
    """(accelerator, install line) where JAX runs on the CPU beside an accelerator that it could use.

    Args:
        backend: ``jax.default_backend()``.
        root: as in :func:`detect_nvidia`.
    """
    asked = os.environ.get("JAX_PLATFORMS", "") + os.environ.get("JAX_PLATFORM_NAME", "")
    # A CPU that the user asked for, or devices hidden on purpose, need no advice.
    if backend != "cpu" or "cpu" in asked or os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1"):
        return None
    found = detect(root)
    return None if found is None else (found, install_line(found))

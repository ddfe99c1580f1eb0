"""What is known of a compiled kernel: the assembler's registers, spills and shared memory, its copies and its loops."""

import math
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from pallas_kernels.proof.sass import Loops, loops

_FUNCTION = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_STATIC = re.compile(r"(\d+) bytes smem")
_LAUNCH = re.compile(r"dynamic_shared_memory_size %c(\d+)")
_THUNK = re.compile(r"kCustomKernel \[[^\]]*\] (\S+) .*shared_memory: (\d+) bytes")
_THREADS = re.compile(r"\.(?:max|req)ntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_EXPECTED = re.compile(r"(@!?%p\d+\s+)?mbarrier\.arrive\.expect_tx\S* [^,]+,\s*\[[^\]]+\],\s*(%r\d+|\d+);")
_CONSTANT = re.compile(r"mov\.[bu]32\s+(%r\d+), (\d+);")
# What XLA calls nvdisasm's listing, which it writes where it finds nvdisasm.
_LISTINGS = (".sass_ctrl", ".sass")
# Each thread of a warpgroup announces its share of a copy.
_WARPGROUP = 128
_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tma": "cp.async.bulk.tensor"}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        name: of the kernel.
        registers: per thread at entry; a kernel may hand them between warpgroups afterwards.
        spill_bytes: stores and loads together.
        shared_bytes: static and dynamic.
        wgmma: tensor core instructions in its PTX.
        tma: bulk tensor copies in its PTX.
        threads: of a block, as its PTX bounds them.
        tile_bytes: sizes of the tiles that are copied into shared memory and waited for, each once, the largest first.
        loops: what stands in the loops of its machine code; None where nothing disassembles it.
        notes: warnings of the assembler, e.g. that it had to wait for each tensor core instruction, and why a figure
            is None.
    """

    name: str
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int | None
    wgmma: int | None
    tma: int | None
    threads: int | None = None
    tile_bytes: tuple[int, ...] = ()
    loops: Loops | None = None
    notes: tuple[str, ...] = ()

    def blocks_per_sm(self) -> int | None:
        """Blocks that fit a multiprocessor of an H100 or H200 at once; None where a figure is not known.

        Registers go by the warp in units of 256, in each of four quarters; a block's shared memory has 1 KiB of the
        system's beside it. Source: CUDA C++ Programming Guide, compute capability 9.0.
        """
        if self.registers is None or self.shared_bytes is None or self.threads is None:
            return None
        warps = -(-self.threads // 32)
        quarter = 16384 // (-(-self.registers * 32 // 256) * 256)
        return min(4 * quarter // (-(-warps // 4) * 4), 233472 // (self.shared_bytes + 1024), 64 // warps, 32)


def ptxas() -> str | None:
    """The assembler of the installed packages, or of a CUDA toolkit."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "ptxas"
    return str(packaged) if packaged.is_file() else shutil.which("ptxas")


def _tile_bytes(ptx: str) -> tuple[int, ...]:
    constants = {name: int(value) for name, value in _CONSTANT.findall(ptx)}
    found = set()
    for predicate, size in _EXPECTED.findall(ptx):
        value = int(size) if size.isdigit() else constants.get(size)
        if value:
            found.add(value if predicate else value * _WARPGROUP)
    return tuple(sorted(found, reverse=True))


def _kernel(report: str, ptx: str, dynamic: int | None, listing: str | None = None) -> Kernel:
    function, spills, registers = (p.search(report) for p in (_FUNCTION, _SPILLS, _REGISTERS))
    if function is None or spills is None or registers is None:
        raise ValueError(f"no report of ptxas: {report[:200]!r}")
    static = _STATIC.search(report)
    own = int(static[1]) if static else 0
    bound = _THREADS.search(ptx)
    notes = tuple(
        dict.fromkeys(
            line.split(":", 1)[-1].strip()
            for line in report.splitlines()
            if "warning" in line.lower() or "Potential Performance Loss" in line
        )
    )
    return Kernel(
        name=function[1].removesuffix("_mosaic_gpu_kernel"),
        registers=int(registers[1]),
        spill_bytes=int(spills[2]) + int(spills[3]),
        # Mosaic declares one static byte that stands for the dynamic allocation.
        shared_bytes=own if dynamic is None else dynamic,
        wgmma=ptx.count(_INSTRUCTIONS["wgmma"]),
        tma=ptx.count(_INSTRUCTIONS["tma"]),
        threads=math.prod(int(n) for n in bound.groups() if n) if bound else None,
        tile_bytes=_tile_bytes(ptx),
        loops=None if listing is None else loops(listing),
        notes=notes,
    )


def listings(folder: Path) -> list[str]:
    """The machine code of the Mosaic kernels that were dumped into a folder."""
    files = [file for end in _LISTINGS for file in sorted(folder.glob(f"*{end}"))]
    # Of two forms the first.
    found = {file.stem: file for file in reversed(files)}
    return [found[name].read_text(errors="replace") for name in sorted(found)]


def mosaic_kernels(folder: Path) -> list[Kernel]:
    """The Mosaic kernels that were dumped into a folder (``MOSAIC_GPU_DUMP_TO``)."""
    found = []
    for report in sorted(folder.glob("*.ptxas")):
        log = report.with_suffix(".mlir-passes.log")
        dynamic = _LAUNCH.search(log.read_text(errors="replace")) if log.is_file() else None
        ptx = report.with_suffix(".ptx").read_text(errors="replace")
        listing = next(
            (report.with_suffix(end) for end in _LISTINGS if report.with_suffix(end).is_file()), None
        )
        found.append(
            _kernel(
                report.read_text(errors="replace"),
                ptx,
                int(dynamic[1]) if dynamic else None,
                listing.read_text(errors="replace") if listing else None,
            )
        )
    return found


def triton_kernels(folder: Path, names: set[str]) -> list[Kernel]:
    """The kernels called ``names`` in a dump of XLA, put through ptxas once more for its report.

    Raises:
        FileNotFoundError: there is PTX, but no ptxas.
    """
    listing = "".join(f.read_text(errors="replace") for f in folder.glob("*thunk_sequence.txt"))
    programs = {f: f.read_text(errors="replace") for f in sorted(folder.glob("*.ptx"))}
    found = []
    for name, shared in _THUNK.findall(listing):
        if name not in names:
            continue
        file = next((f for f, text in programs.items() if name in _ENTRY.findall(text)), None)
        if file is None:
            # jax 0.11 and later.
            found.append(
                Kernel(
                    name, None, None, int(shared), None, None, notes=("XLA dumps no PTX of Triton kernels",)
                )
            )
            continue
        assembler = ptxas()
        if assembler is None:
            raise FileNotFoundError(
                "no ptxas: neither the package nvidia-cuda-nvcc nor a CUDA toolkit is here"
            )
        command = [assembler, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", str(file)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(_kernel(shown.stderr + shown.stdout, programs[file], int(shared)))
    return found

"""L2: cases compiled to sm_90a binaries on a machine without a GPU, each in a process that may crash.

``python -m pallas_kernels.proof.aot [--op OP] [--case TEXT]`` prints one line per case and implementation; it needs the
extra ``aot`` (the CUDA plugin of the same version as jax, ptxas, and nvdisasm for what stands in the loops).
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pallas_kernels.cases import Case, cases
from pallas_kernels.proof.ptxas import Kernel, listings, mosaic_kernels, triton_kernels
from pallas_kernels.proof.sass import Loops, nvdisasm

ROOT = Path(__file__).parents[2]
_ANSWER = "compiled: "

# What XLA wants to know of a device that is not there.
H200 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
  platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200" """


@dataclass(frozen=True)
class Job:
    """One case for one implementation; ``module`` holds the list CASES."""

    module: str
    case: str
    implementation: str


@dataclass(frozen=True)
class Compilation:
    """What came of a job.

    Attributes:
        error: why it does not compile; None where it does.
        kernels: of this implementation, in order.
        temp_bytes: device memory beside arguments and results.
    """

    op: str
    case: str
    implementation: str
    jax: str
    error: str | None = None
    seconds: float = 0.0
    temp_bytes: int = 0
    kernels: tuple[Kernel, ...] = field(default=())

    def faults(self, case: Case) -> list[str]:
        """Why this is a regression: it does not compile, has no kernel, or one spills or takes more than its case allows."""
        if self.error is not None:
            return [self.error]
        if not self.kernels:
            return [f"no kernel of {self.implementation} in the program"]
        found = []
        for kernel in self.kernels:
            if (kernel.spill_bytes or 0) > case.spill_bytes:
                found.append(
                    f"{kernel.name} spills {kernel.spill_bytes} bytes, {case.spill_bytes} are allowed"
                )
            if (kernel.registers or 0) > case.registers:
                found.append(
                    f"{kernel.name} takes {kernel.registers} registers, {case.registers} are allowed"
                )
        return found


def compile_jobs(
    jobs: Iterable[Job], python: str = sys.executable, seconds: float = math.inf
) -> Iterator[Compilation]:
    """Jobs compiled in a process of their own each, as many at a time as there are cores; all, or those begun in time.

    One that dies ends no other; and Mosaic, which compiles the same kernel once a process, tells the resources of each.

    Args:
        jobs: what to compile, in this order.
        python: the interpreter that has JAX and its CUDA plugin.
        seconds: none begins later than this after the first.

    Raises:
        RuntimeError: that Python cannot compile at all (no plugin, no ptxas); says why.
    """
    until = time.monotonic() + seconds

    def in_time(job: Job) -> Compilation | None:
        return _in_a_process(job, python) if time.monotonic() < until else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from (done for done in pool.map(in_time, jobs) if done is not None)


def _in_a_process(job: Job, python: str) -> Compilation:
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    command = [python, "-m", "pallas_kernels.proof.aot", "--child"]
    done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        why = f"the compiler died ({done.returncode}): {last}"
        return Compilation(job.module.split(".")[-2], job.case, job.implementation, "", error=why)
    answer = json.loads(lines[0].removeprefix(_ANSWER))
    if "cannot" in answer:
        raise RuntimeError(answer["cannot"])
    kernels = tuple(_kernel(k) for k in answer.pop("kernels"))
    return Compilation(**answer, kernels=kernels)


def _kernel(values: dict[str, Any]) -> Kernel:
    """A kernel that came as JSON."""
    loops = values["loops"] and Loops(**values["loops"])
    more = {name: tuple(values[name]) for name in ("notes", "tile_bytes")}
    return Kernel(**{**values, **more, "loops": loops})


def _mesh() -> Any:
    """A mesh of one H200 that is not there."""
    from pallas_kernels import compat

    topology = compat.topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    return compat.topologies.make_mesh(topology, (1,), ("x",))


def _dump(case: Any, implementation: str, mesh: Any, folder: str) -> tuple[str, Any]:
    """Compiles a case, its kernels' files left in ``folder``: the lowered text, and XLA's account of memory."""
    import jax

    from pallas_kernels.proof.lowering import require_kernel

    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    if nvdisasm() is not None:
        os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"
    everywhere = jax.NamedSharding(mesh, jax.P())
    avals = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere) for name, a in case.avals().items()
    }
    try:
        with jax.set_mesh(mesh), jax.default_device(mesh.devices.flat[0]):
            call = case.call(implementation)
            lowered = jax.jit(lambda arrays: call(arrays)).lower(avals)
            text = lowered.as_text()
            require_kernel(text, implementation)
            dump: dict[str, Any] = {"xla_dump_to": f"{folder}/xla"} if implementation == "triton" else {}
            return text, lowered.compile(compiler_options=dump).memory_analysis()
    finally:
        for name in ("MOSAIC_GPU_DUMP_TO", "MOSAIC_GPU_DUMP_SASS"):
            os.environ.pop(name, None)


def _compile(case: Any, implementation: str, mesh: Any) -> Compilation:
    from pallas_kernels import compat
    from pallas_kernels.proof.lowering import triton_names

    start = time.perf_counter()
    found = Compilation(case.op, case.name, implementation, compat.JAX)
    with tempfile.TemporaryDirectory() as folder:
        try:
            text, memory = _dump(case, implementation, mesh, folder)
            if implementation == "triton":
                kernels = triton_kernels(Path(folder, "xla"), triton_names(text))
            else:
                kernels = mosaic_kernels(Path(folder))
        except Exception as error:
            return replace(found, error=f"{type(error).__name__}: {error}".strip()[:600])
    return replace(
        found,
        seconds=round(time.perf_counter() - start, 2),
        temp_bytes=memory.temp_size_in_bytes,
        kernels=tuple(kernels),
    )


def machine_code(case: Case) -> list[str]:
    """nvdisasm's listing of each Mosaic kernel of a case, compiled by this process's own JAX and its CUDA plugin.

    A process compiles the same kernel once, and a second time finds none: one case a process.

    Raises:
        FileNotFoundError: there is no nvdisasm.
    """
    if nvdisasm() is None:
        raise FileNotFoundError("no nvdisasm: neither its package nor a CUDA toolkit is here")
    with tempfile.TemporaryDirectory() as folder:
        _dump(case, "mosaic_gpu", _mesh(), folder)
        return listings(Path(folder))


def _child() -> None:
    """Answer the job of stdin in one line."""
    job = Job(**json.load(sys.stdin))

    def answer(value: dict[str, Any]) -> None:
        print(_ANSWER + json.dumps(value), flush=True)

    try:
        mesh = _mesh()
    except Exception as error:
        answer({"cannot": f"no CUDA compiler for this Python: {type(error).__name__}: {error}"[:400]})
        return
    case = next(c for c in importlib.import_module(job.module).CASES if c.name == job.case)
    answer(asdict(_compile(case, job.implementation, mesh)))


def jobs(op: str | None = None, text: str = "") -> list[Job]:
    """Every case whose name holds ``text``, once per implementation."""
    return [
        Job(f"pallas_kernels.{case.op}.cases", case.name, implementation)
        for case in cases(op)
        if text in case.name
        for implementation in case.implementations
        # What it runs is NVIDIA's, and compiled by them.
        if implementation != "cudnn"
    ]


def main() -> int:
    """Compile and print; 1 where something is a regression, 77 where nothing could be compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--op", help="one op; all by default")
    parser.add_argument("--case", default="", help="only cases whose name holds this text")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter that has jax and its CUDA plugin"
    )
    options = parser.parse_args()
    if options.child:
        _child()
        return 0
    known = {(case.op, case.name): case for case in cases(options.op)}
    failed = False
    try:
        for done in compile_jobs(jobs(options.op, options.case), options.python):
            faults = done.faults(known[done.op, done.case])
            failed |= bool(faults)
            print(f"{done.op} | {done.case} | {done.implementation} | jax {done.jax} | {done.seconds} s")
            for kernel in done.kernels:
                print(
                    f"    {kernel.name}: {kernel.registers} registers, {kernel.spill_bytes} B spilled, "
                    f"{kernel.shared_bytes} B shared, {kernel.wgmma} wgmma, {kernel.tma} TMA, "
                    f"{kernel.threads} threads, {kernel.blocks_per_sm()} blocks per SM"
                )
                if kernel.loops is not None:
                    print(
                        f"      a turn of its loops: {kernel.loops.wgmma} wgmma, {kernel.loops.tma} TMA, "
                        f"{kernel.loops.spills} spills; tiles of {', '.join(map(str, kernel.tile_bytes))} B"
                    )
                for note in kernel.notes:
                    print(f"      {note}")
            for fault in faults:
                print(f"    FAULT: {fault}")
    except RuntimeError as error:
        print(error)
        return 77
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

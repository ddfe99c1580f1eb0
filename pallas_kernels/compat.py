"""Every difference between the versions of JAX that the kernels run on (0.10.2 to 0.12), and all of ``jax.experimental``.

``pl``, ``plgpu`` (Mosaic GPU), ``fragments`` (its layouts), ``pltriton``, ``profiler``, ``topologies`` and ``checkify`` are
attributes of this module, imported at their first use: no import of the library pays for Pallas where no kernel runs.
"""

import contextlib
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

_LAZY = {
    "pl": "jax.experimental.pallas",
    "plgpu": "jax.experimental.pallas.mosaic_gpu",
    "pltriton": "jax.experimental.pallas.triton",
    "topologies": "jax.experimental.topologies",
    "checkify": "jax.experimental.checkify",
    "fragments": "jax.experimental.mosaic.gpu.fragmented_array",
    "profiler": "jax.experimental.mosaic.gpu.profiler",
    "callbacks": "jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks",
}
JAX = jax.__version__
_VERSION = tuple(int(part) for part in JAX.split(".")[:2])


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(_LAZY[name])


def _module(name: str) -> Any:
    return importlib.import_module(_LAZY[name])


@dataclass(frozen=True)
class Interpretation:
    """How kernels traced under :func:`interpreted` run: on the CPU, with or without looking for races."""

    races: bool = False


# A user context is part of JAX's trace cache key: a function jitted inside is traced anew outside.
_interpretation = jax.make_user_context(None)


def interpreting() -> bool:
    """Whether kernels traced now are interpreted; they then replace what no interpreter knows (see ``mosaic``)."""
    return _interpretation.value is not None


@contextlib.contextmanager
def interpreted(races: bool = False) -> Iterator[None]:
    """Kernels traced inside run in the interpreters of Pallas on the CPU.

    The state of the Mosaic interpreter is reset on the way out: after an exception it would fail every later run.
    """
    with _interpretation(Interpretation(races)):
        try:
            yield
        except BaseException:
            reset_interpreter()
            raise


def _mosaic_interpreter() -> Any:
    how = _interpretation.value
    if how is None:
        return False
    plgpu = _module("plgpu")
    _compile_threads_once()
    if hasattr(plgpu, "InterpretGPUParams"):
        params = plgpu.InterpretGPUParams
    else:
        params = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams
    return params(detect_races=how.races)


def _compile_threads_once() -> None:
    """0.10.2 compiles the body of a kernel again for every thread of every block, which takes nearly all of the time."""
    thread_map: Any = importlib.import_module("jax._src.pallas.mosaic.interpret.thread_map")
    if not hasattr(thread_map, "_run"):
        thread_map._run_jaxpr = partial(_run_thread, thread_map.jax_core.eval_jaxpr)


_threads: dict[int, Any] = {}
# Compiled programs take memory maps, of which a process has few.
_MOST_THREADS = 32
_compiling = threading.Lock()


def _run_thread(evaluate: Callable[..., Any], jaxpr: Any, consts: Any, *args: Any) -> None:
    with _compiling:
        # The jaxpr is kept, so that no other takes its id.
        if id(jaxpr) not in _threads:
            if len(_threads) >= _MOST_THREADS:
                _threads.clear()
            call = jax.jit(lambda consts, *args: evaluate(jaxpr, consts, *args) and None)
            _threads[id(jaxpr)] = jaxpr, call.lower(consts, *args).compile()
        _, run = _threads[id(jaxpr)]
    run(consts, *args)


def reset_interpreter() -> None:
    """Forget the shared memory and the races of earlier interpreted Mosaic kernels."""
    _module("callbacks").reset_gpu_interpret_mode_state()
    _threads.clear()


def races_found() -> bool:
    """Whether the last interpreted Mosaic kernel that looked for races has one; 0.12 raises RuntimeError instead."""
    state = getattr(_module("callbacks"), "_races", None)
    return bool(state is not None and state.races_found)


# 0.10.2 sees no overwrite of a buffer that is still being read.
RACES_ARE_SEEN = _VERSION >= (0, 11)


def mosaic_kernel(body: Callable[..., None], *, name: str, **options: Any) -> Callable[..., Any]:
    """``plgpu.kernel(body, **options)``, interpreted under :func:`interpreted`; ``name`` stands in the lowered text."""
    return _module("plgpu").kernel(body, kernel_name=name, interpret=_mosaic_interpreter(), **options)


def mosaic_in_place(
    body: Callable[..., None],
    arrays: Any,
    updated: jax.Array,
    *,
    name: str,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    **options: Any,
) -> tuple[Any, jax.Array]:
    """A kernel that changes an array in global memory: its output, and ``updated`` after it.

    Args:
        body: takes the refs of ``arrays`` as they are nested, of ``updated`` and of the output.
        arrays: inputs.
        updated: read and written; where the caller donates it, without a copy.
    """
    pl, plgpu = _module("pl"), _module("plgpu")
    ref = jax.new_ref(updated, memory_space=plgpu.GMEM)
    # ``plgpu.kernel`` has a rule for vmap, which no ref passes.
    mesh = plgpu.Mesh(grid=grid, grid_names=grid_names, kernel_name=name)

    def closed(given: Any, out: Any) -> None:
        body(given, ref, out)

    closed.__name__ = name
    run = pl.kernel(closed, mesh=mesh, name=name, interpret=_mosaic_interpreter(), **options)
    return run(arrays), jax.freeze(ref)


def triton_call(
    body: Callable[..., None], *, name: str, num_warps: int = 4, num_stages: int = 3, **options: Any
) -> Callable[..., Any]:
    """``pl.pallas_call`` through Triton, said explicitly (the default backend differs between versions)."""
    pl, pltriton = _module("pl"), _module("pltriton")
    # Deprecated since 0.11, and the only way to gather rows by index on Hopper. It warns when lowered, so that the
    # filter must outlast this call.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    params = pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(body, name=name, compiler_params=params, interpret=interpreting(), **options)


def load(ref: Any, *, layout: Any = None, optimized: bool = True) -> jax.Array:
    """``plgpu.load`` of a whole (sub-)ref; 0.10.2 wants an index, 0.12 refuses one."""
    plgpu = _module("plgpu")
    if _VERSION >= (0, 11):
        return plgpu.load(ref, layout=layout, optimized=optimized)
    return plgpu.load(ref, (), layout=layout, optimized=optimized)


def store(ref: Any, value: jax.Array, *, optimized: bool = True) -> None:
    """``plgpu.store`` to a whole (sub-)ref; before 0.12 there is none, and a plain write is refused nowhere."""
    if _VERSION >= (0, 12):
        _module("plgpu").store(ref, value, optimized=optimized)
    else:
        ref[...] = value


def on_words(x: jax.Array, layout: Any, word: Callable[[Any, Callable[[int], Any], Any], Any]) -> jax.Array:
    """Bytes in registers, taken four at a time as the word of 32 bits that they lie in: not for the interpreter.

    Args:
        x: int8 of this layout, a multiple of four neighbours a thread.
        word: from MLIR's word, a function that makes constants, and MLIR's ``arith``, the word that replaces it.
    """
    plgpu, utils = _module("plgpu"), importlib.import_module("jax.experimental.mosaic.gpu.utils")
    ir, arith = (importlib.import_module(f"jaxlib.mlir.{name}") for name in ("ir", "dialects.arith"))

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)
    )
    def inline(_ctx: Any, given: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)

        def constant(value: int) -> Any:
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        registers = given.registers.copy()
        for at, held in enumerate(registers.flat):
            replaced = word(utils.bitcast(held, i32), constant, arith)
            registers.flat[at] = utils.bitcast(replaced, held.type)
        return type(given)(_registers=registers, _layout=given.layout, _is_signed=given.is_signed)

    return inline(x)


def cudnn_version() -> int | None:
    """The version of cuDNN that JAX found, or None."""
    versions = importlib.import_module("jax._src.lib").cuda_versions
    if versions is None:
        return None
    try:
        return int(versions.cudnn_get_version())
    except RuntimeError:
        # CUDA's plugin is installed, its cuDNN is not.
        return None


def abstract_device(kind: str, platform: str) -> contextlib.AbstractContextManager[Any]:
    """Traces inside are for a device of this kind that need not exist; Triton lowers for none else since 0.11."""
    from jax.sharding import AbstractDevice, AbstractMesh

    cores = 132 if platform == "cuda" else 1
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))

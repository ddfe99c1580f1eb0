"""A whole training step over eight H200s that are not there: compiled, and what stands in the program.

``python -m experiments._fcp_step FILE`` compiles the :class:`Case` of stdin in a Python that has JAX's CUDA plugin (extra
``aot``), writes the program's text and answers in one line.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig, Precision
from jaxllm.presets import preset
from jaxllm.train.context import ContextSettings, Scatterer, Slots, check_context
from jaxllm.train.optim import OptimConfig
from jaxllm.train.placement import check_mesh, state_shardings
from jaxllm.train.state import TrainPlan, abstract_state
from jaxllm.train.step import StepSettings, make_train_step
from pallas_kernels import compat, dispatch
from pallas_kernels.proof.aot import H200
from parallel.context import draw_lengths
from parallel.mesh import SLOTS, MeshShape, make_mesh
from parallel.sharding import Placement

ANSWER = "compiled: "
DEVICES = 8


@dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
        name: of the row.
        mesh: devices along each axis, 8 together.
        strategy: of :class:`jaxllm.train.context.ContextSettings`.
        exchange: of the same.
        model: a preset.
        pattern: letters instead of the preset's; None: its own.
        tokens: of a device.
        block: of a plan.
        seed: of the documents' lengths.
        attention: the implementation of attention.
        options: of XLA, by name.
    """

    name: str
    mesh: dict[str, int]
    strategy: str = "fcp"
    exchange: str = "rotate"
    model: str = "nemotron-3-nano-30b-a3b"
    pattern: str | None = None
    tokens: int = 32_768
    block: int = 4_096
    seed: int = 0
    attention: str = "mosaic_gpu"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The model, computing in bfloat16, layers of equal groups under one loop."""
        cfg = preset(self.model)
        return cfg.replace(
            pattern=self.pattern or cfg.pattern, precision=Precision(compute="bfloat16"), scan_layers=True
        )

    @property
    def shape(self) -> MeshShape:
        return MeshShape(**self.mesh)


def batch(case: Case) -> PackedBatch:
    """A row of whole documents for each group of devices that shares rows; NumPy leaves, all tokens 0."""
    shape = case.shape
    groups = shape.data * shape.fsdp * shape.expert
    ids, positions = [], []
    for group in range(groups):
        lengths = draw_lengths("log-normal", shape.context * case.tokens, case.seed + group)
        ids.append(np.repeat(np.arange(1, len(lengths) + 1), lengths))
        positions.append(np.concatenate([np.arange(length) for length in lengths]))
    rows, tokens = np.stack(ids).astype(np.int32), np.zeros((groups, len(ids[0])), np.int32)
    return PackedBatch(
        tokens=tokens,
        segment_ids=rows,
        positions=np.stack(positions).astype(np.int32),
        targets=tokens[..., None],
        loss_mask=np.ones(tokens.shape, np.float32),
    )


def settings(case: Case) -> ContextSettings:
    """How documents are shared."""
    return ContextSettings(case.strategy, case.block, case.exchange)


def abstract(tree: Any, specs: Any, mesh: Any) -> Any:
    """Arrays as shapes that lie as ``specs`` say."""

    def one(spec: P, x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    leaf = lambda x: isinstance(x, P)  # noqa: E731
    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda x: one(spec, x), part), specs, tree, is_leaf=leaf
    )


def scattered(case: Case, mesh: Any) -> Slots:
    """The batch of a case, planned for a mesh."""
    return Scatterer(case.config, settings(case), mesh)(batch(case))


def lowered(case: Case, mesh: Any) -> Any:
    """The step of a case, lowered for the devices of a mesh.

    Raises:
        ConfigError: model, mesh and strategy do not go together.
    """
    cfg, shape = case.config, case.shape
    check_mesh(cfg, shape)
    check_context(cfg, shape, settings(case))
    place = Placement(mesh)
    optim = OptimConfig(schedule="constant", warmup_steps=0)
    slots = scattered(case, mesh)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_state(cfg, optim),
        state_shardings(cfg, optim, place),
    )
    given = abstract(slots.batch, P(SLOTS), mesh)
    plan = TrainPlan(scattered=abstract(slots.scattered, slots.scattered.specs(), mesh))
    step = make_train_step(cfg, optim, StepSettings(remat="layer"), place=place)
    named = {"attention": case.attention} if set("*W") & set(cfg.letters) else {}
    # What is traced asks the default device, or the mesh in use, which kernels it is for.
    with jax.set_mesh(mesh), jax.default_device(mesh.devices.flat[0]), dispatch.naming(named):
        return step.trace(state, given, plan).lower()


def gpus() -> Any:
    """The devices of one host with eight H200s."""
    return compat.topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology=f"1x1x{DEVICES}"
    ).devices


def main() -> None:
    """Compile the case of stdin; its text goes to the file that is named, the rest to stdout."""

    def answer(value: dict[str, Any]) -> None:
        print(ANSWER + json.dumps(value), flush=True)

    case = Case(**json.load(sys.stdin))
    try:
        devices = gpus()
    except Exception as error:
        answer({"cannot": f"no CUDA compiler for this Python: {type(error).__name__}: {error}"[:400]})
        return
    begin = time.perf_counter()
    try:
        step = lowered(case, make_mesh(case.shape, devices))
        traced = time.perf_counter()
        done = step.compile(compiler_options=case.options)
    except Exception as error:
        answer({"jax": compat.JAX, "error": f"{type(error).__name__}: {error}".strip()[:600]})
        return
    ended = time.perf_counter()
    Path(sys.argv[1]).write_text(done.as_text(), encoding="utf-8")
    memory: Any = done.memory_analysis()
    parts = ("argument", "output", "alias", "temp", "generated_code")
    answer(
        {
            "jax": compat.JAX,
            "error": None,
            "seconds": {"lower": round(traced - begin), "compile": round(ended - traced)},
            "memory": {name: int(getattr(memory, f"{name}_size_in_bytes")) for name in parts},
        }
    )


if __name__ == "__main__":
    main()

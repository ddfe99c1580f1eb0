"""``jaxllm info``: pattern, parameters and memory of a preset or checkpoint, without allocating anything."""

import json
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from rich.console import Console
from tyro.conf import Positional

from jaxllm.cli.display import bold, count, make_console, short, size, table
from jaxllm.cli.errors import UserError

if TYPE_CHECKING:
    from parallel.mesh import MeshShape


@dataclass(frozen=True)
class Args:
    """Show a model's pattern, parameters per part, and the memory that inference and training take.

    Attributes:
        target: a preset's name, or the folder of a checkpoint or run.
        length: tokens of the sequence whose state is measured.
        train: estimate the memory of training.
        batch: rows of a training step.
        seq: tokens of a training row.
        devices: devices that share the training, along data unless --mesh says otherwise.
        mesh: devices along each axis, such as fsdp=4,tensor=2; their product are the devices.
        json: print the figures as JSON.
    """

    target: Positional[str]
    length: int = 4096
    train: bool = False
    batch: int = 8
    seq: int = 2048
    devices: int = 1
    mesh: str | None = None
    json: bool = False

    def check(self) -> None:
        """Raise UserError for sizes below 1."""
        for name in ("length", "batch", "seq", "devices"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}", getattr(self, name), "a whole number of at least 1")
        from parallel.mesh import ROWS

        shape = self.shape
        if shape.size != self.devices and self.devices != 1:
            raise UserError("--mesh", self.mesh, f"a product of --devices {self.devices}, not {shape.size}")
        shares = prod(getattr(shape, axis) for axis in ROWS)
        if self.batch % shares:
            raise UserError("--batch", self.batch, f"a multiple of {shares}, the devices that share its rows")

    @property
    def shape(self) -> "MeshShape":
        """The devices along each axis."""
        from parallel.mesh import AXES, MeshShape

        if self.mesh is None:
            return MeshShape(data=self.devices)
        sizes = {}
        for part in self.mesh.split(","):
            name, _, size = part.partition("=")
            if name not in AXES or not size.isdecimal() or int(size) < 1:
                raise UserError("--mesh", self.mesh, f"AXIS=SIZE,... with the axes {', '.join(AXES)}")
            sizes[name] = int(size)
        return MeshShape(**sizes)


def examine(args: Args) -> dict[str, Any]:
    """Everything that info prints, as plain JSON values."""
    from jaxllm.cache.state import state_bytes
    from jaxllm.cli.model_parts import active_parameter_count, parts, per_token_state_bytes
    from jaxllm.cli.targets import config_of

    cfg = config_of(args.target)
    found = parts(cfg)
    report: dict[str, Any] = {
        "target": args.target,
        "pattern": cfg.pattern,
        "hidden_size": cfg.hidden_size,
        "vocab_size": cfg.vocab_size,
        "precision": asdict(cfg.precision),
        "parameters": sum(part.parameters for part in found),
        "active_parameters": active_parameter_count(cfg),
        "parts": [asdict(part) for part in found],
        "state": {
            "length": args.length,
            "bytes": state_bytes(cfg, args.length),
            "bytes_per_token": per_token_state_bytes(cfg),
        },
    }
    if args.train:
        from jaxllm.train.memory import estimate_training_memory

        memory = estimate_training_memory(cfg, args.batch, args.seq, args.shape)
        report["training"] = {
            "batch": args.batch,
            "seq": args.seq,
            "devices": args.shape.size,
            "parts": memory.parts,
            "total": memory.total,
        }
    return report


def _show(report: dict[str, Any], console: Console) -> None:
    from jaxllm.config import LETTERS

    pattern = report["pattern"]
    used = ", ".join(
        f"{letter} {name} x {pattern.count(letter)}" for letter, name in LETTERS.items() if letter in pattern
    )
    total = report["parameters"]
    precision = report["precision"]
    about = table(report["target"], "")
    about.add_row("pattern", pattern)
    about.add_row("blocks", f"{len(pattern)}: {used}")
    about.add_row("parameters", f"{count(total)} ({short(total)})")
    active = report["active_parameters"]
    if active < total:
        about.add_row("active per token", f"{count(active)} ({short(active)})")
    about.add_row("width, vocabulary", f"{count(report['hidden_size'])}, {count(report['vocab_size'])}")
    about.add_row(
        "precision",
        f"parameters {precision['param']}, activations {precision['compute']}, large products {precision['matmul']}",
    )
    console.print(about)

    shares = table("part", "count", "parameters", "share", right=(1, 2, 3))
    for part in report["parts"]:
        shares.add_row(
            part["name"], str(part["blocks"]), count(part["parameters"]), f"{part['parameters'] / total:.1%}"
        )
    console.print(shares)

    state = report["state"]
    grows = (
        f"grows by {size(state['bytes_per_token'])} per token"
        if state["bytes_per_token"]
        else "the same at any length"
    )
    console.print(
        f"State of one sequence of {count(state['length'])} tokens: {size(state['bytes'])} ({grows})."
    )
    if "training" in report:
        _show_training(report["training"], console)


def _show_training(memory: dict[str, Any], console: Console) -> None:
    shared = f", shared by {memory['devices']} devices" if memory["devices"] > 1 else ""
    title = f"Training on {memory['batch']} rows of {memory['seq']} tokens{shared}"
    made = table("memory of a device", "estimate", title=title, right=(1,))
    for name, value in memory["parts"].items():
        made.add_row(name.replace("_", " "), size(value))
    made.add_row(bold("total"), bold(size(memory["total"])))
    console.print(made)


def run(args: Args) -> int:
    """Print the figures."""
    args.check()
    report = examine(args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report, make_console())
    return 0

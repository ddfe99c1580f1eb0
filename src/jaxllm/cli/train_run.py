"""The configuration of ``jaxllm train``: one dataclass, read from YAML, with a message for every mistake."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import yaml

from jaxllm.cli import field_types, overrides
from jaxllm.cli.errors import UserError
from jaxllm.config import ConfigError, ModelConfig, decode, positive_fields
from jaxllm.generation.folders import load_config
from jaxllm.presets import preset
from jaxllm.train.context import ContextSettings, check_context, check_share
from jaxllm.train.optim import OptimConfig
from jaxllm.train.placement import check_mesh
from jaxllm.train.settings import TrainSettings
from parallel.mesh import ROWS, MeshShape

HEADER = """\
# A training run of jaxllm: start it with `jaxllm train FILE`. Any field can be changed on the command line:
# --set optim.lr=3e-4 data.batch_size=16
#   model    a preset's name, or its fields; `preset: NAME` with other fields changes those of the preset
#   init     instead of `model`: a folder (Hugging Face's or a run's) whose weights, model and tokenizer to start from
#   data     source: stdlib, 'texts/**/*.txt', FILE.jsonl:COLUMN, FILE.parquet:COLUMN or hf:NAME:SPLIT:COLUMN
#   mesh     devices along data, fsdp, context, tensor, expert and stage; left out: all along data
#   context  how devices along mesh.context share documents: strategy, block
#   trainer  stops after `steps`, or after `seconds` of training time
"""


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
        source: as in `jaxllm.data.sources.load_documents`.
        tokenizer: a tokenizer.json or its folder; None trains one on the corpus.
        vocab_size: entries of a trained tokenizer.
        batch_size: rows of a step.
        seq_len: tokens of a row.
        seed: of the order of documents and rows.
        prefetch: batches made ahead.
        evaluation_tokens: validation tokens of each evaluation on the way; the last one takes all.
    """

    source: str = "stdlib"
    tokenizer: str | None = None
    vocab_size: int = 4096
    batch_size: int = 8
    seq_len: int = 512
    seed: int = 0
    prefetch: int = 2
    evaluation_tokens: int = 65536

    def __post_init__(self) -> None:
        positive_fields(self, "data", "vocab_size", "batch_size", "seq_len", "evaluation_tokens")
        if self.prefetch < 0:
            raise ConfigError(f"data.prefetch={self.prefetch}: must be at least 0")


@dataclass(frozen=True)
class TrainRun:
    """One training run.

    Attributes:
        model: the model; its vocabulary becomes that of the tokenizer unless it was given.
        data: corpus, tokenizer and batches.
        optim: optimiser and schedule.
        trainer: length, evaluation, checkpoints.
        out: the run's folder.
        init: folder of the model to start from; ``model`` is then its, but for the precision.
        fixed_vocabulary: `model.vocab_size` was given.
        fixed_precision: `model.precision` was given; otherwise it follows the device.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainSettings = field(default_factory=TrainSettings)
    out: Path = Path("runs/train")
    init: Path | None = None
    fixed_vocabulary: bool = False
    fixed_precision: bool = False

    def to_yaml(self) -> str:
        """The run as YAML that :func:`read` takes."""
        content = asdict(self) | {"model": self.model.to_dict(), "out": str(self.out)}
        mesh, context = (content["trainer"].pop(name) for name in ("mesh", "context"))
        if mesh is not None and mesh["context"] > 1:
            content["context"] = context
        if mesh is not None:
            content["mesh"] = mesh
        content["init"] = None if self.init is None else str(self.init)
        for name in ("vocabulary", "precision"):
            if not content.pop(f"fixed_{name}"):
                content["model"].pop({"vocabulary": "vocab_size"}.get(name, name))
        if self.init is not None:
            content["model"] = {
                name: content["model"][name] for name in ("precision",) if self.fixed_precision
            }
        return HEADER + yaml.safe_dump(_plain(content), sort_keys=False)


@dataclass(frozen=True)
class _Sections:
    """What the file holds beside the model."""

    data: DataConfig | None = None
    optim: OptimConfig | None = None
    trainer: TrainSettings | None = None
    mesh: MeshShape | None = None
    context: ContextSettings | None = None
    out: Path | None = None
    init: Path | None = None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


EXAMPLE: dict[str, Any] = {
    "model": "quickstart",
    "data": {"source": "stdlib", "vocab_size": 4096, "batch_size": 8, "seq_len": 512},
    "optim": {
        "lr": 0.002,
        "schedule": "wsd",
        "warmup_steps": 100,
        "decay_fraction": 0.3,
        "weight_decay": 0.1,
    },
    "trainer": {"steps": 2000, "eval_every": 200, "save_seconds": 600},
    "out": "runs/example",
}


def example() -> str:
    """A short configuration to start from."""
    return HEADER + "\n" + yaml.safe_dump(EXAMPLE, sort_keys=False)


def read(file: Path, changes: Sequence[str] = (), *, init: Path | None = None) -> TrainRun:
    """The run that a YAML file describes.

    Args:
        file: YAML.
        changes: ``path.to.field=value`` each.
        init: folder of the model to start from; the file's model then says at most the precision.

    Raises:
        UserError: no such file, no YAML, or a change that is not NAME=VALUE.
        ConfigError: an unknown field or a value that does not fit, by its path.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "`jaxllm train --example > run.yaml` writes one to start from."
        raise UserError("config", str(file), "a YAML file that exists", hint) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("config", str(file), f"a YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError("config", str(file), "YAML with the fields model, data, optim, trainer, out")
    if init is not None:
        model = content.pop("model", None)
        precision = model.get("precision") if isinstance(model, dict) else None
        content |= {"init": str(init)} | ({"model": {"precision": precision}} if precision else {})
    return build(content, changes)


def build(content: dict[str, Any], changes: Sequence[str] = ()) -> TrainRun:
    """The run of nested plain values, as :func:`read` finds them."""
    content = overrides.numbers(content)
    if isinstance(content.get("model"), str):
        content["model"] = {"preset": content["model"]}
    content = overrides.apply(content, changes)
    given = content.pop("model", None)
    init = content.get("init")
    if given is None and init is not None:
        given = {}
    if given is None:
        raise ConfigError("model: missing; a preset's name or the model's fields")
    if isinstance(given, str):
        given = {"preset": given}
    model = _model(given) if init is None else _initial(init, given)
    trainer = content.get("trainer")
    for name in ("mesh", "context"):
        if isinstance(trainer, dict) and name in trainer:
            raise ConfigError(f"trainer.{name}: there is no such field; {name} is a section of its own")
    content = field_types.checked(_Sections, content)
    sections = {"data": DataConfig, "optim": OptimConfig, "trainer": TrainSettings}
    made = {name: decode(cls, content.get(name) or {}, f"{name}.") for name, cls in sections.items()}
    mesh = content.get("mesh")
    if mesh is not None:
        try:
            shape = decode(MeshShape, mesh, "mesh.")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        made["trainer"] = replace(made["trainer"], mesh=shape)
        # The vocabulary may be open still; what does not depend on it is known before any data are read.
        check_mesh(model, shape, vocabulary="vocab_size" in given or init is not None)
    made["trainer"] = _shared(model, made["trainer"], made["data"], content.get("context"))
    run = TrainRun(
        model=model,
        **made,
        out=Path(content.get("out") or TrainRun.out),
        init=None if init is None else Path(init),
        fixed_vocabulary="vocab_size" in given or init is not None,
        fixed_precision="precision" in given,
    )
    if run.trainer.steps is None and run.trainer.seconds is None:
        raise ConfigError(
            "trainer.steps and trainer.seconds: both missing; say when to stop with one of them"
        )
    return run


def _shared(
    model: ModelConfig, trainer: TrainSettings, data: DataConfig, given: dict[str, Any] | None
) -> TrainSettings:
    """The trainer with the section ``context``, checked against the mesh, the model and the rows of a step."""
    mesh = trainer.mesh or MeshShape()
    if given is not None:
        trainer = replace(trainer, context=decode(ContextSettings, given, "context."))
        if mesh.context == 1:
            raise ConfigError(
                "context: only with devices along mesh.context, which is 1; set that, or leave the section out "
                "(--set context=null)"
            )
    if mesh.context > 1:
        check_context(model, mesh, trainer.context)
        groups = prod(getattr(mesh, axis) for axis in ROWS)
        parts = trainer.step.accum_steps
        check_share(trainer.context.block, data.batch_size, data.seq_len, groups, parts, mesh.context)
    return trainer


def _initial(folder: Any, given: dict[str, Any]) -> ModelConfig:
    """The model of ``init``; the file may say its precision and nothing else."""
    other = sorted(set(given) - {"precision"})
    if other:
        raise ConfigError(
            f"model.{other[0]}: init={str(folder)!r} has a model of its own, of which only model.precision can be "
            "changed; leave out one of the two"
        )
    checked = field_types.checked(ModelConfig, given, "model.")
    model = load_config(str(folder))
    return decode(ModelConfig, _merge(model.to_dict(), checked), "model.")


def _model(given: Any) -> ModelConfig:
    if not isinstance(given, dict):
        raise ConfigError(f"model={given!r}: must be a preset's name or the model's fields")
    wanted = dict(given)
    name = wanted.pop("preset", None)
    wanted = field_types.checked(ModelConfig, wanted, "model.")
    if name is not None:
        wanted = _merge(preset(str(name)).to_dict(), wanted)
    # The tokenizer decides; until it is there any number does.
    wanted.setdefault("vocab_size", 64)
    return decode(ModelConfig, wanted, "model.")


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged

"""``jaxllm convert``: Hugging Face folder to checkpoint and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from jaxllm.cli.errors import UserError

if TYPE_CHECKING:
    from jaxllm.model.functional import LanguageModel

Kind = Literal["hf", "jaxllm"]


@dataclass(frozen=True)
class Args:
    """Convert a model between a Hugging Face folder and a checkpoint of float32 masters, as training keeps them.

    Attributes:
        source: a Hugging Face folder, a run folder, or a folder of checkpoints (the newest sound one is taken).
        target: the folder to write; made if it is not there.
        to: what to write; the default is the other kind than the source.
        dtype: of a Hugging Face folder's tensors; the default keeps each parameter's own.
        family: of a Hugging Face folder; the default is the first that expresses the model.
        tokenizer: a tokenizer.json or its folder; the default is the one beside the source's weights.
    """

    source: Positional[Path]
    target: Positional[Path]
    to: Kind | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    family: Literal["llama", "qwen2", "qwen3", "nemotron_h", "mamba2", "jet_nemotron"] | None = None
    tokenizer: Path | None = None


def kind_of(source: Path) -> Kind:
    """What a folder holds.

    Raises:
        UserError: no such folder, or neither kind of model in it.
    """
    if not source.is_dir():
        raise UserError("source", str(source), "a folder", "There is no such folder.")
    from jaxllm.generation.folders import checkpoints_in

    if checkpoints_in(source) is not None:
        return "jaxllm"
    if (source / "config.json").is_file():
        return "hf"
    raise UserError(
        "source",
        str(source),
        "a Hugging Face folder (config.json and safetensors) or a run folder (checkpoints/)",
        f"It holds {', '.join(sorted(path.name for path in source.iterdir())[:6]) or 'nothing'}.",
    )


def read(source: Path, kind: Kind, tokenizer: Path | None) -> "LanguageModel":
    """The model in ``source`` with its tokenizer, where there is one; its parameters stay on disk."""
    from jaxllm import hf
    from jaxllm.data.tokenizer import Tokenizer
    from jaxllm.generation.folders import load_checkpoint

    model = hf.load(source, deferred=True) if kind == "hf" else load_checkpoint(source, deferred=True)
    if tokenizer is not None:
        model.tokenizer = Tokenizer.load(tokenizer)
        model.chat_template = model.tokenizer.chat_template
    if model.tokenizer is not None and model.tokenizer.vocab_size > model.cfg.vocab_size:
        raise UserError(
            "--tokenizer",
            str(tokenizer or source),
            f"one of at most the model's {model.cfg.vocab_size} ids; this has {model.tokenizer.vocab_size}",
        )
    return model


def write_checkpoint(model: "LanguageModel", target: Path) -> Path:
    """A run folder with one checkpoint of step 0: float32 parameters, no optimiser state.

    Raises:
        UserError: the folder is not empty.
    """
    import jax
    import jax.numpy as jnp

    from jaxllm.train.checkpoint import Checkpoints
    from jaxllm.train.state import TrainState

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            "target", str(target), "a new or empty folder", "Give another name, or remove it first."
        )
    params = jax.tree.map(lambda p: p.astype(jnp.float32), model.params)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params, (), zero, jax.random.key_data(jax.random.key(0)), zero, zero)
    with Checkpoints(target / "checkpoints", background=False) as checkpoints:
        checkpoints.save(0, state, {"model": model.cfg.to_dict()})
    (target / "config.json").write_text(model.cfg.to_json(), encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save(target)
    return target


def _show(model: "LanguageModel", args: Args, written: Kind) -> None:
    from jaxllm.cli.display import count, make_console, short, size, table
    from jaxllm.model.functional import flatten

    parameters = sum(leaf.size for leaf in flatten(model.params).values())
    files = [file for file in args.target.rglob("*") if file.is_file()]
    made = table("converted", "")
    made.add_row("from", str(args.source))
    made.add_row("to", str(args.target))
    made.add_row("kind", "Hugging Face folder" if written == "hf" else "jaxllm checkpoint")
    made.add_row("pattern", model.cfg.pattern)
    made.add_row("parameters", f"{count(parameters)} ({short(parameters)})")
    made.add_row(
        "tokenizer", "none" if model.tokenizer is None else f"{count(model.tokenizer.vocab_size)} ids"
    )
    made.add_row("written", f"{len(files)} files, {size(sum(file.stat().st_size for file in files))}")
    make_console().print(made)


def run(args: Args) -> int:
    """Convert, and say what was written."""
    kind = kind_of(args.source)
    target_kind: Kind = args.to or ("jaxllm" if kind == "hf" else "hf")
    if target_kind == "jaxllm":
        for name in ("dtype", "family"):
            if getattr(args, name) is not None:
                raise UserError(
                    f"--{name}",
                    getattr(args, name),
                    "only for a Hugging Face folder; a checkpoint holds float32 masters",
                    "Leave it out, or add --to hf.",
                )
    if args.source.resolve() == args.target.resolve():
        raise UserError("target", str(args.target), "another folder than the source")
    model = read(args.source, kind, args.tokenizer)
    if target_kind == "jaxllm":
        write_checkpoint(model, args.target)
    else:
        from jaxllm import hf

        hf.save(model, args.target, family=args.family, dtype=args.dtype)
    _show(model, args, target_kind)
    return 0

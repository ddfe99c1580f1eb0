"""What ``jaxllm train`` does: data, model, training, export, and a closing table."""

from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console

from jaxllm import hf
from jaxllm.cli import machine
from jaxllm.cli.display import bold, count, duration, make_console, number, short, table
from jaxllm.cli.loss_curve import draw, read_points
from jaxllm.cli.model_parts import parameter_count
from jaxllm.cli.precision import device_precision
from jaxllm.cli.quickstart.report import write
from jaxllm.cli.train_run import TrainRun
from jaxllm.cli.training_display import TrainingDisplay
from jaxllm.cli.training_events import Watcher
from jaxllm.cli.validation import Validation
from jaxllm.config import ConfigError, ModelConfig
from jaxllm.data.loader import Loader
from jaxllm.data.prepare import PreparedData, prepare_data
from jaxllm.generation.folders import load
from jaxllm.model.functional import LanguageModel, Params, stack
from jaxllm.train.elastic import elastic_fit
from jaxllm.train.failover import FailoverSettings
from jaxllm.train.placement import gathered, placement
from jaxllm.train.settings import FitResult
from jaxllm.train.trainer import fit
from parallel.failover.membership import Member
from parallel.mesh import row_share
from parallel.sharding import Placement


def model_for(run: TrainRun, data: PreparedData) -> ModelConfig:
    """The run's model with the tokenizer's vocabulary and the device's precision, where the file leaves them open.

    Raises:
        ConfigError: the vocabulary that was given is smaller than the tokenizer's.
    """
    cfg, entries = run.model, data.tokenizer.vocab_size
    if not run.fixed_precision:
        cfg = cfg.replace(precision=device_precision())
    if not run.fixed_vocabulary:
        return cfg.replace(vocab_size=-(-entries // 64) * 64)
    if cfg.vocab_size < entries:
        raise ConfigError(
            f"model.vocab_size={cfg.vocab_size}: the tokenizer has {entries} entries; leave it out, or give more"
        )
    return cfg


class Supervised(NamedTuple):
    """This process is one of a supervisor's workers, and what it does about those that die."""

    member: Member
    failover: FailoverSettings


def train(run: TrainRun, supervised: Supervised | None = None) -> int:
    """Train, export and report; the exit code is 130 after Ctrl-C."""
    # Before the first world there is one process, and its devices are none of that world.
    first = supervised.member.worker == 0 if supervised is not None else jax.process_index() == 0
    console = make_console(quiet=not first)
    initial = None if run.init is None else load(run.init)
    tokenizer = run.data.tokenizer or (initial and initial.tokenizer)
    if initial is not None and tokenizer is None:
        raise ConfigError(
            f"init={str(run.init)!r}: the folder has no tokenizer.json, and a new one would not fit the model's "
            "embeddings; give the model's own as data.tokenizer"
        )
    with console.status("reading the corpus, training or loading its tokenizer"):
        data = prepare_data(run.data.source, tokenizer=tokenizer, vocab_size=run.data.vocab_size)
    cfg = model_for(run, data)
    family = _family(cfg, console)
    total = parameter_count(cfg)
    console.print(
        f"data   {data.corpus.name}: {count(len(data.train))} training tokens, {count(len(data.validation))} for validation"
    )
    console.print(
        f"model  {cfg.pattern}: {count(total)} parameters ({short(total)}), vocabulary {count(cfg.vocab_size)}"
    )
    if first:
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
        data.tokenizer.save(run.out)
    place = None if supervised is not None else placement(cfg, run.trainer.mesh)
    params = None if initial is None else initial.params
    result, validation, watcher = _fit(run, cfg, data, console, params, place, supervised)
    first = jax.process_index() == 0
    if result.interrupted is not None:
        console.print(
            f"\nStopped at step {count(result.step)} ({result.interrupted}); everything is saved. Go on with:\n"
        )
        console.print(bold(f"    jaxllm train {run.out / 'run.yaml'} --resume"))
        return 130
    with console.status("validation loss"):
        loss = validation.whole(stack(cfg, result.params))
    params = gathered(result.params, place) if family is not None else None
    if not first:
        return 0
    if family is not None:
        hf.save(LanguageModel(result.cfg, params, data.tokenizer), run.out / "hf", family=family)
    _close(run, result, validation, watcher, loss, console)
    return 0


def _family(cfg: ModelConfig, console: Console) -> str | None:
    """The Hugging Face family of the export, known before the training starts."""
    try:
        return hf.choose_family(cfg)
    except ConfigError:
        console.print(
            "No Hugging Face family expresses this model: there will be no hf/ folder, only checkpoints."
        )
        return None


def _fit(
    run: TrainRun,
    cfg: ModelConfig,
    data: PreparedData,
    console: Console,
    params: Params | None,
    place: Placement | None,
    supervised: Supervised | None,
) -> tuple[FitResult, Validation, Watcher]:
    batches = run.data
    # Devices that share documents have tokens of all their group's rows: the loader is then asked for whole batches, whose
    # tokens are read where they are wanted.
    share = (0, 1) if place is None or place.size("context") > 1 else row_share(place.mesh)
    loader = Loader(
        data.train,
        batches.batch_size,
        batches.seq_len,
        seed=batches.seed,
        depths=1 + run.trainer.step.depths(cfg),
        prefetch=batches.prefetch,
        process_index=share[0],
        process_count=share[1],
    )

    def make_validation() -> Validation:
        return Validation(
            cfg,
            data.validation,
            data.tokenizer,
            batch_size=batches.batch_size,
            seq_len=batches.seq_len,
            part=batches.evaluation_tokens,
            place=place,
            context=run.trainer.context,
        )

    validation = make_validation()
    display = TrainingDisplay(console, validation.bits_per_nat)
    watcher = Watcher(display, run.trainer.seconds if run.trainer.steps is None else None)
    with display:
        if supervised is not None:
            result = elastic_fit(
                *supervised,
                cfg,
                run.optim,
                loader,
                run.trainer,
                folder=run.out,
                evaluation=lambda: make_validation().partial,
                callbacks=[watcher],
                params=None if params is None else jax.tree.map(np.asarray, params),
            )
            return result, validation, watcher
        result = fit(
            cfg,
            run.optim,
            loader,
            run.trainer,
            folder=run.out,
            evaluate=validation.partial,
            callbacks=[watcher],
            params=params,
        )
    loader.close()
    return result, validation, watcher


def _close(
    run: TrainRun, result: FitResult, validation: Validation, watcher: Watcher, loss: float, console: Console
) -> None:
    scale = validation.bits_per_nat
    trained = result.step * run.data.batch_size * run.data.seq_len
    figures = {
        "parameters": parameter_count(result.cfg),
        "steps": result.step,
        "train_tokens": trained,
        "train_seconds": result.elapsed,
        "compile_seconds": watcher.compile_seconds,
        "train_loss": watcher.figures.loss,
        "validation_loss": loss,
        "validation_bits_per_byte": loss * scale,
    }
    write(
        run.out / "figures.json",
        {
            "versions": machine.versions(),
            "machine": machine.describe(),
            "device": machine.devices(),
            "figures": figures,
        },
    )
    points = read_points(run.out / "metrics.jsonl", run.data.batch_size * run.data.seq_len)
    draw(
        run.out / "loss.png",
        points["loss"],
        points["validation_loss"],
        title=str(run.out),
        loads=points["imbalance"],
        bits_per_nat=scale,
    )
    made = table("measured", "", right=(1,))
    made.add_row(
        "training", f"{duration(result.elapsed)}, {count(result.step)} steps, {count(trained)} tokens"
    )
    made.add_row("compilation, not in the above", duration(watcher.compile_seconds))
    made.add_row("training loss", f"{number(watcher.figures.loss)} nats/token")
    made.add_row(bold("validation loss"), bold(f"{loss:.3f} nats/token, {loss * scale:.3f} bits/byte"))
    made.add_row("run folder", str(run.out))
    console.print(made)

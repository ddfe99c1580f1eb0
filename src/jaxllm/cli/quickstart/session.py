"""The stages of the quickstart, one after the other."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax
from rich.console import Console

from jaxllm import hf
from jaxllm.cli import accelerators, machine
from jaxllm.cli.display import bold, count, duration, make_console, short, size, table
from jaxllm.cli.doctor import show_advice
from jaxllm.cli.errors import UserError
from jaxllm.cli.model_parts import parameter_count
from jaxllm.cli.precision import device_precision
from jaxllm.cli.quickstart import Args, report
from jaxllm.cli.quickstart.baselines import Baseline, measure_baselines, seen_documents
from jaxllm.cli.quickstart.closing import inputs, measured, picture
from jaxllm.cli.quickstart.completion import Completion, complete
from jaxllm.cli.quickstart.record import Record, choose_folder
from jaxllm.cli.quickstart.settings import for_backend, override
from jaxllm.cli.training_display import TrainingDisplay
from jaxllm.cli.training_events import Watcher
from jaxllm.cli.validation import Validation
from jaxllm.config import ModelConfig, Precision
from jaxllm.data.loader import Loader
from jaxllm.data.prepare import PreparedData, prepare_data
from jaxllm.data.store import cache_folder
from jaxllm.model.functional import LanguageModel, init_params, stack
from jaxllm.presets import preset
from jaxllm.train.memory import estimate_training_memory
from jaxllm.train.optim import OptimConfig
from jaxllm.train.placement import placement
from jaxllm.train.settings import FitResult, TrainSettings
from jaxllm.train.state import master_config
from jaxllm.train.step import StepSettings
from jaxllm.train.trainer import fit

MINUTES = 5.0


class Session:
    """One quickstart run."""

    def __init__(self, args: Args, console: Console | None = None):
        """Decides what will run; trains nothing yet.

        Raises:
            UserError, ConfigError: an argument cannot be used.
        """
        self.args = args
        self.console = console or make_console()
        self.folder = choose_folder(args.out, args.resume, "quickstart")
        self.seconds: dict[str, float] = {}
        self.backend = jax.default_backend()
        self.record = Record.read(self.folder, args.minutes) if args.resume else self._new_record()

    def _new_record(self) -> Record:
        args = self.args
        settings = for_backend(self.backend)
        settings = replace(settings, preset=args.preset) if args.preset else settings
        settings, model = override(settings, preset(settings.preset), args.set)
        minutes = MINUTES if args.minutes is None else args.minutes
        return Record(minutes, args.data, args.seed, settings, model)

    def run(self) -> int:
        """All stages. The exit code is 130 after Ctrl-C in training, else 0."""
        self._greet()
        with self._stage("data", "Data"):
            data = self._data()
        with self._stage("model", "Model"):
            cfg = self._model(data)
            validation, compiled = self._validation(cfg, data)
        with self._stage("training", f"Training for {self.record.minutes:g} minutes"):
            loader = self._loader(cfg, data)
            result, watcher = self._train(cfg, data, loader, validation)
        if result.interrupted is not None:
            self._how_to_go_on(result)
            return 130
        with self._stage("evaluation", "Export and measurement"):
            loss_after = validation.whole(stack(cfg, result.params))
            model = self._export(result, data)
            rows = result.step * self.record.settings.batch_size
            baselines = measure_baselines(data, seen_documents(loader.rows, rows))
        with self._stage("completion", "A completion"):
            completion = self._complete(model)
        outcome = self._outcome(cfg, data, result, watcher, compiled, loss_after, validation, completion)
        self._report(outcome, baselines, data, cfg, completion)
        return 0

    @contextmanager
    def _stage(self, key: str, title: str) -> Iterator[None]:
        self.console.print(bold(f"\n{len(self.seconds) + 1}  {title}"))
        begin = time.perf_counter()
        yield
        self.seconds[key] = time.perf_counter() - begin

    def _say(self, text: str) -> None:
        self.console.print(f" {text}")

    def _greet(self) -> None:
        here = machine.describe()
        device = jax.devices()[0]
        name = (
            f"{here['cpu']}, {here['cores']} cores" if device.platform == "cpu" else f"{device.device_kind}"
        )
        versions = machine.versions()
        self.console.print(
            bold(f"jaxllm {versions['jaxllm']} quickstart")
            + f", JAX {versions['jax']} on {device.platform}: {name}"
        )
        found = accelerators.advice(self.backend)
        if found is not None:
            show_advice(self.console, *found)

    def _data(self) -> PreparedData:
        before = set(cache_folder("tokenizers").glob("*.json"))
        with self.console.status("reading the corpus, training or loading its tokenizer"):
            data = prepare_data(self.record.data, vocab_size=self.record.settings.vocab_size)
        reused = set(cache_folder("tokenizers").glob("*.json")) == before
        source = (
            f"the standard library of Python {machine.versions()['python']}"
            if data.corpus.name == "stdlib"
            else data.corpus.name
        )
        self._say(f"{source}: {count(data.corpus.files)} documents")
        splits = table("split", "documents", "bytes", "tokens", "sha256", right=(1, 2, 3))
        for (name, split), tokens in zip(data.corpus.report().items(), (data.train, data.validation)):
            splits.add_row(
                name,
                count(int(split["documents"])),
                count(int(split["bytes"])),
                count(len(tokens)),
                str(split["sha256"])[:16],
            )
        self.console.print(splits)
        how = "reused from the cache" if reused else "trained and cached"
        self._say(f"byte-level BPE tokenizer of {count(data.tokenizer.vocab_size)} entries, {how}")
        return data

    def _model(self, data: PreparedData) -> ModelConfig:
        record, settings = self.record, self.record.settings
        assert record.model is not None
        precision = device_precision(settings.matmul)
        cfg = record.model.replace(vocab_size=-(-data.tokenizer.vocab_size // 64) * 64, precision=precision)
        # Asked now, so that a model without a Hugging Face form does not train first and fail at its export.
        hf.choose_family(cfg)
        self._check_memory(cfg)
        total = parameter_count(cfg)
        products = "bfloat16" if precision.operand else "float32"
        self._say(
            f"{cfg.pattern}, width {cfg.hidden_size}: {count(total)} parameters ({short(total)}), {products} products"
        )
        self._say(f"{settings.batch_size} rows of {settings.seq_len} tokens per step")
        return cfg

    def _check_memory(self, cfg: ModelConfig) -> None:
        settings = self.record.settings
        needed = estimate_training_memory(
            cfg, settings.batch_size, settings.seq_len, jax.device_count()
        ).total
        limit = machine.devices()[0]["memory_bytes"] or (
            machine.memory_bytes() if self.backend == "cpu" else None
        )
        if limit is not None and needed > limit:
            raise UserError(
                "--preset",
                settings.preset,
                f"a model that trains in {size(limit)}; this one needs about {size(needed)}",
                "Choose a smaller --preset, or a smaller --set batch_size=N seq_len=N.",
            )

    def _validation(self, cfg: ModelConfig, data: PreparedData) -> tuple[Validation, float]:
        settings = self.record.settings
        validation = Validation(
            cfg,
            data.validation,
            data.tokenizer,
            batch_size=settings.batch_size,
            seq_len=settings.seq_len,
            part=settings.evaluation_tokens,
            place=placement(cfg),
        )
        with self.console.status("compiling the evaluation"):
            compiled = validation.compile()
        if self.record.loss_before is None:
            with self.console.status("validation loss before training"):
                before = validation.whole(init_params(master_config(cfg), self.record.seed))
            self.record = replace(self.record, model=cfg, loss_before=before)
        self.record.write(self.folder)
        before = self.record.loss_before
        assert before is not None
        self._say(
            f"validation loss before training: {before:.3f} nats, {before * validation.bits_per_nat:.3f} bits/byte"
        )
        return validation, compiled

    def _loader(self, cfg: ModelConfig, data: PreparedData) -> Loader:
        settings, depths = self.record.settings, 1 + StepSettings().depths(cfg)
        rows = settings.batch_size, settings.seq_len
        return Loader(data.train, *rows, seed=self.record.seed, depths=depths, prefetch=2)

    def _train(
        self, cfg: ModelConfig, data: PreparedData, loader: Loader, validation: Validation
    ) -> tuple[FitResult, Watcher]:
        settings, seconds = self.record.settings, self.record.minutes * 60
        optim = OptimConfig(
            lr=settings.lr,
            betas=(0.9, settings.beta2),
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            decay_fraction=settings.decay_fraction,
            min_lr_ratio=0.0,
        )
        plan = TrainSettings(
            seconds=seconds,
            eval_seconds=seconds / settings.evaluations,
            save_seconds=120.0,
            seed=self.record.seed,
        )
        data.tokenizer.save(self.folder)
        display = TrainingDisplay(self.console, validation.bits_per_nat)
        watcher = Watcher(display, seconds)
        with display:
            result = fit(
                cfg, optim, loader, plan, folder=self.folder, evaluate=validation.partial, callbacks=[watcher]
            )
        loader.close()
        if result.interrupted is None:
            self._say(
                f"{count(result.step)} steps in {duration(result.elapsed)}; the learning rate has come down to zero"
            )
        return result, watcher

    def _how_to_go_on(self, result: FitResult) -> None:
        self.console.print(
            f"\nStopped at step {count(result.step)} ({result.interrupted}); everything is saved. Go on with:\n"
        )
        self.console.print(bold(f"    jaxllm quickstart --resume --out {self.folder}"))

    def _export(self, result: FitResult, data: PreparedData) -> LanguageModel:
        model = LanguageModel(result.cfg, result.params, data.tokenizer)
        hf.save(model, self.folder / "hf")
        self._say(f"Hugging Face folder: {self.folder / 'hf'}")
        return model

    def _complete(self, model: LanguageModel) -> Completion:
        if self.backend == "cpu":
            # A product with one row is memory-bound: rounding its weights to bfloat16 first only costs time.
            model = replace(model, cfg=model.cfg.replace(precision=Precision()))
        args = self.args
        return complete(
            self.console, model, args.prompt, tokens=args.tokens, temperature=args.temperature, seed=args.seed
        )

    def _outcome(
        self,
        cfg: ModelConfig,
        data: PreparedData,
        result: FitResult,
        watcher: Watcher,
        compiled: float,
        loss_after: float,
        validation: Validation,
        completion: Completion,
    ) -> report.Outcome:
        settings = self.record.settings
        trained = result.step * settings.batch_size * settings.seq_len
        assert self.record.loss_before is not None
        return report.Outcome(
            parameters=parameter_count(cfg),
            steps=result.step,
            train_tokens=trained,
            unique_tokens=min(trained, len(data.train)),
            train_seconds=result.elapsed,
            compile_seconds=compiled + watcher.compile_seconds,
            tokens_per_second=trained / result.elapsed,
            train_loss=watcher.figures.loss,
            loss_before=self.record.loss_before,
            loss_after=loss_after,
            bits_per_nat=validation.bits_per_nat,
            first_token_seconds=completion.first_token_seconds,
            decode_tokens_per_second=completion.tokens_per_second,
        )

    def _report(
        self,
        outcome: report.Outcome,
        baselines: list[Baseline],
        data: PreparedData,
        cfg: ModelConfig,
        completion: Completion,
    ) -> None:
        content = {
            "inputs": inputs(self.args, self.record, cfg, data),
            **measured(outcome, baselines),
            "stage_seconds": self.seconds,
            "completion": completion.text,
        }
        paths = {
            "checkpoint (Orbax)": self.folder / "checkpoints",
            "Hugging Face folder": self.folder / "hf",
            "loss curve": picture(self.folder, self.record, outcome, baselines),
            "all figures": report.write(self.folder / "figures.json", content),
            "metrics of every step": self.folder / "metrics.jsonl",
        }
        self.console.print()
        report.show(self.console, outcome, baselines, paths)
        self.console.print(f"Try it: jaxllm generate {self.folder} --prompt 'import '\n")

"""The host loop: when it stops, what it reports, how it goes on, what it says when it cannot."""

import json
import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxllm.config import ConfigError
from jaxllm.train import trainer
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.events import CompileEvent, EvalEvent, SaveEvent, StepEvent
from jaxllm.train.interrupt import StopRequest
from jaxllm.train.memory import OutOfMemory
from jaxllm.train.optim import OptimConfig
from jaxllm.train.report import TrainingDiverged
from jaxllm.train.settings import TrainSettings
from jaxllm.train.state import state_of
from jaxllm.train.step import make_train_step
from jaxllm.train.trainer import fit
from jaxllm.train.writers import read_jsonl
from tests.train.tiny import TinyLoader, assert_identical

MANY = 100_000


def run(cfg, optim, loader=None, **settings):
    """(result, events) of a run without a folder."""
    events = []
    more = {k: settings.pop(k) for k in ("folder", "evaluate", "params", "files", "resume") if k in settings}
    callbacks = [events.append, *settings.pop("callbacks", [])]
    result = fit(cfg, optim, loader or TinyLoader(), TrainSettings(**settings), callbacks=callbacks, **more)
    return result, events


def steps_of(events):
    return [event.step for event in events if isinstance(event, StepEvent)]


def test_reports_every_step_once_in_order(cfg, optim):
    calls = []

    def evaluate(params, step):
        calls.append(step)
        return {"loss": float(np.asarray(jax.tree.leaves(params)[0]).sum())}

    result, events = run(cfg, optim, steps=13, eval_every=5, evaluate=evaluate)
    assert steps_of(events) == list(range(1, 14))
    assert calls == [5, 10, 13]
    assert isinstance(events[0], CompileEvent) and events[0].resumed_from is None
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [s.progress for s in steps] == pytest.approx([i / 13 for i in range(1, 14)])
    assert result.tokens_seen == steps[-1].tokens_seen == sum(s.tokens for s in steps)
    assert result.loss == steps[-1].loss and result.how_to_go_on is None
    assert steps[-1].mfu is not None and 0 < steps[-1].mfu < 1
    # An evaluation comes after all the events of the steps before it.
    place = next(i for i, e in enumerate(events) if isinstance(e, EvalEvent))
    assert steps_of(events[:place]) == [1, 2, 3, 4, 5]


def test_stopped_and_resumed_is_uninterrupted(tmp_path, cfg, optim):
    whole, _ = run(cfg, optim, steps=9)
    run(cfg, optim, steps=4, folder=tmp_path, files={"tokenizer.json": b"{}"})
    assert (tmp_path / "tokenizer.json").read_bytes() == b"{}"
    with pytest.raises(ConfigError, match=r"resume=False.*step 4"):
        run(cfg, optim, steps=9, folder=tmp_path, resume=False)
    resumed, events = run(cfg, optim, steps=9, folder=tmp_path, save_every=2)
    assert events[0].resumed_from == 4
    assert [e.step for e in events if isinstance(e, SaveEvent)] == [6, 8, 9]
    assert_identical(resumed.params, whole.params)
    assert resumed.tokens_seen == whole.tokens_seen
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10))
    with pytest.raises(ConfigError, match="hidden_size was 16, is 32"):
        run(cfg.replace(hidden_size=32), optim, steps=12, folder=tmp_path)


def test_clock_stops_the_run_and_drives_the_schedule(cfg):
    optim = OptimConfig(lr=0.01, warmup_steps=1, decay_fraction=1.0, min_lr_ratio=0.0)
    result, events = run(cfg, optim, seconds=0.5)
    rates = [event.lr for event in events if isinstance(event, StepEvent)]
    assert 0.5 <= result.elapsed < 5.0
    assert len(rates) > 2 and rates == sorted(rates, reverse=True) and rates[-1] < rates[0] / 2


def test_evaluation_and_compilation_do_not_count(cfg, optim, monkeypatch):
    import time

    def slow(params, step):
        time.sleep(0.3)
        return {}

    result, _ = run(cfg, optim, steps=2, eval_every=1, evaluate=slow)
    with_pauses = result.elapsed
    assert with_pauses < 0.3


def test_skips_are_counted_and_too_many_end_the_run(cfg, optim):
    result, events = run(cfg, optim, TinyLoader(poison=frozenset({1, 3})), steps=5, max_consecutive_skips=2)
    assert [event.skipped for event in events if isinstance(event, StepEvent)] == [0, 1, 1, 2, 2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    with pytest.raises(TrainingDiverged, match=r"2 steps in a row, up to step 4.*Lower lr=0.01"):
        run(cfg, optim, TinyLoader(poison=frozenset({2, 3})), steps=9, max_consecutive_skips=2)


def test_first_signal_saves_second_aborts(tmp_path, cfg, optim):
    def stop(event):
        if isinstance(event, StepEvent) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    result, _ = run(cfg, optim, steps=MANY, folder=tmp_path, callbacks=[stop])
    assert result.interrupted == "SIGTERM" and 3 <= result.step <= 5
    assert str(tmp_path) in result.how_to_go_on
    assert Checkpoints(tmp_path / "checkpoints").steps() == [result.step]
    assert signal.getsignal(signal.SIGTERM) is before
    with StopRequest() as request, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        while request.name is None:
            pass
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass


def test_out_of_memory_names_the_largest_buffers(cfg, optim, monkeypatch):
    class Full:
        def lower(self, *_):
            return self

        def compile(self):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr(trainer, "make_train_step", lambda *_, **__: Full())
    with pytest.raises(OutOfMemory, match="the largest are") as error:
        run(cfg, optim, steps=2)
    text = str(error.value)
    assert text.count("MiB (lower with") == 3
    assert "a smaller batch" in text and "allocating 123 bytes" in text


def test_schedule_without_a_length_is_refused(cfg):
    with pytest.raises(ConfigError, match=r"optim\.total_steps=None"):
        run(cfg, OptimConfig())


def test_starts_from_given_parameters(cfg, optim):
    start, _ = run(cfg, optim, steps=1, seed=1)
    kept = jax.tree.map(np.asarray, start.params)
    again, _ = run(cfg, optim, steps=1, params=start.params)
    assert_identical(start.params, kept)
    # They are all that is taken over: what follows is the first step of a new optimiser.
    first = make_train_step(cfg, replace(optim, total_steps=1))
    state, _ = first(state_of(kept, optim), next(TinyLoader()), None)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), again.params, state.params
    )
    fresh, _ = run(cfg, optim, steps=1)
    assert not np.array_equal(jax.tree.leaves(again.params)[0], jax.tree.leaves(fresh.params)[0])


def test_tensorboard_and_bad_values(tmp_path, cfg, optim):
    poisoned = TinyLoader(poison=frozenset({0}))
    run(cfg, optim, poisoned, steps=2, folder=tmp_path, tensorboard=True, save_seconds=None)
    assert list((tmp_path / "tensorboard").glob("events*"))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] is None and first["skipped"] == 1


@pytest.mark.parametrize("change", [{"keep": 1}, {"seconds": 0.0}, {"profile": (3, 2)}, {"steps": 0}])
def test_bad_settings_name_the_field(change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))}="):
        TrainSettings(**change)

"""The YAML of ``jaxllm train``: what it may say, and the message for what it may not."""

from pathlib import Path

import pytest
import yaml

from jaxllm.cli import field_types
from jaxllm.cli.errors import UserError
from jaxllm.cli.train import Args, configure, parse_profile
from jaxllm.cli.train_run import EXAMPLE, TrainRun, build, example, read
from jaxllm.cli.training_events import assignment_text
from jaxllm.config import ConfigError, ModelConfig
from jaxllm.presets import preset
from jaxllm.train.events import AssignmentEvent

MINIMAL = {"model": "quickstart", "trainer": {"steps": 10}}
# Three devices divide no number of key heads.
SHARED = {**MINIMAL, "mesh": {"context": 3}}


def test_the_example_reads(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(example())
    run = read(file)
    assert run.optim.lr == EXAMPLE["optim"]["lr"] and run.trainer.steps == 2000
    assert run.out == Path("runs/example") and not run.fixed_vocabulary and not run.fixed_precision


def test_example_is_printed_without_a_file(cli):
    shown = cli("train", "--example")
    assert shown.code == 0 and yaml.safe_load(shown.out) == EXAMPLE


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("model.vocab_size=512", "model.precision.matmul=bfloat16"),
        ("trainer.profile=[2, 4]", "mesh.data=2", "mesh.fsdp=2"),
        ("mesh.context=4", "context.strategy=ring", "context.block=64"),
    ],
)
def test_what_a_run_writes_reads_as_the_same_run(changes, tmp_path):
    run = build(dict(MINIMAL), ("optim.lr=1e-3", *changes))
    file = tmp_path / "run.yaml"
    file.write_text(run.to_yaml())
    again = read(file)
    if not run.fixed_vocabulary:
        assert again.model.replace(vocab_size=1) == run.model.replace(vocab_size=1)
        again = TrainRun(**{**vars(again), "model": run.model})
    assert again == run


def test_a_preset_with_some_fields_changed():
    run = build({**MINIMAL, "model": {"preset": "small", "hidden_size": 256, "mamba": {"num_heads": 8}}})
    small = preset("small")
    assert small.mamba is not None and run.model.mamba is not None
    assert (run.model.hidden_size, run.model.mamba.num_heads) == (256, 8)
    assert run.model.mamba.state_size == small.mamba.state_size and run.model.pattern == small.pattern


def test_changes_on_the_command_line_win():
    run = build(
        dict(MINIMAL), ("model.pattern=M-*-", "data.batch_size=2", "trainer.seconds=1e2", "out=elsewhere")
    )
    assert run.model.pattern == "M-*-" and run.data.batch_size == 2
    assert run.trainer.seconds == 100.0 and run.out == Path("elsewhere")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**MINIMAL, "optim": {"lr": "fast"}}, "optim.lr='fast': must be a number"),
        ({**MINIMAL, "optim": {"lr": True}}, "optim.lr=True"),
        ({**MINIMAL, "optim": {"learning_rate": 1}}, "optim.learning_rate: there is no such field"),
        ({**MINIMAL, "optim": {"schedule": "linear"}}, "wsd or cosine or constant"),
        ({**MINIMAL, "optim": {"betas": 0.9}}, "optim.betas=0.9: must be a list"),
        ({**MINIMAL, "optim": 3}, "optim=3"),
        (
            {**MINIMAL, "trainer": {"steps": 1, "step": {"accum_steps": "two"}}},
            "trainer.step.accum_steps='two'",
        ),
        ({**MINIMAL, "trainer": {}}, "trainer.steps and trainer.seconds"),
        ({**MINIMAL, "data": {"batch_size": 0}}, "data.batch_size=0"),
        ({**MINIMAL, "data": {"prefetch": -1}}, "data.prefetch"),
        ({**MINIMAL, "optimizer": {}}, "did you mean 'optim'"),
        ({**MINIMAL, "model": "smal"}, "did you mean 'small'"),
        ({**MINIMAL, "model": {"preset": "small", "mamba": {"heads": 3}}}, "model.mamba.heads"),
        ({**MINIMAL, "model": {"pattern": "M-"}}, "model.hidden_size"),
        ({**MINIMAL, "model": [1]}, "model"),
        ({"trainer": {"steps": 1}}, "model: missing"),
        ({**MINIMAL, "mesh": {"stages": 2}}, "mesh.stages: there is no such field"),
        ({**MINIMAL, "mesh": {"stage": 2}}, "mesh.stage=2: needs stacked layers"),
        ({**MINIMAL, "context": {"block": 8}}, "context: only with devices along mesh.context"),
        ({**SHARED, "context": {"strategy": "spiral"}}, "context.strategy='spiral': fcp, fcp-pairs, ring"),
        ({**SHARED, "context": {"block": 0}}, "context.block=0: must be an integer of at least 1"),
        ({**SHARED, "context": {"strategy": "ulysses"}}, "needs attention.num_kv_heads="),
        (SHARED, "context.block=4096: must be at most the 1365 tokens of a device"),
        (
            {**SHARED, "data": {"batch_size": 5}, "trainer": {"steps": 1, "step": {"accum_steps": 2}}},
            "batch_size=5: must be a multiple of data * fsdp * expert * accum_steps = 1 * 2",
        ),
        ({**SHARED, "trainer": {"steps": 1, "context": {}}}, "context is a section of its own"),
        ({**MINIMAL, "mesh": {"fsdp": 0}}, "mesh.fsdp=0: must be an integer of at least 1"),
        ({**MINIMAL, "mesh": {"expert": 2}}, "mesh.expert=2: pattern="),
        ({**MINIMAL, "mesh": {"tensor": 3}}, "mesh.tensor=3: must divide mamba.num_heads="),
        ({**MINIMAL, "trainer": {"steps": 1, "mesh": {"data": 2}}}, "mesh is a section of its own"),
    ],
)
def test_a_mistake_names_the_field(content, words):
    with pytest.raises(ConfigError) as caught:
        build(content)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "model: [", "3"])
def test_a_file_that_is_no_configuration(text, tmp_path, cli):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    shown = cli("train", str(file))
    assert shown.code == 2 and "YAML" in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["config", "--example"]),
        (["nowhere.yaml"], ["nowhere.yaml", "--example"]),
        (["run.yaml", "--set", "optim.lr"], ["NAME=VALUE"]),
        (["run.yaml", "--set", "optim.lrr=1"], ["optim.lrr"]),
        (["run.yaml", "--profile", "5"], ["--profile", "FROM:TO"]),
        (["run.yaml", "--profile", "5:5"], ["FROM below TO"]),
        (["run.yaml", "--resume"], ["--resume", "no", "checkpoints"]),
    ],
)
def test_mistakes_on_the_command_line(argv, words, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(example())
    shown = cli("train", *argv)
    assert shown.code == 2 and "Traceback" not in shown.err
    text = " ".join(shown.err.replace("│", " ").split())
    assert all(word in text for word in words)


def test_a_finished_folder_is_not_overwritten(tmp_path, cli):
    file = tmp_path / "run.yaml"
    file.write_text(example())
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    shown = cli("train", str(file), "--out", str(tmp_path / "out"))
    assert shown.code == 2 and "--resume" in shown.err


def test_flags_reach_the_trainer(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(example())
    run = configure(Args(config=file, profile="3:7", debug_nans=True, out=tmp_path / "out"))
    assert run.trainer.profile == (3, 7) and run.trainer.debug_nans and run.out == tmp_path / "out"
    assert parse_profile("10:20") == (10, 20)
    run = configure(
        Args(
            config=file,
            set=("mesh.context=2", "context.block=64"),
            context_parallel="zigzag",
            out=tmp_path / "out",
        )
    )
    assert run.trainer.context.strategy == "zigzag" and run.trainer.mesh.context == 2
    with pytest.raises(ConfigError, match=r"only with devices along mesh\.context"):
        configure(Args(config=file, context_parallel="ring", out=tmp_path / "out"))
    with pytest.raises(UserError):
        parse_profile("a:b")


def test_every_value_of_a_real_configuration_passes_the_type_check():
    for name in ("quickstart", "llama-3.2-1b", "mamba2-130m"):
        fields = preset(name).to_dict()
        assert field_types.checked(ModelConfig, fields, "model.") == fields


def test_progress_tells_who_trains_what():
    whole = AssignmentEvent(0, 3, {0: (0,), 1: (1,), 2: (2,)})
    assert assignment_text(whole) == "From step 0: all 3 workers train, each its own shard."
    left = AssignmentEvent(1200, 3, {1: (1, 0), 2: (2,)})
    assert assignment_text(left) == (
        "From step 1,200: 2 of 3 workers left; worker 1 trains shards 1 and 0, worker 2 trains shard 2."
    )
    staged = AssignmentEvent(0, 4, {0: (0,), 1: (1,), 2: (2,), 3: (3,)}, stages=2)
    assert assignment_text(staged) == "From step 0: all 4 workers train, each its own stage."
    left = AssignmentEvent(7, 6, {0: (0, 1), 2: (2,), 3: (3,), 5: ()}, stages=2)
    assert assignment_text(left) == (
        "From step 7: 4 of 6 workers left; worker 0 runs stages 0 and 1 of replica 0, worker 2 runs stage 0 of replica 1, "
        "worker 3 runs stage 1 of replica 1, worker 5 waits for a neighbour."
    )

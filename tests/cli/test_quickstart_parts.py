"""The quickstart's parts that need no training: settings, baselines, figures, picture, progress."""

import io
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxllm.cli import overrides
from jaxllm.cli.errors import UserError
from jaxllm.cli.loss_curve import bits_per_nat, draw, read_points
from jaxllm.cli.precision import precision_for
from jaxllm.cli.quickstart import Args, report
from jaxllm.cli.quickstart.baselines import Baseline, measure_baselines, seen_documents
from jaxllm.cli.quickstart.record import Record, choose_folder
from jaxllm.cli.quickstart.settings import CPU, for_backend, override
from jaxllm.cli.training_display import Figures, TrainingDisplay, sparkline
from jaxllm.config import ConfigError
from jaxllm.data.corpus import Corpus, Document, Documents
from jaxllm.data.packing import RowSource
from jaxllm.data.prepare import PreparedData
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.data.tokens import TokenCorpus
from jaxllm.presets import preset

TEXTS = ["def f(x):\n    return x + 1\n" * 9, "for i in range(10):\n    print(i)\n" * 5, "x = 1\n"]


def prepared() -> PreparedData:
    """A corpus of a few lines, with a tokenizer of bytes alone."""
    tokenizer = Tokenizer.train(TEXTS, 259)
    tokens = TokenCorpus.from_documents(
        tokenizer.encode_batch(TEXTS, bos=True, eos=True), tokenizer.vocab_size
    )
    split = Documents(tuple(Document(str(i), text) for i, text in enumerate(TEXTS)))
    return PreparedData(Corpus("tiny", split, split), tokenizer, tokens, tokens)


def test_seen_documents_are_the_pairs_that_were_trained_on():
    data = prepared()
    rows = RowSource(data.train, 32, seed=3)
    tokens, offsets = seen_documents(rows, 4)
    pairs = []
    for row in (rows[i] for i in range(4)):
        kept = row["loss_mask"] > 0
        pairs += list(zip(row["tokens"][kept], row["targets"][kept, 0]))
    found = []
    for begin, end in pairwise(offsets):
        found += list(zip(tokens[begin : end - 1], tokens[begin + 1 : end]))
    assert sorted(found) == sorted(pairs)


def test_a_whole_epoch_is_the_corpus_and_repetitions_do_not_count():
    data = prepared()
    rows = RowSource(data.train, 32, seed=3)
    for count in (rows.rows_per_epoch, 7 * rows.rows_per_epoch):
        tokens, offsets = seen_documents(rows, count)
        assert np.array_equal(tokens, data.train.tokens) and np.array_equal(offsets, data.train.offsets)


def test_baselines_measure_the_validation_text():
    data = prepared()
    told: list[str] = []
    found = {b.key: b for b in measure_baselines(data, (data.train.tokens, data.train.offsets), told.append)}
    assert list(found) == ["gzip", "xz", "bigram", "trigram"] and len(told) == 4
    scale = bits_per_nat(data.validation.n_targets, sum(len(text) for text in TEXTS))
    for key in ("bigram", "trigram"):
        nats = found[key].nats_per_token
        assert nats is not None and math.isclose(found[key].bits_per_byte, nats * scale)
    assert found["trigram"].bits_per_byte < found["bigram"].bits_per_byte < 8


OUTCOME = report.Outcome(
    parameters=1000,
    steps=10,
    train_tokens=2000,
    unique_tokens=1500,
    train_seconds=60.0,
    compile_seconds=5.0,
    tokens_per_second=33.3,
    train_loss=4.0,
    loss_before=8.0,
    loss_after=4.0,
    bits_per_nat=0.4,
)
BASELINES = [
    Baseline("gzip", "gzip -9", 1.9),
    Baseline("xz", "xz -9", 1.5),
    Baseline("bigram", "bigram", 1.7, 4.2),
]


def test_losing_is_said_in_the_table_and_the_figures(tmp_path):
    assert report.verdicts(OUTCOME, BASELINES) == {
        "beats_gzip": True,
        "beats_xz": False,
        "beats_bigram": True,
    }
    text = io.StringIO()
    report.show(Console(file=text, width=100, markup=False), OUTCOME, BASELINES, {"model [hf]": tmp_path})
    shown = text.getvalue()
    assert "not beaten" in shown and "model [hf]" in shown and "1.600" in shown
    figures = report.figures(OUTCOME, BASELINES)
    assert figures["bits_per_byte_after"] == pytest.approx(1.6) and figures["bigram_nats_per_token"] == 4.2
    written = report.write(tmp_path / "figures.json", figures)
    assert json.loads(written.read_text()) == figures


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--minutes", "0"], ["--minutes", "above 0"]),
        (["--minutes", "nan"], ["--minutes"]),
        (["--tokens", "0"], ["--tokens"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--prompt", ""], ["--prompt"]),
        (["--seed", "-1"], ["--seed"]),
    ],
)
def test_values_out_of_range(argv, words, cli):
    shown = cli("quickstart", *argv)
    assert shown.code == 2 and "Traceback" not in shown.err
    assert all(word in shown.err for word in words)


def test_settings_and_model_can_be_overridden():
    settings, model = override(
        CPU, preset("quickstart"), ("batch_size=16", "lr=1e-3", "model.mamba.num_heads=4")
    )
    assert (settings.batch_size, settings.lr) == (16, 1e-3)
    assert model.mamba is not None and model.mamba.num_heads == 4
    assert replace(settings, batch_size=CPU.batch_size, lr=CPU.lr) == CPU


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("batch_size", "NAME=VALUE"),
        ("bach_size=3", "bach_size"),
        ("batch_size=0", "batch_size"),
        ("model.mamba.heads=3", "model.mamba.heads"),
        ("model=3", "model"),
        ("model.hidden_size.x=3", "has no fields"),
    ],
)
def test_wrong_overrides_name_the_field(change, words):
    with pytest.raises((UserError, ConfigError), match=words.replace(".", r"\.")):
        override(CPU, preset("quickstart"), (change,))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("3", 3), ("true", True), ("null", None), ("[1, 2]", [1, 2]), ("M-*-", "M-*-")],
)
def test_values_read_as_people_mean_them(text, value):
    assert overrides.apply({}, [f"a.b={text}"]) == {"a": {"b": value}}


def test_numbers_of_yaml_1_1():
    assert overrides.numbers({"lr": "1e-3", "p": ["2e5", "inf", "M-"]}) == {
        "lr": 1e-3,
        "p": [2e5, "inf", "M-"],
    }


@pytest.mark.parametrize(
    ("matmul", "backend", "hardware", "capability", "wanted"),
    [
        ("auto", "cpu", True, None, "bfloat16"),
        ("auto", "cpu", False, None, "compute"),
        ("auto", "gpu", False, 7.5, "compute"),
        ("auto", "gpu", False, 9.0, "bfloat16"),
        ("auto", "tpu", False, None, "bfloat16"),
        ("compute", "cpu", True, None, "compute"),
        ("bfloat16", "cpu", False, None, "bfloat16"),
    ],
)
def test_precision_follows_the_hardware(matmul, backend, hardware, capability, wanted):
    assert precision_for(matmul, backend, hardware, capability).matmul == wanted


def test_settings_of_devices():
    assert for_backend("cpu") is CPU and for_backend("gpu").preset == "small"


def test_arguments_have_defaults_that_pass():
    Args().check()


def test_picture(tmp_path):
    points = [(i * 100.0, 8.0 - i / 20) for i in range(50)]
    path = draw(
        tmp_path / "deep" / "loss.png",
        points,
        points[::10],
        title="t",
        bits_per_nat=0.4,
        lines={"gzip": 4.5, "xz": 3.9},
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    empty = draw(tmp_path / "empty.png", [], [], title="nothing yet")
    metrics = [{"step": 1, "loss": 8.0, "imbalance": 1.5}, {"step": 1, "validation_loss": 7.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    read = read_points(tmp_path / "metrics.jsonl", 100)
    assert read == {"loss": [(100, 8)], "validation_loss": [(100, 7)], "imbalance": [(100, 1.5)]}
    sparse = draw(tmp_path / "sparse.png", read["loss"], [], title="experts", loads=read["imbalance"])
    # Width and height of the PNG: the load has a panel of its own.
    with_load, without = (picture.read_bytes()[16:24] for picture in (sparse, empty))
    assert int.from_bytes(with_load[4:]) > int.from_bytes(without[4:]) and with_load[:4] == without[:4]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_terminal_and_in_a_file(terminal):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=110, markup=False, color_system=None)
    with TrainingDisplay(console, bits_per_nat=0.4) as display:
        losses: list[float] = []
        for step in range(1, 101):
            losses.append(8 - step / 50)
            validation = 6.5 if step > 30 else None
            display.update(
                Figures(
                    step, step / 100, step * 3.0, 300 - step * 3.0, losses[-1], validation, 4812.0, losses
                )
            )
    shown = text.getvalue()
    for word in ("4,812", "6.000", "2.400", "6.500", "2.600", "100"):
        assert word in shown
    if not terminal:
        assert shown.count("\n") == 22


def test_sparkline():
    assert sparkline([]) == ""
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁" or len(sparkline([3.0, 2.0, 1.0])) == 3
    assert len(sparkline([float(i) for i in range(1000)], 40)) == 40
    assert sparkline([1.0, 1.0]) == "▁▁"


def test_the_run_folder_is_the_next_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_folder(None, False, "quickstart") == Path("runs/quickstart")
    Path("runs/quickstart").mkdir(parents=True)
    assert choose_folder(None, False, "quickstart") == Path("runs/quickstart-2")
    assert choose_folder(None, True, "quickstart") == Path("runs/quickstart")
    assert choose_folder(Path("empty"), False, "quickstart") == Path("empty")


@pytest.mark.parametrize("name", ["full", "file", "br[1]"])
def test_folders_that_cannot_take_a_run(name, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").touch()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out"):
        choose_folder(tmp_path / name, False, "quickstart")


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match="--resume"):
        Record.read(tmp_path, None)
    (tmp_path / "quickstart.json").write_text('{"minutes": "five"}')
    with pytest.raises(UserError, match="minutes"):
        Record.read(tmp_path, None)


def test_a_record_reads_as_it_was_written(tmp_path):
    record = Record(5.0, "stdlib", 3, CPU, preset("quickstart"), 8.25)
    record.write(tmp_path)
    assert Record.read(tmp_path, None) == record
    assert Record.read(tmp_path, 30.0) == replace(record, minutes=30.0)

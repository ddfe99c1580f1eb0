"""The figures, and what is said of a mistake."""

import json

import pytest

from jaxllm.evaluate import score_documents
from tests.evaluate.tiny import TEXTS


def test_the_figures_are_the_librarys(cli, folder, model, texts):
    done = cli("eval", folder, "--data", f"{texts}/*.txt", "--split", "all", "--window", "64", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    expected = score_documents(model, TEXTS, window=64)
    assert report["documents"] == len(TEXTS)
    assert report["tokens"] == expected.tokens
    assert report["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert report["baselines"] == []


def test_splits_share_no_document(cli, folder, texts):
    counts = {}
    for split in ("train", "validation", "all"):
        done = cli("eval", folder, "--data", f"{texts}/*.txt", "--split", split, "--json")
        counts[split] = json.loads(done.out)["documents"]
    assert counts["all"] == counts["train"] + counts["validation"] and min(counts.values()) > 0


def test_baselines_stand_beside_the_model(cli, folder, texts):
    done = cli("eval", folder, "--data", f"{texts}/*.txt", "--split", "all", "--baselines")
    assert done.code == 0, done.err
    for name in ("bits per byte", "this model", "gzip -9", "xz -9", "Kneser-Ney bigram", "trigram"):
        assert name in done.out


def test_fewer_documents_on_request(cli, folder, texts):
    done = cli("eval", folder, "--data", f"{texts}/*.txt", "--split", "all", "--limit", "2", "--json")
    assert json.loads(done.out)["documents"] == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--window", "1"], ["--window", "at least 2"]),
        (["--window", "8", "--stride", "8"], ["--stride", "from 1 to 7"]),
        (["--limit", "0"], ["--limit", "at least 1"]),
        (["--data", "nothing/*.txt"], ["nothing/*.txt", "allowed are"]),
        (["--split", "test"], ["test", "validation"]),
    ],
)
def test_a_mistake_is_named(cli, folder, argv, words):
    done = cli("eval", folder, *argv)
    assert done.code == 2
    assert all(word in " ".join(done.err.replace("│", " ").split()) for word in words), done.err
    assert "Traceback" not in done.err

"""The walk from a corpus's name to batches."""

import subprocess
import sys

import numpy as np
import pytest

from jaxllm.data import prepare as module
from jaxllm.data.errors import DataError
from jaxllm.data.loader import Loader, scored_bytes, validation_batches
from jaxllm.data.prepare import prepare_data, tokenize
from jaxllm.data.tokenizer import Tokenizer


@pytest.fixture
def spec(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"line {number} é 日\n" * (number + 1))
    return f"{folder}/*.txt"


def test_tokens_are_the_documents_between_begin_and_end(spec):
    data = prepare_data(spec, vocab_size=280)
    for tokens, documents in ((data.train, data.corpus.train), (data.validation, data.corpus.validation)):
        assert tokens.n_documents == len(documents) and tokens.vocab_size == data.tokenizer.vocab_size == 280
        for index, text in enumerate(documents.texts):
            ids = tokens.document(index)
            assert (ids[0], ids[-1]) == (data.tokenizer.bos_id, data.tokenizer.eos_id)
            assert data.tokenizer.decode(ids[1:-1], skip_special=False) == text


def test_the_scored_bytes_are_the_bytes_of_the_text(spec):
    data = prepare_data(spec, vocab_size=280)
    lengths = data.tokenizer.token_byte_lengths
    batches = validation_batches(data.validation, 2, 16)
    assert sum(scored_bytes(batch, lengths) for batch in batches) == data.corpus.validation.n_bytes
    loader = Loader(data.train, 1, 16)
    epoch = sum(scored_bytes(next(loader), lengths) for _ in range(loader.rows.rows_per_epoch))
    assert epoch == data.corpus.train.n_bytes


def test_a_second_preparation_reads_the_cache_alone(spec, monkeypatch):
    first = prepare_data(spec, vocab_size=280)

    def refuse(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(Tokenizer, "train", refuse)
    monkeypatch.setattr(module, "join_encoded", refuse)
    second = prepare_data(spec, vocab_size=280)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert second.train.fingerprint == first.train.fingerprint
    np.testing.assert_array_equal(second.validation.tokens, first.validation.tokens)
    with pytest.raises(AssertionError, match="made again"):
        prepare_data(spec, vocab_size=290)


def test_another_tokenizer_makes_other_tokens(spec, tmp_path):
    first = prepare_data(spec, vocab_size=280)
    other = Tokenizer.train(first.corpus.train.texts, 270)
    loaded = prepare_data(spec, tokenizer=other.save(tmp_path / "other"))
    assert loaded.tokenizer.fingerprint == other.fingerprint and len(loaded.train) > len(first.train)
    assert prepare_data(spec, tokenizer=other).train.fingerprint == loaded.train.fingerprint
    with pytest.raises(DataError, match=r"no file .*nowhere"):
        prepare_data(spec, tokenizer="nowhere")


def test_batches_of_texts_do_not_change_the_tokens(spec, tmp_path, monkeypatch):
    data = prepare_data(spec, vocab_size=280)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 50)
    assert tokenize(data.corpus.train, data.tokenizer, tmp_path / "b").fingerprint == data.train.fingerprint


def test_importing_the_package_stays_light():
    code = (
        "import sys, jaxllm.data.loader, jaxllm.data.prepare, jaxllm.measure.ngram\n"
        "print([name for name in ('grain', 'tokenizers', 'pyarrow', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

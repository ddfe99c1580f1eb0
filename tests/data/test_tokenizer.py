"""Tokenizers: round trips, special tokens, byte counts, streams, the cache."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data import tokenizer as module
from jaxllm.data.errors import DataError
from jaxllm.data.tokenizer import Tokenizer, trained_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n" * 30, "for line in lines:\n    print(line)  # naïve 日本語\n" * 30]
TOKENIZER = Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    words = ["<unk>", "▁", "▁hello", "▁world", "lo", "é"] + [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(
        models.Unigram([(word, -float(place + 1)) for place, word in enumerate(words)], 0, byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.sampled_from(["</s>", "a<s>b<pad>", " \r\n\t\0", "\u2028x\ufeff", "👩‍👩‍👧 e\u0301"]))
def test_any_text_round_trips_and_its_bytes_are_counted(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special=False) == text
    assert TOKENIZER.token_bytes(ids) == len(text.encode())
    assert not TOKENIZER.special_ids.intersection(ids)


def test_special_ids_and_their_places():
    assert (TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 1, 2)
    plain = TOKENIZER.encode("for x")
    assert TOKENIZER.encode("for x", bos=True, eos=True) == [1, *plain, 2]
    assert TOKENIZER.encode_batch(["for x", ""], bos=True) == [[1, *plain], [1]]
    assert TOKENIZER.decode([1, *plain, 2]) == "for x"
    assert TOKENIZER.decode([1, *plain, 2], skip_special=False) == "<s>for x</s>"
    assert TOKENIZER.token_bytes([0, 1, 2]) == 0
    assert TOKENIZER.encode("<s>for x", parse_special=True) == [1, *plain]
    assert TOKENIZER.encode("<s>for x") != [1, *plain]


def test_training_compresses_and_keeps_the_size():
    text = TEXTS[0]
    assert TOKENIZER.vocab_size == 300 == len(TOKENIZER.token_byte_lengths)
    assert len(TOKENIZER.encode(text)) < len(text.encode()) / 2
    assert Tokenizer.train(TEXTS, 300).fingerprint == TOKENIZER.fingerprint
    assert Tokenizer.train(TEXTS[:1], 290).fingerprint != TOKENIZER.fingerprint
    with pytest.raises(DataError, match="vocab_size: got 258; allowed are 259"):
        Tokenizer.train(TEXTS, 258)


def test_saved_and_loaded_is_the_same(tmp_path):
    file = TOKENIZER.save(tmp_path)
    for path in (file, tmp_path, str(tmp_path)):
        loaded = Tokenizer.load(path)
        assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (0, 1, 2)
        assert loaded.fingerprint == TOKENIZER.fingerprint
        assert loaded.encode("naïve </s>") == TOKENIZER.encode("naïve </s>")
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(file).eos_id == 2


def test_configuration_beside_the_file_names_the_special_tokens(tmp_path):
    file = TOKENIZER.save(tmp_path)
    config = {"bos_token": None, "eos_token": {"content": "<pad>"}, "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(file)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (None, 0, None)
    assert loaded.encode("a", bos=True, eos=True) == [*TOKENIZER.encode("a"), 0]
    assert loaded.chat_template == "{{ messages }}" and TOKENIZER.chat_template is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ turns }}")
    assert Tokenizer.load(file).chat_template == "{{ turns }}"


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no file .*tokenizer\.json; give"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="does not read as a Hugging Face"):
        Tokenizer.load(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=12), st.booleans())
def test_a_stream_of_any_ids_joins_to_the_whole(ids, skip_special):
    # Random bytes: most are broken UTF-8, which must come out exactly as in the whole.
    stream = TOKENIZER.stream(skip_special=skip_special)
    pieces = [stream.push(index) for index in ids] + [stream.flush()]
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special=skip_special)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aé日👧 \n", max_size=20))
def test_a_stream_never_shows_half_a_character(text):
    stream, shown = TOKENIZER.stream(), ""
    for index in TOKENIZER.encode(text):
        shown += stream.push(index)
        assert text.startswith(shown)
    assert shown == text and stream.flush() == ""


def test_a_stream_flushes_a_broken_end_and_can_be_used_again():
    ids = TOKENIZER.encode("👧")
    stream = TOKENIZER.stream()
    assert [stream.push(index) for index in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\ufffd"
    assert "".join(stream.push(index) for index in ids) == "👧"


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="helowrdé日 ", max_size=20))
def test_streams_and_byte_counts_of_other_vocabularies(sentencepiece_like, text):
    tokenizer = sentencepiece_like
    assert not tokenizer.is_byte_level
    ids = tokenizer.encode(text)
    stream, shown, whole = tokenizer.stream(), "", tokenizer.decode(ids)
    for index in ids:
        shown += stream.push(index)
        assert whole.startswith(shown)
    assert shown + stream.flush() == whole
    # The spelling can have one more space in front than the text.
    assert tokenizer.token_bytes(ids) - len(text.encode()) in (0, 1)


def test_wordpiece_spelling():
    from jaxllm.data.detokenize import token_to_bytes

    assert [token_to_bytes(token, None) for token in ("##ing", "▁a", "<0xe2>", None)] == [
        b"ing",
        b" a",
        b"\xe2",
        b"",
    ]


def test_the_cache_is_used_and_a_broken_one_replaced(tmp_path, monkeypatch):
    trained = []
    train = Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda *args: trained.append(args) or train(*args))
    first = trained_tokenizer(TEXTS, "a" * 64, 280, tmp_path)
    assert trained_tokenizer(TEXTS, "a" * 64, 280, tmp_path).fingerprint == first.fingerprint
    assert len(trained) == 1
    trained_tokenizer(TEXTS, "a" * 64, 281, tmp_path)
    trained_tokenizer(TEXTS, "b" * 64, 280, tmp_path)
    assert len(trained) == 3
    for file in (tmp_path / "tokenizers").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    assert trained_tokenizer(TEXTS, "a" * 64, 280, tmp_path).fingerprint == first.fingerprint
    assert len(trained) == 4
    monkeypatch.setattr(module, "_RECIPE", 0)
    trained_tokenizer(TEXTS, "a" * 64, 280, tmp_path)
    assert len(trained) == 5


def test_ids_may_be_arrays():
    ids = np.array(TOKENIZER.encode("naïve"), np.uint16)
    assert TOKENIZER.decode(ids) == "naïve" and TOKENIZER.token_bytes(ids) == 6

"""Cached tokens: equal when read back, never trusted when damaged."""

import numpy as np
import pytest

from jaxllm.data import store
from jaxllm.data.store import DamagedFileError, cached_tokens, open_tokens, save_tokens, write_atomically
from tests.data.corpora import synthetic_corpus


@pytest.mark.parametrize("vocab_size", [97, 100_000])
def test_saved_and_opened_is_the_same_and_memory_mapped(tmp_path, vocab_size):
    corpus = synthetic_corpus([5, 1, 40], vocab_size)
    opened = open_tokens(save_tokens(corpus, tmp_path / "a" / "x.tokens"))
    np.testing.assert_array_equal(opened.tokens, corpus.tokens)
    np.testing.assert_array_equal(opened.offsets, corpus.offsets)
    assert isinstance(opened.tokens, np.memmap) and opened.tokens.dtype == corpus.tokens.dtype
    assert (opened.vocab_size, opened.fingerprint) == (vocab_size, corpus.fingerprint)
    assert not opened.tokens.flags.writeable


def test_every_damaged_byte_and_every_torn_length_is_detected(tmp_path):
    path = save_tokens(synthetic_corpus([5, 4]), tmp_path / "x.tokens")
    good = path.read_bytes()
    padding = set(range(good.index(b"}") + 1, len(good) - 9 * 2 - 3 * 8))
    for place in set(range(len(good))) - padding:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(DamagedFileError):
            open_tokens(path)
    for length in [*range(0, len(good), 7), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(DamagedFileError):
            open_tokens(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(DamagedFileError, match="bytes"):
        open_tokens(path)


def test_damage_is_repaired_and_the_sound_cache_reused(tmp_path):
    made = []

    def make():
        made.append(1)
        return synthetic_corpus([5, 4])

    for _ in range(2):
        assert cached_tokens("key", make, tmp_path).fingerprint == make().fingerprint
    assert len(made) == 3  # once for the cache, twice for the comparison
    (file,) = (tmp_path / "tokens").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert cached_tokens("key", make, tmp_path).fingerprint == make().fingerprint
    assert len(made) == 5
    cached_tokens("other", make, tmp_path)
    assert len(made) == 6 and len(list((tmp_path / "tokens").iterdir())) == 2


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "x", b"old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(store.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert store.cache_folder("tokens", tmp_path) == tmp_path / "tokens"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder("tokens") == tmp_path / "jaxllm" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_folder("tokens") == tmp_path / ".cache" / "jaxllm" / "tokens"

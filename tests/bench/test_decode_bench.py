"""The benchmark of decoding: filled caches are what a prefill would leave, its quick form runs and resumes."""

import json
import sys

import jax
import numpy as np
import pytest

from experiments.bench import _decode_cases as cases
from experiments.bench import _decode_peers, decode
from experiments.tables import caches as tables
from jaxllm import KVCache, Policy
from jaxllm.cache.traffic import held


@pytest.mark.parametrize("name", ["dense", "quest", "rkv"])
def test_a_filled_cache_stores_what_a_prompt_leaves(name):
    policy = cases.policies(2048)[name]
    cache = cases.filled(cases.model(layers=1, width=32), 2048, KVCache("int4"), policy)
    (group,) = cache.groups
    left = 128 if name == "rkv" else 2048
    assert group.length.tolist() == group.sealed.tolist() == [left]
    codes = np.asarray(cache.layers[0].k.codes)
    used = left // cache.layers[0].layout.page
    assert codes[:used].any(axis=(1, 2, 3)).all() and not codes[used:].any()
    if name == "quest":
        low, high = (np.asarray(cache.layers[0].memory.per_page[key])[:used] for key in ("low", "high"))
        assert (low < high).all()


def test_a_cache_in_one_piece_is_filled_too():
    cache = cases.filled(cases.model(layers=1, width=32), 64, KVCache("bfloat16"), Policy())
    bits = np.asarray(cache.layers[0].k)
    assert bits[:, :, :64].any(axis=3).all() and not bits[:, :, 64:].any()
    assert held(cache).keys_values == 2 * 4 * (64 + cases.ROOM) * 128 * 2


@pytest.mark.slow
def test_the_quick_form_runs_and_resumes(tmp_path, monkeypatch):
    out = tmp_path / "decode.json"
    assert decode.main(["--quick", "--out", str(out)]) == 0
    first = json.loads(out.read_text())
    assert {row["policy"] for row in first["model"]} == {"dense", "quest"}
    assert first["model"][1]["selected"] < 0.1 and first["pools"]["int4_over_bfloat16"] > 3.6
    assert (tmp_path / "decode.png").stat().st_size > 1000
    assert "quest" in tables.decode(first)
    curve = first["curves"][0]["curves"]
    assert curve["rkv"]["most_stored"] < curve["dense"]["most_stored"] == 511
    assert [text["length"] for text in curve["dense"]["texts"]] == [128, 256, 512]
    assert min(row["peak_bytes"] for row in first["prefill"]) > 2**26
    assert set(first["peers"][0]["ms_per_token"]) == {
        "jaxllm dense bfloat16",
        "jaxllm dense int4",
        "jaxllm quest int4",
    }
    monkeypatch.setattr(decode, "model_case", lambda *_: pytest.fail("measured twice"))
    assert decode.main(["--quick", "--out", str(out)]) == 0
    again = json.loads(out.read_text())
    assert (again["model"], again["machines"]) == (first["model"], first["machines"])
    jax.clear_caches()


def test_kinds_may_be_chosen():
    options = ["--quick", "--kind", "curves", "prefill"]
    kinds = [kind for kind, _, _ in decode.plan(decode.arguments().parse_args(options))]
    assert kinds == ["curves", "prefill"]


@pytest.mark.oracle
def test_peers_decode_the_same_weights_or_say_why_not(monkeypatch):
    """The static cache and fp8 need nothing but transformers; a package that is not there stands with its reason."""
    monkeypatch.setattr(_decode_peers, "OURS", {})
    monkeypatch.setitem(_decode_peers.PEERS, "none", ("bfloat16", "no backend"))
    names = ("static float32", "fp8", "none")
    row = _decode_peers.peers_case(2048, 1, sys.executable, names)
    assert set(row["ms_per_token"]) == {"transformers static float32", "transformers fp8"}
    assert min(row["ms_per_token"].values()) > 0
    assert "no backend" in row["missing"]["transformers none"] and "torch" in row["versions"]
    table = tables.decode_peers([row])
    assert "| transformers none | - |" in table and "Not measured: transformers none" in table


@pytest.mark.oracle
def test_another_model_is_no_peer(monkeypatch):
    monkeypatch.setattr(_decode_peers, "OURS", {})
    monkeypatch.setattr(_decode_peers, "_logits", lambda lm: np.ones((1, 64, 4096)) * np.arange(4096))
    row = _decode_peers.peers_case(2048, 1, sys.executable, ("static float32",))
    assert "not the same model" in row["missing"]["transformers static float32"] and not row["ms_per_token"]

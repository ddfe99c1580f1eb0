"""The benchmark of decoding: filled caches are what a prefill would leave, its quick form runs and resumes."""

import json

import jax
import numpy as np
import pytest

from experiments import render_tables
from experiments.bench import _decode_cases as cases
from experiments.bench import decode
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
    assert "quest" in render_tables.decode(first)
    curve = first["curves"][0]["curves"]
    assert curve["rkv"]["most_stored"] < curve["dense"]["most_stored"]
    monkeypatch.setattr(decode, "model_case", lambda *_: pytest.fail("measured twice"))
    assert decode.main(["--quick", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["model"] == first["model"]
    jax.clear_caches()

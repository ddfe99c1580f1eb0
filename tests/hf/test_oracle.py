"""Parity with a live transformers model: every family, every option, both directions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_cases import CASES, RECORDED
from hf_mutants import surviving
from hf_parity import check_cached, check_prefill, logits_of

import jaxllm.hf as hf
from jaxllm.config import Precision
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.model.functional import LanguageModel, init_params, map_named
from jaxllm.presets import PRESETS, preset

pytestmark = [
    pytest.mark.oracle,
    # torch, transformers and its dependencies.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.mark.parametrize("case", CASES)
def test_loads_and_agrees(case: str, live: Any, tmp_path: Path) -> None:
    """What transformers saves is loaded; prefill, cached decode and greedy tokens agree; planted errors do not."""
    theirs, expected = live(case)
    theirs.save_pretrained(tmp_path)
    model = hf.load(tmp_path)
    error = check_prefill(model, expected)
    cached, ties = check_cached(model, expected)
    print(f"{case}: prefill {error:.1e}, cached {cached:.1e}, near ties {ties}")
    if case not in RECORDED:
        assert surviving(model, expected) == []


def _excited(cfg: Any, seed: int) -> LanguageModel:
    """An initialised model with every parameter moved, so that logits have a standard deviation of at least 1."""
    rng = np.random.default_rng(seed)

    def move(path: str, value: Any) -> Any:
        if path == "lm_head.weight":
            return value * (1.5 / cfg.hidden_size**0.5 / cfg.init_std)
        return value + 0.1 * rng.standard_normal(value.shape).astype(np.float32)

    return LanguageModel(cfg, map_named(move, init_params(cfg, seed)))


def test_quickstart_export_in_transformers(tmp_path: Path) -> None:
    """The exported folder is a NemotronHForCausalLM with the same logits, dt clamp and all, and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = _excited(preset("quickstart"), seed=1)
    model.tokenizer = Tokenizer.train(["to be or not to be, that is the question"] * 4, vocab_size=270)
    model.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = hf.save(model, tmp_path / "hf", max_shard_bytes=10_000_000)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == "NemotronHForCausalLM"
    assert not any(report.values()), report
    tokens = np.random.default_rng(0).integers(0, 4096, (1, 150))
    with torch.no_grad():
        expected = theirs.eval()(torch.as_tensor(tokens)).logits.numpy()
    logits = logits_of(model, tokens)
    error = float(np.abs(logits - expected).max() / expected.std())
    print(f"quickstart: std {expected.std():.2f}, error {error:.1e}")
    assert expected.std() >= 1
    assert error <= 1e-4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "that is not the question"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == model.tokenizer.encode(text)
    assert tokenizer.eos_token_id == model.tokenizer.eos_id == theirs.generation_config.eos_token_id
    assert tokenizer.apply_chat_template([{"role": "user", "content": "or"}], tokenize=False) == "or"


def test_the_clamp_of_transformers_would_matter(live: Any) -> None:
    """With its own default, time_step_min = 0.001, transformers computes something else; we match that too if asked."""
    from dataclasses import replace

    from hf_oracle import build, expect

    theirs = build(CASES["nemotron_h"], seed=7)
    limit = (0.05, float("inf"))
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = limit
    expected = expect(theirs, live("nemotron_h")[1].tokens, new_tokens=1)
    folder_model = _loaded(live("nemotron_h")[0])
    with pytest.raises(AssertionError, match="max difference"):
        check_prefill(folder_model, expected)
    cfg = folder_model.cfg
    check_prefill(replace(folder_model, cfg=cfg.replace(mamba=replace(cfg.mamba, dt_limit=limit))), expected)


def _loaded(theirs: Any, precision: Precision | None = None) -> LanguageModel:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return hf.load(folder, precision)


@pytest.mark.parametrize("case", ["nemotron_h", "llama3"])
def test_bfloat16(case: str) -> None:
    """In bfloat16 we are no further from the exact logits of the rounded weights than transformers is itself."""
    import torch
    from hf_oracle import build, prompt

    theirs, tokens = build(CASES[case], seed=7, dtype="bfloat16"), prompt(7)
    model = _loaded(theirs)
    assert model.cfg.precision == Precision(param="bfloat16", compute="bfloat16")
    with torch.no_grad():
        rounded = theirs(torch.as_tensor(tokens)).logits.float().numpy()
        exact = theirs.float()(torch.as_tensor(tokens)).logits.numpy()
    noise = np.abs(rounded - exact) / exact.std()
    error = np.abs(logits_of(model, tokens) - exact) / exact.std()
    print(
        f"{case}: bfloat16 max {error.max():.1e} (theirs {noise.max():.1e}), mean {error.mean():.1e} ({noise.mean():.1e})"
    )
    assert error.mean() <= 1.3 * noise.mean()
    assert error.max() <= 2 * noise.max()


@pytest.mark.parametrize(("family", "cast"), [("nemotron_h", "last"), ("llama", "first")])
def test_norms_cast_in_the_order_of_the_family(family: str, cast: str) -> None:
    """Bit for bit in bfloat16; the other order differs."""
    import jax.numpy as jnp
    import torch
    from flax import nnx
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm

    from jaxllm.axes import Axis
    from jaxllm.model.layers import RMSNorm

    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 9, 64)), rng.standard_normal(64)
    theirs = {"nemotron_h": NemotronHRMSNorm, "llama": LlamaRMSNorm}[family](64, 1e-5).bfloat16()
    with torch.no_grad():
        theirs.weight.copy_(torch.as_tensor(weight))
        expected = theirs(torch.as_tensor(x).bfloat16()).float().numpy()

    def ours(order: str) -> np.ndarray:
        norm = RMSNorm(Axis("embed", 64), eps=1e-5, cast=order, dtype="bfloat16", rngs=nnx.Rngs(0))
        norm.weight.set_value(jnp.asarray(weight, jnp.bfloat16))
        return np.asarray(norm(jnp.asarray(x, jnp.bfloat16)), np.float32)

    assert np.array_equal(ours(cast), expected)
    assert not np.array_equal(ours({"last": "first", "first": "last"}[cast]), expected)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("jet")])
def test_preset_shapes_are_those_of_transformers(name: str) -> None:
    """Names and shapes of every tensor, against the class built on the meta device."""
    import torch
    from hf_oracle import shapes
    from transformers import AutoConfig, AutoModelForCausalLM

    cfg = preset(name)
    family = hf.choose_family(cfg)
    data = hf.config_to_hf(cfg, family)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**data))
    # Prediction blocks are in the checkpoints, but not in transformers' class.
    places = [place for place in hf.tensor_names(cfg, family) if not place.path.startswith("mtp.")]
    ours = {place.name: list(place.shape) for place in places}
    assert ours == shapes(theirs)


# As the model cards or, for Mamba-2, the checkpoints have it.
PUBLISHED = {
    "nemotron_h_4b": 4.49e9,
    "nemotron_h_8b": 8.10e9,
    "nemotron_3_nano_30b_a3b": 31.578e9,
    "nemotron_3_super": 120.67e9,
    "llama_3_2_1b": 1.24e9,
    "llama_3_1_8b": 8.03e9,
    "qwen2_5_0_5b": 0.494e9,
    "qwen2_5_7b": 7.62e9,
    "qwen3_8b": 8.19e9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    cfg = preset(name)
    places = hf.tensor_names(cfg, hf.choose_family(cfg))
    count = sum(int(np.prod(place.shape)) for place in places if not place.path.startswith("mtp."))
    assert count == pytest.approx(PUBLISHED[name], rel=0.005)

"""Folders on disk: bit-exact round trips, sharding, atomic replacement, and errors that list everything."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_cases import CASES, write_folder
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxllm
import jaxllm.hf as hf
from jaxllm.config import ConfigError, Precision
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.generation.folders import load_config
from jaxllm.model.functional import LanguageModel, flatten, init_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """folder(case, dtype) -> a folder with every tensor of the case in that dtype."""

    def make(case: str = "nemotron_h", dtype: Any = np.float32) -> Path:
        cfg = hf.config_from_hf(CASES[case])
        shapes = {p.name: p.shape for p in hf.tensor_names(cfg, CASES[case]["model_type"])}
        path = write_folder(tmp_path_factory.mktemp(case), CASES[case], shapes, seed=3)
        tensors = {name: value.astype(dtype) for name, value in load_file(path / "model.safetensors").items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


def content(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """name -> (dtype, shape, bytes) over all files of a folder."""
    out = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as handle:
            for name in handle.keys():  # noqa: SIM118
                value = handle.get_tensor(name)
                out[name] = (str(value.dtype), value.shape, value.tobytes())
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "case", ["nemotron_h", "mamba2", "qwen3_window", "nemotron_latent", "mixtral", "qwen3_moe_mixed"]
)
def test_disk_to_disk_is_bit_exact(case: str, dtype: str, folder: Any, tmp_path: Path) -> None:
    source = folder(case, jnp.dtype(dtype))
    model = hf.load(source)
    assert model.cfg.precision.param == ("bfloat16" if dtype == "bfloat16" else "float32")
    hf.save(model, tmp_path / "a", family=CASES[case]["model_type"], dtype=dtype)
    assert content(tmp_path / "a") == content(source)
    # Mixed dtypes are kept by naming them.
    hf.save(model, tmp_path / "b", family=CASES[case]["model_type"], dtype=hf.tensor_dtypes(source))
    assert content(tmp_path / "b") == content(source)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == dtype


def test_load_opens_a_folder_and_a_run_that_holds_one(folder: Any, tmp_path: Path) -> None:
    source = folder()
    direct = jaxllm.load(source)
    (tmp_path / "run" / "checkpoints" / "steps").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(direct.cfg.to_json(), encoding="utf-8")
    shutil.copytree(source, tmp_path / "run" / "hf")
    expected = hf.load(source)
    for model in (direct, jaxllm.load(str(tmp_path / "run"))):
        assert model.cfg == expected.cfg
        jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)


def test_shards_and_their_index(folder: Any, tmp_path: Path) -> None:
    source = folder()
    model = hf.load(source)
    hf.save(model, tmp_path / "a", max_shard_bytes=30_000)
    files = sorted((tmp_path / "a").glob("model-*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 30_000 + 48 * 264 * 4 + 4096 for file in files)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(content(source))
    assert content(tmp_path / "a") == content(source)
    again = hf.load(tmp_path / "a")
    assert again.cfg == model.cfg
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params))
    )
    files[1].unlink()
    with pytest.raises(hf.CheckpointError, match=f"{files[1].name}: missing"):
        hf.load(tmp_path / "a")


def test_memory_names_are_accepted(folder: Any) -> None:
    path = folder()
    tensors = load_file(path / "model.safetensors")
    renamed = {name.replace("backbone.", "model."): value for name, value in tensors.items()}
    expected = hf.load(path)
    save_file(renamed, path / "model.safetensors")
    model = hf.load(path)
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(expected.params))
    )


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_a_folder_that_only_modelopt_marks_as_quantised_is_refused(folder: Any, algorithm: str) -> None:
    source = folder("nemotron_h")
    marker = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, "group_size": 16}}
    (source / "hf_quant_config.json").write_text(json.dumps(marker))
    for read in (hf.load, jaxllm.load, load_config):
        with pytest.raises(ConfigError, match=f"{algorithm!r}.*Give the folder"):
            read(source)
    for text, message in (("{", "hf_quant_config.json: is not JSON"), ("[]", "is no JSON object")):
        (source / "hf_quant_config.json").write_text(text)
        with pytest.raises(hf.CheckpointError, match=message):
            hf.load(source)


def test_deferred_tensors_are_read_when_they_are_wanted(folder: Any, tmp_path: Path) -> None:
    """Each in its own dtype or another one; a model of them is saved without a changed bit."""
    source = folder("nemotron_moe", jnp.dtype("bfloat16"))
    whole, later = hf.load(source), hf.load(source, deferred=True)
    assert later.cfg == whole.cfg
    found, wanted = flatten(later.params), flatten(whole.params)
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        value = leaf.value()
        assert (value.dtype, leaf.nbytes) == (wanted[name].dtype, wanted[name].nbytes)
        np.testing.assert_array_equal(value, wanted[name])
        master = leaf.astype(jnp.float32).value()
        assert master.dtype == np.float32
        np.testing.assert_array_equal(master, wanted[name].astype(np.float32))
    copy = hf.save(later, tmp_path / "copy", dtype=hf.tensor_dtypes(source))
    assert content(copy) == content(source)
    (source / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        next(iter(found.values())).value()


def test_precision_is_chosen_or_given(folder: Any) -> None:
    model = hf.load(folder(dtype=jnp.bfloat16), Precision(param="float32", compute="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"}
    kept = flatten(hf.load(folder(dtype=jnp.bfloat16)).params)
    assert kept["layers.0.mixer.A_log"].dtype == jnp.float32
    assert kept["layers.0.mixer.in_proj.weight"].dtype == jnp.bfloat16


def test_all_tensor_problems_at_once(folder: Any) -> None:
    path = folder()
    tensors = load_file(path / "model.safetensors")
    del tensors["backbone.layers.0.mixer.A_log"], tensors["lm_head.weight"]
    tensors["backbone.norm_f.weight"] = np.ones(7, np.float32)
    tensors["backbone.layers.9.norm.weight"] = np.ones(48, np.float32)
    tensors["backbone.layers.2.mixer.up_proj.weight"] = np.ones((72, 48), np.int8)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(hf.CheckpointError) as caught:
        hf.load(path)
    message = str(caught.value)
    for part in (
        "missing: backbone.layers.0.mixer.A_log [8]",
        "missing: lm_head.weight [101, 48]",
        "shape: backbone.norm_f.weight is [7] on disk, [48] by config.json",
        "extra: backbone.layers.9.norm.weight [48]",
        "dtype: backbone.layers.2.mixer.up_proj.weight is I8",
    ):
        assert part in message


def test_broken_folders(folder: Any, tmp_path: Path) -> None:
    with pytest.raises(hf.CheckpointError, match="is not a folder"):
        hf.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(hf.CheckpointError, match=r"no config.json \(found notes.txt\)"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(hf.CheckpointError, match="is not JSON"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CASES["nemotron_h"]))
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(hf.CheckpointError, match=r"neither.*found pytorch_model.bin"):
        hf.load(tmp_path)
    path = folder()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(hf.CheckpointError, match=r"model.safetensors: truncated"):
        hf.load(path)


def test_tied_heads(folder: Any, tmp_path: Path) -> None:
    """A redundant head is accepted if it equals the embedding; Nemotron-H's is written, for transformers needs it."""
    path = folder("mamba2")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].copy()
    save_file(tensors, path / "model.safetensors")
    assert "lm_head" not in hf.load(path).params
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(hf.CheckpointError, match="tie_word_embeddings"):
        hf.load(path)
    source = folder()
    model = hf.load(source)
    tied = LanguageModel(
        model.cfg.replace(tie_embeddings=True), {k: v for k, v in model.params.items() if k != "lm_head"}
    )
    hf.save(tied, tmp_path / "tied")
    assert content(tmp_path / "tied")["lm_head.weight"] == content(source)["backbone.embeddings.weight"]
    assert hf.load(tmp_path / "tied").cfg == tied.cfg


def test_replaces_an_export_but_nothing_else(folder: Any, tmp_path: Path) -> None:
    model = hf.load(folder())
    out = hf.save(model, tmp_path / "out")
    hf.save(model, out, max_shard_bytes=30_000)
    assert not (out / "model.safetensors").exists()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(hf.CheckpointError, match=r"thesis\.tex"):
        hf.save(model, out)
    assert (out / "thesis.tex").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_save_leaves_the_old_folder(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hf.load(folder())
    out = hf.save(model, tmp_path / "out")
    before = content(out)

    def full(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("jaxllm.hf.checkpoint.write_tensors", full)
    with pytest.raises(OSError, match="no space"):
        hf.save(model, out)
    assert content(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_tokenizer_and_template_travel_along(folder: Any, tmp_path: Path) -> None:
    model = hf.load(folder())
    model.tokenizer = Tokenizer.train(["to be or not to be, that is the question"] * 4, vocab_size=270)
    model.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    out = hf.save(model, tmp_path / "out")
    again = hf.load(out)
    assert again.chat_template == model.chat_template
    assert again.tokenizer.encode("question") == model.tokenizer.encode("question")
    ids = hf.read_generation_config(out)
    assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 0)


@pytest.mark.parametrize("blocks", [1, 2])
def test_prediction_blocks_are_stored_under_their_names(folder: Any, tmp_path: Path, blocks: int) -> None:
    """As Megatron's exporter names them; transformers leaves them out when it loads."""
    config = json.loads((folder() / "config.json").read_text())
    cfg = hf.config_from_hf(
        config | {"num_nextn_predict_layers": blocks, "mtp_layers_block_type": ["attention", "mlp"]}
    )
    assert cfg.mtp is not None and (cfg.mtp.pattern, cfg.mtp.blocks) == ("*-", blocks)
    model = LanguageModel(cfg, init_params(cfg))
    hf.save(model, tmp_path / "a")
    stored = content(tmp_path / "a")
    shapes = {name: entry[1] for name, entry in stored.items() if name.startswith("mtp.")}
    d, first, last = cfg.hidden_size, 2 * (blocks - 1), 2 * blocks - 1
    assert shapes[f"mtp.layers.{first}.eh_proj.weight"] == (d, 2 * d)
    for name in ("enorm", "hnorm", "norm"):
        assert shapes[f"mtp.layers.{first}.{name}.weight"] == (d,)
    assert shapes[f"mtp.layers.{first}.mixer.o_proj.weight"][0] == d
    assert shapes[f"mtp.layers.{last}.final_layernorm.weight"] == (d,)
    assert shapes[f"mtp.layers.{last}.mixer.down_proj.weight"][0] == d
    assert len(shapes) == blocks * 12
    again = hf.load(tmp_path / "a")
    assert again.cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    hf.save(again, tmp_path / "b")
    assert content(tmp_path / "b") == stored
    with pytest.raises(jaxllm.ConfigError, match="the family has no multi-token prediction"):
        hf.config_to_hf(cfg, "mamba2")

"""There and back without a changed bit; checkpoints that training reads; mistakes by name."""

import jax
import numpy as np
import pytest

from jaxllm import hf, load
from jaxllm.model.functional import flatten
from jaxllm.train.checkpoint import Checkpoints


def same(a, b) -> bool:
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_to_a_checkpoint_and_back_changes_no_bit(cli, folder, tmp_path):
    there = cli("convert", folder, tmp_path / "run")
    assert there.code == 0, there.err
    assert "jaxllm checkpoint" in there.out
    back = cli("convert", tmp_path / "run", tmp_path / "hf")
    assert back.code == 0, back.err
    first, last = load(folder), load(tmp_path / "hf")
    assert first.cfg == last.cfg and same(first.params, last.params)
    assert last.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_training_can_start_from_it(cli, folder, model, tmp_path):
    cli("convert", folder, tmp_path / "run")
    cfg, params, meta = Checkpoints(tmp_path / "run" / "checkpoints").load_params()
    assert cfg.to_dict() == model.cfg.to_dict() == meta["model"]
    assert same(params, model.params)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(params))


def test_another_dtype_on_request(cli, folder, tmp_path):
    done = cli("convert", folder, tmp_path / "half", "--to", "hf", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    assert load(tmp_path / "half").cfg.precision.param == "bfloat16"
    assert set(hf.tensor_dtypes(tmp_path / "half").values()) == {"bfloat16"}
    # Through a checkpoint, whose masters are float32, bfloat16 weights come back as they were.
    assert cli("convert", tmp_path / "half", tmp_path / "run").code == 0
    assert cli("convert", tmp_path / "run" / "checkpoints", tmp_path / "again").code == 0
    assert same(load(tmp_path / "half").params, load(tmp_path / "again").params)


def test_a_tokenizer_may_be_given(cli, folder, model, tmp_path):
    from jaxllm import LanguageModel

    bare = hf.save(LanguageModel(model.cfg, model.params), tmp_path / "bare")
    assert load(bare).tokenizer is None
    done = cli("convert", bare, tmp_path / "dressed", "--to", "hf", "--tokenizer", folder / "tokenizer.json")
    assert done.code == 0, done.err
    assert load(tmp_path / "dressed").tokenizer.fingerprint == model.tokenizer.fingerprint


def test_a_damaged_checkpoint_is_refused(cli, folder, tmp_path):
    cli("convert", folder, tmp_path / "run")
    victim = max(
        (tmp_path / "run" / "checkpoints" / "steps").rglob("*"),
        key=lambda p: p.is_file() and p.stat().st_size,
    )
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="not usable"):
        done = cli("convert", tmp_path / "run", tmp_path / "hf")
    assert done.code == 2 and "checkpoint" in done.err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{empty}", "{new}"], ["source", "It holds nothing"]),
        (["{new}", "{empty}"], ["source", "no such folder"]),
        (["{folder}", "{folder}"], ["target", "another folder"]),
        (["{folder}", "{full}"], ["target", "empty folder"]),
        (["{folder}", "{full}", "--to", "hf"], ["notes.txt", "another folder"]),
        (["{folder}", "{new}", "--dtype", "bfloat16"], ["--dtype", "--to hf"]),
        (["{folder}", "{new}", "--to", "hf", "--family", "llama"], ["llama"]),
    ],
)
def test_a_mistake_is_named(cli, folder, tmp_path, argv, words):
    places = {
        "empty": tmp_path / "empty",
        "full": tmp_path / "full",
        "new": tmp_path / "new",
        "folder": folder,
    }
    places["empty"].mkdir()
    places["full"].mkdir()
    (places["full"] / "notes.txt").write_text("mine")
    done = cli("convert", *(each.format(**places) for each in argv))
    assert done.code == 2
    # The panel wraps long paths.
    message = " ".join(done.err.replace("│", " ").split())
    assert all(word in message for word in words), done.err

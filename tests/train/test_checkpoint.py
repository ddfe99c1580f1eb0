"""Checkpoints: exact, verified, and usable after any damage to the newest."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ConfigError, Precision
from jaxllm.hf.deferred import Deferred
from jaxllm.train import checkpoint, stored
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.seal import write_atomically
from jaxllm.train.state import abstract_state, init_state
from jaxllm.train.stored import CheckpointError, check_model, flatten_named
from tests.train.tiny import assert_identical, constant_lr, tiny_config


@pytest.fixture(scope="module")
def fresh(cfg, optim):
    """A state with every leaf different, NaN and negative zero among them."""
    state = init_state(cfg, optim, seed=5)
    leaves, tree = jax.tree.flatten(state)
    leaves = [np.asarray(leaf) + np.asarray(i, np.asarray(leaf).dtype) for i, leaf in enumerate(leaves)]
    leaves[0].reshape(-1)[:2] = [np.nan, -0.0]
    return jax.tree.unflatten(tree, leaves)


def on_device(state):
    return jax.tree.map(lambda x: jnp.array(x, copy=True), state)


def saved(folder, fresh, cfg, steps=(1, 2), **options):
    """Checkpoints in which every leaf of step s is larger by s."""
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, moved(fresh, step), {"model": cfg.to_dict(), "loader": {"step": step}})
    return Checkpoints(folder)


def moved(fresh, step):
    return jax.tree.map(lambda x: jnp.asarray(x + np.asarray(step, x.dtype)), fresh)


def test_round_trip_is_bit_exact(tmp_path, fresh, cfg, optim):
    found = saved(tmp_path, fresh, cfg).restore_latest(abstract_state(cfg, optim), cfg)
    assert found.step == 2
    assert found.meta["loader"] == {"step": 2}
    assert {"jax", "orbax-checkpoint"} <= set(found.meta["versions"])
    assert_identical(found.state, moved(fresh, 2))


def test_state_may_be_donated_while_it_is_saved(tmp_path, fresh, cfg, optim):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    state = on_device(fresh)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"model": cfg.to_dict()})
        jax.block_until_ready(spoil(state))
    assert_identical(Checkpoints(tmp_path).restore_latest(abstract_state(cfg, optim)).state, fresh)


def test_deferred_parameters_are_written_piece_by_piece(tmp_path, fresh, cfg, optim, monkeypatch):
    right, counts = stored.regions, []

    def regions(shape, piece):
        found = list(right(shape, piece))
        covered = np.zeros(shape, int)
        for region in found:
            covered[region] += 1
        assert (covered == 1).all() and np.prod(piece) * 4 <= 1024
        counts.append(len(found))
        return found

    monkeypatch.setattr(stored, "regions", regions)
    for module in (stored, checkpoint):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1024)
    later = jax.tree.map(lambda x: Deferred(x.shape, x.dtype, lambda dtype: x.astype(dtype)), fresh.params)
    state = dataclasses.replace(on_device(fresh), params=later)
    with Checkpoints(tmp_path, background=False) as checkpoints:
        checkpoints.save(1, state, {"model": cfg.to_dict()})
    assert len(counts) == len(jax.tree.leaves(fresh.params)) and max(counts) > 4
    assert_identical(Checkpoints(tmp_path).restore_latest(abstract_state(cfg, optim)).state, fresh)


def test_regions_cover_what_no_piece_divides():
    assert list(stored.regions((3, 4), (2, 4))) == [
        (slice(0, 2), slice(0, 4)),
        (slice(2, 3), slice(0, 4)),
    ]
    assert list(stored.regions((), ())) == [()]


def test_keeps_the_newest_and_their_manifests_only(tmp_path, fresh, cfg):
    checkpoints = saved(tmp_path, fresh, cfg, steps=(1, 2, 3, 4), max_to_keep=2)
    assert checkpoints.steps() == [3, 4]
    assert sorted(p.stem for p in (tmp_path / "manifests").iterdir()) == ["3", "4"]
    with pytest.raises(ValueError, match="max_to_keep=1"):
        Checkpoints(tmp_path, max_to_keep=1)
    with pytest.raises(ConfigError, match=r"folder='.*runs \[1\]': must be a path without"):
        Checkpoints(tmp_path / "runs [1]")


def test_nothing_there_is_none(tmp_path, cfg, optim):
    assert Checkpoints(tmp_path / "new").restore_latest(abstract_state(cfg, optim)) is None
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        Checkpoints(tmp_path / "new").load_params()


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(step, manifest):
    file = largest(step)
    file.write_bytes(file.read_bytes()[:-10])


def flip(step, manifest):
    file = largest(step)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove(step, manifest):
    largest(step).unlink()


def alter_meta(step, manifest):
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


def unsealed(step, manifest):
    manifest.unlink()


def torn_manifest(step, manifest):
    manifest.write_bytes(manifest.read_bytes()[:40])


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (cut, "bytes instead of"),
        (flip, "other contents"),
        (remove, "is missing"),
        (alter_meta, "meta/metadata has other contents"),
        (unsealed, "not finished"),
        (torn_manifest, "manifest cannot be read"),
    ],
)
def test_damage_falls_back_and_the_step_can_be_saved_again(tmp_path, fresh, cfg, optim, harm, named):
    checkpoints = saved(tmp_path, fresh, cfg)
    harm(tmp_path / "steps" / "2", tmp_path / "manifests" / "2.json")
    with pytest.warns(UserWarning, match=named):
        found = checkpoints.restore_latest(abstract_state(cfg, optim), cfg)
    assert found.step == 1
    assert_identical(found.state, moved(fresh, 1))
    assert (tmp_path / "damaged" / "2").is_dir() == (harm is not unsealed)
    again = saved(tmp_path, fresh, cfg, steps=(2,))
    assert_identical(again.restore_latest(abstract_state(cfg, optim)).state, moved(fresh, 2))


def test_looking_repairs_nothing(tmp_path, fresh, cfg):
    checkpoints = saved(tmp_path, fresh, cfg)
    flip(tmp_path / "steps" / "2", None)
    with pytest.warns(UserWarning, match="other contents"):
        loaded, params, meta = checkpoints.load_params()
    assert loaded == cfg and meta["loader"] == {"step": 1}
    assert_identical(params, moved(fresh, 1).params)
    assert (tmp_path / "steps" / "2").is_dir()


def test_all_damaged_is_an_error_and_never_finished_is_a_new_start(tmp_path, fresh, cfg, optim):
    checkpoints = saved(tmp_path / "a", fresh, cfg, steps=(1,))
    flip(tmp_path / "a" / "steps" / "1", None)
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="every checkpoint"):
        checkpoints.restore_latest(abstract_state(cfg, optim))
    checkpoints = saved(tmp_path / "b", fresh, cfg, steps=(1,))
    unsealed(None, tmp_path / "b" / "manifests" / "1.json")
    with pytest.warns(UserWarning, match="not finished"):
        assert checkpoints.restore_latest(abstract_state(cfg, optim)) is None


def test_other_model_names_every_differing_field(cfg):
    other = cfg.replace(hidden_size=32, attention=dataclasses.replace(cfg.attention, num_heads=4))
    with pytest.raises(ConfigError, match=r"attention\.num_heads was 2, is 4") as error:
        check_model(cfg.to_dict(), other)
    assert "hidden_size was 16, is 32" in str(error.value) and "vocab_size" not in str(error.value)
    check_model(json.loads(cfg.to_json()), cfg.replace(precision=Precision(compute="bfloat16")))


def test_other_optimiser_state_is_named(tmp_path, fresh, cfg):
    checkpoints = saved(tmp_path, fresh, cfg, steps=(1,))
    with pytest.raises(CheckpointError, match=r"arrays differ: opt_state.*weight_decay"):
        checkpoints.restore_latest(abstract_state(cfg, constant_lr(weight_decay=0.0)))


def test_load_params_follows_the_precision(tmp_path, fresh):
    cfg = tiny_config("*-", precision={"param": "bfloat16"})
    _, params, _ = saved(tmp_path, fresh, cfg, steps=(1,)).load_params()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_failed_save_is_reported(tmp_path, fresh, cfg, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxllm.train.checkpoint.seal", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, on_device(fresh), {"model": cfg.to_dict()})
    with pytest.raises(
        CheckpointError, match=r"No space left on device.*newest complete checkpoint is step None"
    ):
        checkpoints.close()


def test_names_do_not_depend_on_classes(fresh):
    names = set(flatten_named(fresh))
    assert {"step", "rng", "params.embed.weight", "opt_state.0.mu.embed.weight"} <= names


def test_atomic_write_leaves_no_partial_file(tmp_path):
    path = tmp_path / "sub" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]

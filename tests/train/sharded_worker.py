"""On 8 simulated devices: ``sharded_worker.py CHECK [ARGUMENT ...]`` prints a line for everything that it found right."""

import os
import sys
import tempfile
import warnings
from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxllm.batch import PackedBatch
from jaxllm.cli.validation import Validation
from jaxllm.config import (
    AttentionConfig,
    GatedDeltaConfig,
    JetConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RopeConfig,
)
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.model.functional import flatten, init_params, map_named
from jaxllm.model.scan import groups_of
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.context import ContextSettings, Scatterer
from jaxllm.train.context import check_context as check_shared
from jaxllm.train.events import CompileEvent, StepEvent
from jaxllm.train.memory import estimate_training_memory
from jaxllm.train.placement import check_mesh, state_shardings
from jaxllm.train.settings import TrainSettings
from jaxllm.train.state import abstract_state, init_state
from jaxllm.train.step import StepSettings, gradients, make_eval_step, make_train_step
from jaxllm.train.trainer import fit
from pallas_kernels.grouped_matmul import grouped_matmul
from parallel.experts import through_experts
from parallel.mesh import MeshShape, batch_sharding, make_mesh
from parallel.sharding import Placement
from tests.data.corpora import synthetic_corpus
from tests.train.tiny import TinyLoader, assert_identical, constant_lr, copied, tiny_batch, tiny_config

TOLERANCE = 1e-5


def model(pattern: str, **changes) -> ModelConfig:
    """Every option that shares differently: grouped heads and norms, biases, fused projections, a latent width."""
    attention = AttentionConfig(
        4, num_kv_heads=2, head_dim=8, rope=RopeConfig(), window=5, qk_norm=True, qkv_bias=True, out_bias=True
    )
    fields = dict(
        vocab_size=64,
        hidden_size=32,
        pattern=pattern,
        mamba=MambaConfig(4, head_dim=8, state_size=8, chunk_size=8, n_groups=2, norm_groups=1),
        delta=GatedDeltaConfig(2, 4, key_head_dim=8, value_head_dim=8, chunk_size=8),
        jet=JetConfig(4, key_head_dim=8, value_head_dim=8, chunk_size=8, generator_reduction=2),
        attention=attention,
        mlp=MLPConfig(32, bias=True),
        moe=MoEConfig(4, 2, 16, shared_intermediate_size=16, latent_size=16, activation="swiglu"),
    )
    return ModelConfig(**(fields | changes))


def shape_of(text: str) -> MeshShape:
    """``fsdp=2,tensor=2`` as a shape."""
    return MeshShape(**{name: int(size) for name, size in (part.split("=") for part in text.split(","))})


def scattered(cfg: ModelConfig):
    """Parameters away from their initial values."""
    return map_named(
        lambda name, p: p + 0.1 * jax.random.normal(jax.random.key(len(name)), p.shape), init_params(cfg)
    )


def nudged(params, draw: int):
    """Every parameter moved by its last bit, up or down."""
    return map_named(
        lambda name, p: jnp.nextafter(
            p,
            jnp.where(jax.random.bernoulli(jax.random.key(len(name) + 100 * draw), 0.5, p.shape), 9.0, -9.0),
        ),
        params,
    )


def place_on(text: str) -> Placement:
    shape = shape_of(text)
    return Placement(make_mesh(shape, jax.devices()[: shape.size]))


def compare(cfg: ModelConfig, meshes, settings=None, batch=None, contexts=(None,)) -> None:
    """Sums and every gradient on each mesh against one device.

    To ``TOLERANCE`` of a gradient's largest entry; the rates of the delta rule, small sums of large terms, and whatever is
    scattered by ``contexts`` to what the last bit of every parameter changes on one device where that is more.
    """
    settings = settings or StepSettings(loss_chunk=32, balance_loss=0.1)
    params, batch = scattered(cfg), tiny_batch(8, 16, vocab=64) if batch is None else batch
    for _ in range(settings.depths(cfg)):
        last = batch.targets[..., -1:]
        ahead = np.roll(last, -1, axis=1)
        ahead[:, -1] = -1
        batch = batch.replace(targets=np.concatenate([batch.targets, np.where(last < 0, -1, ahead)], axis=-1))
    whole = jax.jit(lambda p, b: gradients(cfg, p, b, settings))
    expected, sums = whole(params, batch)
    delta = [at for at, letter in enumerate(cfg.letters) if letter in "GJ"]
    rates = {f"layers.{at}.mixer.{rate}" for at in delta for rate in ("A_log", "dt_bias")}
    beside = [whole(nudged(params, draw), batch)[0] for draw in range(3)]
    for text, context in product(meshes, contexts):
        place = place_on(text)
        check_mesh(cfg, shape_of(text))
        if context is not None:
            check_shared(cfg, shape_of(text), context)
        where = state_shardings(cfg, constant_lr(), place).params
        run = jax.jit(lambda p, b, s, place=place: gradients(cfg, p, b, settings, place=place, scattered=s))
        if context is None:
            given = jax.device_put(batch, batch_sharding(place.mesh)), None
        else:
            scatterer = Scatterer(cfg, context, place.mesh, settings.accum_steps)
            given = scatterer.place(scatterer(batch))
        ours, totals = run(jax.device_put(params, where), *given)
        for a, b in zip(jax.tree.leaves(totals), jax.tree.leaves(sums), strict=True):
            np.testing.assert_allclose(a, b, rtol=TOLERANCE)
        leaves = jax.tree.leaves(expected), *(jax.tree.leaves(each) for each in beside)
        for (name, a), b, *others in zip(flatten(ours).items(), *leaves, strict=True):
            scale = float(jnp.max(jnp.abs(b)))
            limit = TOLERANCE * scale
            if context is not None or name in rates:
                limit = max(limit, *(float(jnp.max(jnp.abs(b - other))) for other in others))
            np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=f"{name} on {text}, {context}")
            assert scale > 0 or "e_score" in name, name
        print("EQUAL", cfg.letters, text, context and context.strategy)


def check_gradients(pattern: str, *meshes: str) -> None:
    compare(model(pattern), meshes)


def long_batch(rows: int, length: int, vocab: int, seed: int = 0):
    """Rows of documents of very different lengths, one of them padding only, with weights that differ between tokens."""
    rng = np.random.default_rng(seed)
    opens = rng.random((rows, length)) < rng.choice([0.03, 0.3], (rows, 1))
    segments = 1 + np.cumsum(opens, axis=1)
    segments[np.arange(length) >= length - rng.integers(0, 9, (rows, 1))] = 0
    segments[-1] = 0
    index = np.arange(length)
    begin = np.maximum.accumulate(np.where(opens, index, 0), axis=1)
    tokens = rng.integers(0, vocab, (rows, length))
    last = np.append(segments[:, 1:] != segments[:, :-1], np.ones((rows, 1), bool), axis=1) | (segments == 0)
    targets = np.where(last, -1, np.roll(tokens, -1, axis=1))
    return PackedBatch(
        tokens=tokens.astype(np.int32),
        segment_ids=segments.astype(np.int32),
        positions=np.where(segments > 0, index - begin, 0).astype(np.int32),
        targets=targets.astype(np.int32)[..., None],
        loss_mask=((targets >= 0) * rng.uniform(0.5, 1.5, targets.shape)).astype(np.float32),
    )


def check_context(pattern: str, strategies: str, *meshes: str) -> None:
    """Documents scattered over devices: the loss and the gradients of one device."""
    contexts = [ContextSettings(name, block=4, stage_rounds=2) for name in strategies.split(",")]
    cfg = model(pattern)
    assert cfg.attention is not None
    # Ulysses deals heads to the devices along both axes.
    heads = max(shape.context * shape.tensor for shape in map(shape_of, meshes))
    if "ulysses" in strategies and heads > cfg.attention.num_kv_heads:
        queries = max(heads, cfg.attention.num_heads)
        cfg = cfg.replace(attention=replace(cfg.attention, num_heads=queries, num_kv_heads=heads))
    compare(cfg, meshes, batch=long_batch(4, 44, 64), contexts=contexts)


def check_context_options(kind: str, *meshes: str) -> None:
    """Prediction blocks, stacked layers, balance over the batch, rematerialisation, microbatches, over scattered documents."""
    settings = dict(loss_chunk=32, balance_loss=0.1)
    mtp = model("*M", mtp=MTPConfig(pattern="*E"), tie_embeddings=True)
    cfg, settings = {
        "prediction": (mtp, StepSettings(**settings, mtp_depths=2, remat="dots")),
        "stacked": (
            model("*E*E", scan_layers=True),
            StepSettings(**settings, remat="layer", accum_steps=2),
        ),
        "balance": (model("*E"), StepSettings(**settings, balance_scope="batch")),
    }[kind]
    contexts = [ContextSettings(block=4, stage_rounds=2)]
    compare(cfg, meshes, settings, long_batch(8, 44, 64), contexts)


def check_options(*meshes: str) -> None:
    """Prediction blocks, a tied head, stacked layers, balance over the batch, rematerialisation, microbatches."""
    settings = dict(loss_chunk=32, balance_loss=0.1)
    mtp = model("*-", mtp=MTPConfig(pattern="*E"), tie_embeddings=True)
    compare(mtp, meshes, StepSettings(**settings, balance_scope="batch", remat="dots"))
    compare(model("*E*E", scan_layers=True), meshes, StepSettings(**settings, remat="layer", accum_steps=2))


def check_stages(motif: str, *meshes: str) -> None:
    """Layers in a pipeline, one microbatch and two, rows whose length the stages do not divide."""
    cases = (
        StepSettings(loss_chunk=32, balance_loss=0.1, remat="layer"),
        StepSettings(loss_chunk=32, balance_loss=0.1, balance_scope="batch", z_loss=0.01, accum_steps=2),
    )
    for text in meshes:
        cfg = model(motif * shape_of(text).stage * 2, scan_layers=True)
        for settings in cases:
            batch = tiny_batch(8, 15, vocab=64)
            # Without weights nothing but its target says that a position has none.
            compare(
                cfg, (text,), settings, batch if settings.accum_steps > 1 else batch.replace(loss_mask=None)
            )


def check_stage_training() -> None:
    """A run in stages goes as on one device, and on without them; a stage holds its layers, and no one else's come to it."""
    cfg, optim = tiny_config("*-" * 4, scan_layers=True), constant_lr()
    assert groups_of(cfg.pattern) == ((0, 2, 4),)

    def run(shape, folder, steps):
        seen = []
        watch = [lambda e: seen.append(e.loss) if isinstance(e, StepEvent) else None]
        step = StepSettings(loss_chunk=64, accum_steps=2, remat="layer")
        settings = TrainSettings(steps=steps, mesh=shape, save_seconds=None, step=step)
        fit(cfg, optim, TinyLoader(16), settings, callbacks=watch, folder=folder)
        return seen

    state, step, loader, expected = init_state(cfg, optim), make_train_step(cfg, optim), TinyLoader(16), []
    for _ in range(5):
        state, metrics = step(state, next(loader), None)
        expected.append(float(metrics.loss))
    with tempfile.TemporaryDirectory() as folder:
        losses = run(MeshShape(data=2, stage=4), folder, 3) + run(MeshShape(data=2, fsdp=4), folder, 5)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)

    place = place_on("data=2,stage=4")
    where, held = state_shardings(cfg, optim, place), 0
    state = init_state(cfg, optim, 0, where)
    for name, leaf in flatten(state.params).items():
        held += leaf.addressable_shards[0].data.nbytes
        assert leaf.addressable_shards[0].data.shape[0] * (4 if "groups" in name else 1) == leaf.shape[0]
    assert held == estimate_training_memory(cfg, 8, 16, MeshShape(data=2, stage=4)).parameters
    batch = tiny_batch(6, 16)
    place_batch = jax.device_put(batch, batch_sharding(place.mesh))
    text = make_train_step(cfg, optim, place=place).lower(state, place_batch, None).compile().as_text()
    # The only thing that comes together is the gradient of the states that are dealt out for the loss.
    assert text.count(" collective-permute(") == 2 and text.count(" all-gather(") == 1
    # Three rows a device do not make two microbatches.
    settings = StepSettings(accum_steps=2)
    ours = make_eval_step(cfg, settings, place=place)(state.params, place_batch)
    theirs = make_eval_step(cfg, settings)(init_state(cfg, optim).params, batch)
    np.testing.assert_allclose(ours.nats, theirs.nats, rtol=1e-5)
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-6)
    print("STAGED", held)


def check_experts() -> None:
    """Rows meet their expert wherever it is, also if all have the same, with room for few in a round."""
    mesh, rng = place_on("expert=8").mesh, np.random.default_rng(0)
    weights = rng.standard_normal((16, 6, 5)).astype(np.float32)
    rows = rng.standard_normal((8 * 12, 6)).astype(np.float32)
    goal = rng.standard_normal((8 * 12, 5)).astype(np.float32)
    choices = {
        "even": rng.integers(0, 17, (8, 12)),
        "one": np.full((8, 12), 13),
        "none": np.full((8, 12), 16),
    }
    # Room for 1 and for 5 of 12 rows: a whole number of rounds, and one that is not full.
    for capacity in (0.5, 3.0):

        @jax.jit
        def run(rows, sizes, weights, goal, capacity=capacity):
            def apply(rows, sizes, weights):
                compute = partial(grouped_matmul, w=weights)
                return through_experts(
                    rows, sizes[0], lambda x, own: compute(x, sizes=own), devices=8, capacity=capacity
                )

            over = jax.shard_map(
                apply, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
            )
            y, back = jax.vjp(over, rows, sizes, weights)
            gx, _, gw = back(goal)
            return y, gx, gw

        for name, ids in choices.items():
            ids = np.sort(ids, axis=1)
            sizes = np.stack([np.bincount(i, minlength=17)[:16] for i in ids]).astype(np.int32)
            padded = np.concatenate([weights, np.zeros((1, 6, 5), np.float32)])
            flat = ids.reshape(-1)
            dw = np.zeros_like(padded)
            np.add.at(dw, flat, rows[:, :, None] * goal[:, None])
            expected = (
                np.einsum("md,mde->me", rows, padded[flat]),
                np.einsum("me,mde->md", goal, padded[flat]),
                dw[:16],
            )
            for a, b in zip(run(rows, sizes, weights, goal), expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
            print("EXACT", name, capacity)


def check_overflow() -> None:
    """A model whose router sends every token to the same two experts."""
    cfg = model("E")
    params = scattered(cfg)
    bias = params["layers"]["0" if "0" in params["layers"] else 0]["mixer"]["gate"]
    bias["e_score_correction_bias"] = jnp.array([0.0, 100.0, 100.0, 0.0])
    settings, batch = StepSettings(loss_chunk=32), tiny_batch(8, 16, vocab=64)
    whole = jax.jit(lambda p, b: gradients(cfg, p, b, settings))
    expected, sums = whole(params, batch)
    counts = np.asarray(sums.routing.counts)[0]
    assert counts[0] == counts[3] == 0 and counts[1] == counts[2] > 0
    for capacity in (0.3, 2.0):
        place = Placement(make_mesh(MeshShape(expert=4, fsdp=2)), capacity)
        where = state_shardings(cfg, constant_lr(), place).params
        run = jax.jit(lambda p, b, place=place: gradients(cfg, p, b, settings, place=place))
        ours, _ = run(jax.device_put(params, where), jax.device_put(batch, batch_sharding(place.mesh)))
        for (name, a), b in zip(flatten(ours).items(), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(
                a, b, rtol=0, atol=TOLERANCE * float(jnp.max(jnp.abs(b))) + 1e-9, err_msg=name
            )
    print("DROPLESS")


def check_memory() -> None:
    """A device holds an eighth of the matrices, and its compiled step takes and leaves no more."""
    # XLA:CPU drops the barriers that keep what `jax.checkpoint` repeats apart from the first time, but not loops.
    cfg, optim = model("-" * 8, hidden_size=64, mlp=MLPConfig(512), scan_layers=True), constant_lr()
    place = place_on("fsdp=8")
    where = state_shardings(cfg, optim, place)
    state = init_state(cfg, optim, 0, where)
    assert_identical(jax.tree.map(np.asarray, state), copied(init_state(cfg, optim)))
    whole = held = 0
    for leaf in jax.tree.leaves(state):
        shard = leaf.addressable_shards[0].data.size
        whole, held = whole + leaf.size, held + shard
        assert shard * 8 == leaf.size or leaf.size <= 8 * 512
    # Norms and biases are whole on each.
    assert held < whole / 8 * 1.2
    for name, moment in flatten(state.opt_state[0].mu).items():
        assert moment.sharding == flatten(state.params)[name].sharding
    batch = jax.device_put(tiny_batch(8, 8), batch_sharding(place.mesh))
    for remat in ("none", "layer"):
        step = make_train_step(cfg, optim, StepSettings(loss_chunk=32, remat=remat), place=place)
        compiled = step.lower(state, batch, None).compile()
        memory = compiled.memory_analysis()
        assert memory.argument_size_in_bytes < held * 4 + 10_000
        text = compiled.as_text()
        assert text.count(" all-gather(") > 0 and text.count(" reduce-scatter(") > 0
        # Whole parameters or gradients would be a third of the state each: one block of eight is gathered at a time.
        temporary = memory.temp_size_in_bytes / 4 / whole
        assert temporary < 0.25, temporary
        print("SHARE", remat, held / whole, temporary)


def check_training() -> None:
    """Runs on several meshes go as on one device; a checkpoint of one goes on, bit by bit, on another."""
    cfg, optim, sizes = tiny_config("*-"), constant_lr(), []

    def run(shape, folder=None, steps=3, **settings):
        seen = []
        made = TrainSettings(
            steps=steps, mesh=shape, save_seconds=None, step=StepSettings(loss_chunk=64, **settings)
        )
        watch = [lambda e: seen.append(e.loss) if hasattr(e, "grad_norm") else None]
        result = fit(cfg, optim, TinyLoader(16), made, callbacks=watch, folder=folder)
        return seen, result.params

    state, step, loader, expected = init_state(cfg, optim), make_train_step(cfg, optim), TinyLoader(16), []
    for _ in range(3):
        state, metrics = step(state, next(loader), None)
        expected.append(float(metrics.loss))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        losses, params = run(MeshShape(data=2, fsdp=4), folder, accum_steps=2)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
            sizes.append(a.addressable_shards[0].data.size / a.size)
        assert min(sizes) == 1 / 4
        with Checkpoints(os.path.join(folder, "checkpoints")) as saved:
            found = [
                saved.restore_latest(
                    jax.tree.map(
                        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                        abstract_state(cfg, optim),
                        state_shardings(cfg, optim, place_on(text)),
                    )
                )
                for text in ("data=2,fsdp=4", "fsdp=2", "data=4,fsdp=2")
            ]
        for other in found[1:]:
            assert_identical(jax.tree.map(np.asarray, found[0].state), jax.tree.map(np.asarray, other.state))
        more, _ = run(MeshShape(data=8), folder, steps=5)
        assert len(more) == 2
    try:
        run(MeshShape(data=8, tensor=1), steps=1, accum_steps=4)
    except ValueError as error:
        assert "batch_size=16: must be a multiple of data * fsdp * expert * accum_steps = 8 * 4" in str(error)
    else:
        raise AssertionError("16 rows on 8 devices in 4 parts were accepted")
    print("RESUMED")


class TwoBatches(TinyLoader):
    """The same two batches for ever."""

    def __next__(self):
        batch = tiny_batch(self.rows, self.length, seed=self.step % 2)
        self.step += 1
        return batch


def check_context_training() -> None:
    """A run whose devices share documents goes as on one; interrupted, it goes on bit by bit, whatever room it had grown."""
    cfg, optim = tiny_config("M*-"), constant_lr()

    def run(shape, folder=None, steps=4, **context):
        seen, compiled = [], []
        settings = TrainSettings(
            steps=steps,
            mesh=shape,
            context=ContextSettings(block=4, stage_rounds=2, **context),
            save_seconds=None,
            step=StepSettings(loss_chunk=64, accum_steps=2),
        )

        def watch(event):
            seen.extend([event.loss] if isinstance(event, StepEvent) else [])
            compiled.extend([event.parameters] if isinstance(event, CompileEvent) else [])

        result = fit(cfg, optim, TwoBatches(8), settings, callbacks=[watch], folder=folder)
        return seen, copied(result.params), len(compiled)

    shape = MeshShape(data=2, context=4)
    state, step, loader, expected = init_state(cfg, optim), make_train_step(cfg, optim), TwoBatches(8), []
    for _ in range(4):
        state, metrics = step(state, next(loader), None)
        expected.append(float(metrics.loss))
    losses, params, programs = run(shape)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
    # A run begins with room for more batches than these two.
    assert programs == 1
    with tempfile.TemporaryDirectory() as folder:
        before, _, _ = run(shape, folder, steps=2)
        after, again, _ = run(shape, folder)
        assert before + after == losses
        assert_identical(again, params)
    try:
        run(shape, steps=1, exchange="ragged")
    except ValueError as error:
        assert "context.exchange='ragged': XLA has no ragged all-to-all for CPUs" in str(error)
    else:
        raise AssertionError("an exchange that CPUs cannot run was accepted")
    print("SHARED", programs)


def check_validation(*meshes: str) -> None:
    """Nats per token of a corpus, whole and in part, whatever devices share its rows and documents."""
    cfg = model("M*E")
    lengths = np.random.default_rng(0).integers(2, 90, 12)
    corpus, tokenizer = synthetic_corpus(lengths, 64), Tokenizer.train(["a"], 259)
    params = scattered(cfg)
    made = partial(Validation, cfg, corpus, tokenizer, batch_size=4, seq_len=44, part=200)
    one = made()
    expected = one.whole(params), one.partial(params, 0)["validation_loss"]
    assert len(one.batches) > len(one.few) == 1 and expected[0] != expected[1]
    for text in meshes:
        context = ContextSettings(block=4, stage_rounds=2) if "context" in text else None
        place = place_on(text)
        ours = made(place=place, context=context)
        where = state_shardings(cfg, constant_lr(), place).params
        found = jax.device_put(params, where)
        # Compiled ahead, for the batches that it will score: twice is the same to the bit.
        ours.compile()
        for _ in range(2):
            losses = ours.whole(found), ours.partial(found, 0)["validation_loss"]
            np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
        assert losses == (ours.whole(found), ours.partial(found, 0)["validation_loss"])
        assert (ours.targets, ours.bits_per_nat) == (one.targets, one.bits_per_nat)
        print("SCORED", text)


if __name__ == "__main__":
    assert jax.device_count() == 8
    globals()[f"check_{sys.argv[1]}"](*sys.argv[2:])

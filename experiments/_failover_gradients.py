"""How far a step's gradient under failures is from the exact one of its batch, and bases that are drawn instead of computed."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig
from jaxllm.model.functional import Params, abstract_params, flatten
from jaxllm.train.degraded import Degraded, letter_of, ranks
from jaxllm.train.failover import FailoverSettings
from jaxllm.train.step import StepSettings, gradients


@lru_cache
def make_drawn(
    cfg: ModelConfig, policy: tuple[tuple[str, str], ...], rank: int | str | None, seed: int = 0
) -> Any:
    """The compiled ``number -> bases``: random orthonormal columns by dotted path, others for each number."""
    found, shapes = ranks(cfg, dict(policy), rank), flatten(abstract_params(cfg))

    def bases(number: Array) -> dict[str, Array]:
        drawn = {}
        for index, (name, r) in enumerate(found.items()):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), index)
            drawn[name] = jnp.linalg.qr(jax.random.normal(key, (*shapes[name].shape[:-1], r)))[0]
        return drawn

    return jax.jit(bases)


@lru_cache
def _make_of_shards(
    cfg: ModelConfig, settings: StepSettings, skipped: frozenset[str] | None, recompute: bool
) -> Any:
    """The compiled ``(params, batch [n, B / n, ...], bases) -> (gradients [n, ...], weights [n])``; exact without letters."""

    def of_shards(params: Params, batch: PackedBatch, bases: Any) -> tuple[Params, Array]:
        degraded = None if skipped is None else Degraded(skipped, bases or {}, recompute)

        def one(part: PackedBatch) -> tuple[Params, Array]:
            grads, sums = gradients(cfg, params, part, settings, degraded=degraded)
            return grads, sums.weight

        return jax.vmap(one)(batch)

    return jax.jit(of_shards)


def mean_gradients(
    cfg: ModelConfig,
    params: Params,
    batch: PackedBatch,
    workers: int,
    jobs: tuple[tuple[int, ...], ...],
    failover: FailoverSettings,
    bases: Mapping[str, Array] | None = None,
    settings: StepSettings | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What a step makes of the mean gradient of a batch under failures, and that gradient; float64 by dotted path.

    Without the loop of `jaxllm.train.failover`: gradients of all shards are taken both ways and put together afterwards.

    Args:
        cfg: model.
        params: its parameters.
        batch: of all shards, in their order; [B, T].
        workers: n, how many shards it is of.
        jobs: shards of each living worker, as :meth:`FailoverSettings.jobs` gives them.
        failover: what is done about the others.
        bases: method mecefo: V1 of each low-rank weight.
        settings: of the step.
    """
    settings = settings or StepSettings()
    parts = jax.tree.map(lambda x: x.reshape(workers, len(x) // workers, *x.shape[1:]), batch)
    exact, weights = _make_of_shards(cfg, settings, None, False)(params, parts, None)
    trained, cheap = np.zeros((2, workers), bool)
    for own in jobs:
        trained[list(own)] = True
        cheap[list(own)] = failover.method == "mecefo" and len(own) > 1
    whole = trained & ~cheap
    cheaper, skipped = exact, frozenset()
    if cheap.any():
        skipped = failover.skipped(cfg)
        cheaper, _ = _make_of_shards(cfg, settings, skipped, failover.recompute)(params, parts, bases)

    weights = np.asarray(weights, np.float64)

    def total(grads: Array, shards: np.ndarray) -> np.ndarray:
        return np.tensordot(1.0 * shards, np.asarray(grads, np.float64), 1)

    given, true = {}, {}
    cheaper = flatten(cheaper)
    for name, own in flatten(exact).items():
        taken = whole if letter_of(cfg, name) in skipped else trained
        # Where nobody has a gradient of it, a parameter stays as it is.
        learnt = total(own, whole) + total(cheaper[name], taken & cheap)
        given[name] = learnt / max(weights[taken].sum(), 1.0)
        true[name] = total(own, trained | True) / weights.sum()
    return given, true


def relative_error(*args: Any, **options: Any) -> float:
    """``|g' - g| / |g|`` over all parameters, of the two of :func:`mean_gradients`, with its arguments."""
    given, true = mean_gradients(*args, **options)
    square = sum(((given[name] - each) ** 2).sum() for name, each in true.items())
    return float(np.sqrt(square / sum((each**2).sum() for each in true.values())))

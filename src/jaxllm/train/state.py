"""What a training step takes and returns."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.model.functional import Params, abstract_params, init_params
from jaxllm.train.balance import trained
from jaxllm.train.optim import OptimConfig, make_optimizer

# Leaves are arrays, but also ShapeDtypeStructs or shardings while JAX maps over the tree.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; a checkpoint of it, and of the data's place, is a whole run.

    Attributes:
        params: float32 master parameters.
        opt_state: of :func:`make_optimizer`; moments are float32. Routers' correction biases have none: the step itself
            moves them (:mod:`jaxllm.train.balance`).
        step: i32[]; batches seen, skipped ones included.
        rng: u32[2]; key data of the run's seed, constant: a step's key is this folded with its number.
        skipped: i32[]; updates left out because the loss or the gradient was not finite.
        consecutive_skips: i32[]; those since the last update.
    """

    params: Params
    opt_state: Any
    step: Leaf
    rng: Leaf
    skipped: Leaf
    consecutive_skips: Leaf

    def replace(self, **changes: Any) -> "TrainState":
        """A copy with some fields changed."""
        return replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainPlan:
    """What the host decides for one step.

    Attributes:
        lr: f32[]; learning rate; None: that of the schedule at the state's step.
        scattered: :class:`parallel.context.scattered.Scattered` of a batch that devices along ``context`` share.
        failover: :class:`jaxllm.train.failover.FailoverPlan` of a step with fewer workers than the batch has shards.
    """

    lr: Leaf = None
    scattered: Leaf = None
    failover: Leaf = None


def master_config(cfg: ModelConfig) -> ModelConfig:
    """``cfg`` with float32 parameters: training keeps masters and rounds them where they are used."""
    return cfg.replace(precision=replace(cfg.precision, param="float32"))


def state_of(
    params: Params, optim: OptimConfig, seed: int = 0, shardings: TrainState | None = None
) -> TrainState:
    """The state before step 0 that starts from ``params``; makes float32 masters, never aliases ``params``.

    Args:
        params: of any dtype.
        optim: optimiser.
        seed: of the run's key.
        shardings: where every part of it is made (:func:`jaxllm.train.placement.state_shardings`); None: with ``params``.
    """

    def build(params: Params) -> TrainState:
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        step, skipped, consecutive = (jnp.zeros((), jnp.int32) for _ in range(3))
        rng = jax.random.key_data(jax.random.key(seed))
        return TrainState(
            params, make_optimizer(optim).init(trained(params)), step, rng, skipped, consecutive
        )

    return jax.jit(build, out_shardings=shardings)(params)


def init_state(
    cfg: ModelConfig, optim: OptimConfig, seed: int = 0, shardings: TrainState | None = None
) -> TrainState:
    """The state before step 0 of a new model; with ``shardings`` no device ever has more than its share."""
    where = None if shardings is None else shardings.params
    return state_of(init_params(master_config(cfg), seed, where), optim, seed, shardings)


def abstract_state(cfg: ModelConfig, optim: OptimConfig) -> TrainState:
    """ShapeDtypeStructs of :func:`init_state`; nothing is allocated."""
    return jax.eval_shape(lambda p: state_of(p, optim), abstract_params(master_config(cfg)))

"""Load balance of routed experts: the auxiliary loss, and the correction bias that no gradient moves.

After every update the bias of expert e of each layer moves by ``rate * sign(mean(n) - n_e)``, n being the tokens of the
whole batch that chose each expert (arXiv 2408.15664). It is a parameter of the model, but not of the optimiser: it has
no gradient, no moments and no decay.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig
from jaxllm.model.functional import Params, map_named
from jaxllm.model.scan import groups_of, layer_names
from parallel.context.scattered import Scattered

BIAS = "e_score_correction_bias"
SCOPES = ("sequence", "batch")


class Routing(NamedTuple):
    """Sums over a batch of what the routers did.

    Attributes:
        counts: i32[layers, E]; tokens that chose each expert, in the order of ``cfg.letters``: prediction blocks last.
        balance: f32[]; balance loss of each row times the row's weight, summed over rows and layers.
    """

    counts: Array
    balance: Array


def taps(pattern: str, scope: str) -> frozenset[str]:
    """What to ask the layers of a pattern for; nothing where none has experts."""
    return frozenset({"expert_counts", f"balance_{scope}"} if "E" in pattern else ())


def routing(aux: dict[str, Any], weights: Float[Array, " B"]) -> Routing | None:
    """Sums of one batch, of the taps of :func:`taps`; ``weights`` are those of each row's loss."""
    if not aux:
        return None
    if "balance_sequence" in aux:
        total = jnp.sum(aux["balance_sequence"] * weights)
    else:
        total = jnp.sum(aux["balance_batch"]) * jnp.sum(weights)
    return Routing(aux["expert_counts"], total)


def joined(main: Routing | None, depths: Sequence[Routing | None], blocks: int) -> Routing | None:
    """Routing of a model and its prediction blocks.

    Args:
        main: of the model's own layers.
        depths: of each prediction depth.
        blocks: prediction blocks; a single one serves all depths, whose tokens and mean loss are then its own.
    """
    found = [depth for depth in depths if depth is not None]
    if not found:
        return main
    counts = [depth.counts for depth in found]
    counts = [sum(counts[1:], counts[0])] if blocks == 1 else counts
    balance = sum((depth.balance for depth in found[1:]), found[0].balance) * (blocks / len(found))
    parts = ([] if main is None else [main.counts]) + counts
    return Routing(jnp.concatenate(parts), balance if main is None else main.balance + balance)


def row_weights(batch: PackedBatch, scattered: Scattered | None = None) -> Float[Array, " rows"]:
    """Weight of each row's next-token loss; of this device's tokens where rows are ``scattered``."""
    scored = (batch.targets[..., 0] >= 0).astype(jnp.float32)
    weights = scored if batch.loss_mask is None else scored * batch.loss_mask
    return jnp.sum(weights, axis=1) if scattered is None else scattered.by_row(weights)


def imbalance(counts: Int[Array, "L E"]) -> Float[Array, ""]:
    """Load of the busiest expert over the mean, of the worst layer; 1 is even."""
    mean = jnp.maximum(jnp.mean(counts.astype(jnp.float32), axis=1), jnp.finfo(jnp.float32).tiny)
    return jnp.max(jnp.max(counts, axis=1) / mean)


def trained(params: Params) -> Params:
    """``params`` with None for what the optimiser must not see."""
    return map_named(lambda name, value: None if name.endswith(BIAS) else value, params)


def corrected(params: Params, cfg: ModelConfig, counts: Int[Array, "L E"], rate: Any) -> Params:
    """``params`` with every router's bias moved towards an even load.

    Args:
        params: with one entry per layer, or with stacked groups.
        cfg: the model.
        counts: of its ``E`` layers, in the order of ``cfg.letters``.
        rate: of the move; a number or f32[].
    """
    n, groups = counts.astype(jnp.float32), groups_of(cfg.pattern)
    step = rate * jnp.sign(jnp.mean(n, axis=1, keepdims=True) - n)
    layers = [i for i, letter in enumerate(cfg.letters) if letter == "E"]
    inner = 0 if cfg.mtp is None else len(cfg.mtp.pattern)

    def row(layer: str) -> int:
        kind, number, *rest = layer.split(".")
        place = int(number) if kind == "layers" else len(cfg.pattern) + int(number) * inner + int(rest[1])
        return layers.index(place)

    def move(name: str, value: Any) -> Any:
        if not name.endswith(BIAS):
            return value
        if name.startswith("groups."):
            return value + step[jnp.array([row(layer) for layer in layer_names(name, groups)])]
        return value + step[row(name)]

    return map_named(move, params)


def updated(params: Params, updates: Params, lr: Any) -> Params:
    """``params - lr * updates``; where the optimiser has none, the parameter itself."""
    return jax.tree.map(lambda p, u: p if u is None else p - lr * u, params, updates)

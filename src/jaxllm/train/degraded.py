"""What a worker leaves out of its gradients while it does two workers' jobs (MeCeFO, arXiv 2510.16415).

By letter of the pattern: a sub-block is skipped in backward, or computed again from its input with weight gradients of
low rank, or left exact. Norms, biases, routers, embeddings and heads are exact wherever their sub-block is not skipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jaxllm.axes import Axes
from jaxllm.config import ModelConfig, require
from jaxllm.linear import Context
from jaxllm.model.functional import Params, abstract_params, flatten, linear_weights, map_named, param_axes
from jaxllm.model.scan import groups_of
from parallel.failover.degraded import low_rank_grouped_matmul, low_rank_matmul, refresh

MIXERS = "M*WGJ"
RULES = ("skip", "low_rank", "exact")
# As published for attention and feed-forward blocks; recurrent mixers are our extension: they keep their gradients.
POLICY: Mapping[str, str] = {letter: "skip" if letter in "*W" else "low_rank" for letter in "M*WGJ-E"}
# Linear layers with few outputs or inputs: the exact gradient costs no more.
_SMALL = ("a_proj", "b_proj", "w1", "w2")
_EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


@partial(jax.tree_util.register_dataclass, data_fields=("base", "v1"), meta_fields=("named",))
@dataclass(frozen=True)
class LowRankGrad:
    """A weight (contract 6) whose gradient is projected onto the columns of ``v1``.

    Attributes:
        base: [in, out], or [E, in, out] of experts; with a leading axis of layers where they are stacked.
        v1: [..., in, r].
        named: axes of the parameter.
    """

    base: Any
    v1: Any
    named: Axes

    def apply(self, x: Float[Array, "B T i"], ctx: Context) -> Float[Array, "B T o"]:
        """As :meth:`jaxllm.linear.Weight.apply`."""
        w = self.base if ctx.precision.operand else self.base.astype(x.dtype)
        return low_rank_matmul(x, w, self.v1, operand_dtype=ctx.precision.operand, out_dtype=x.dtype)

    def apply_grouped(
        self, x: Float[Array, "M i"], sizes: Int[Array, " E"], ctx: Context
    ) -> Float[Array, "M o"]:
        """As :meth:`jaxllm.linear.GroupedWeight.apply_grouped`."""
        options = {"operand_dtype": ctx.precision.operand, "implementation": ctx.implementation}
        return low_rank_grouped_matmul(x, self.base, self.v1, sizes, **options)

    def axes(self) -> Axes:
        """Axes of the logical weight; a scan over layers has taken theirs."""
        return self.named[-self.base.ndim :]

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """Of the base."""
        return self.base.shape


@dataclass(frozen=True)
class Degraded:
    """How gradients are taken by who does two jobs.

    Attributes:
        skipped: letters whose sub-blocks are constants in backward.
        bases: V1 by the dotted path of each weight whose gradient is of low rank.
        recompute: sub-blocks keep their inputs only.
    """

    skipped: frozenset[str]
    bases: Mapping[str, Array]
    recompute: bool

    def weights(self, cfg: ModelConfig, params: Params) -> Params:
        """``params`` with a :class:`LowRankGrad` for each weight that has a basis."""
        axes = param_axes(cfg)

        def weight(name: str, value: Any) -> Any:
            return LowRankGrad(value, self.bases[name], axes[name]) if name in self.bases else value

        return map_named(weight, params)


def letter_of(cfg: ModelConfig, name: str) -> str | None:
    """Letter of the sub-block that a parameter belongs to; None for embeddings, the last norm and the head."""
    kind, *rest = name.split(".")
    if kind == "layers":
        return cfg.pattern[int(rest[0])]
    if kind == "groups":
        return cfg.pattern[groups_of(cfg.pattern)[int(rest[0])].start + int(rest[2])]
    return None


def low_rank_weights(cfg: ModelConfig, policy: Mapping[str, str]) -> list[str]:
    """Dotted paths of the weights whose gradients are of low rank."""
    linear = linear_weights(cfg)

    def chosen(name: str) -> bool:
        letter, parts = letter_of(cfg, name), name.split(".")
        if letter is None or policy[letter] != "low_rank":
            return False
        expert = parts[-2] == "experts" and parts[-1] in _EXPERTS
        return expert or (name in linear and parts[-2] not in _SMALL)

    return [name for name in flatten(abstract_params(cfg)) if chosen(name)]


def ranks(cfg: ModelConfig, policy: Mapping[str, str], rank: int | str | None) -> dict[str, int]:
    """Rank of each of :func:`low_rank_weights`.

    Args:
        cfg: model.
        policy: rule of each letter.
        rank: of all; "full": the inputs of each; None: a sixteenth of the model's width, or all inputs where those are
            fewer.

    Raises:
        ConfigError: it is more than a weight has inputs.
    """
    shapes = flatten(abstract_params(cfg))
    found = {}
    for name in low_rank_weights(cfg, policy):
        inputs = shapes[name].shape[-2]
        if rank == "full":
            found[name] = inputs
        elif rank is None:
            found[name] = min(inputs, max(1, cfg.hidden_size // 16))
        else:
            assert isinstance(rank, int)
            require(rank <= inputs, "failover.rank", rank, f"must be at most {inputs}, the inputs of {name}")
            found[name] = rank
    return found


def make_refresh(cfg: ModelConfig, policy: Mapping[str, str], rank: int | str | None = None) -> Any:
    """The compiled ``(params, previous) -> bases``: V1 of every weight by its dotted path.

    Bases from ``previous=None`` are a function of the parameters alone: what survivors agree on without a message.
    """
    found = ranks(cfg, policy, rank)

    def bases(params: Params, previous: Mapping[str, Array] | None = None) -> dict[str, Array]:
        weights = flatten(params)
        return {
            name: refresh(weights[name], r, None if previous is None else previous[name])
            for name, r in found.items()
        }

    return jax.jit(bases)

"""AdamW with decoupled decay by parameter name, and learning-rate schedules over steps or over the clock."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.config import require
from jaxllm.model.functional import Params, map_named

SCHEDULES = ("wsd", "cosine", "constant")
# Decay rates, skips and offsets are not directions that weight decay should shrink (as in Mamba-2's own training).
UNDECAYED = ("A_log", "D", "dt_bias", "bias", "conv_bias", "e_score_correction_bias")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) and its learning-rate schedule.

    Attributes:
        lr: peak learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by the learning rate; see :func:`decay_mask`.
        clip_norm: bound of the gradient's global norm; None: no clipping.
        schedule: after warm-up: "wsd" (constant, then linear to the minimum; arXiv 2404.06395), "cosine" or "constant".
        warmup_steps: steps of linear warm-up; step 0 already moves.
        total_steps: length of the schedule; needed unless it is "constant" or driven by the clock.
        decay_fraction: wsd: share of what follows the warm-up in which the rate falls.
        min_lr_ratio: last rate over the peak.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 100
    total_steps: int | None = None
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        require(self.lr > 0 and math.isfinite(self.lr), "optim.lr", self.lr, "must be positive")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optim.betas",
            self.betas,
            "must be two numbers in [0, 1)",
        )
        require(self.eps > 0, "optim.eps", self.eps, "must be positive")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must be at least 0")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            "optim.clip_norm",
            self.clip_norm,
            "must be positive, or None for no clipping",
        )
        require(self.schedule in SCHEDULES, "optim.schedule", self.schedule, " or ".join(SCHEDULES))
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "must be at least 0")
        require(
            self.total_steps is None or self.total_steps > self.warmup_steps,
            "optim.total_steps",
            self.total_steps,
            f"must be more than warmup_steps={self.warmup_steps}",
        )
        require(
            0 < self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "must be in (0, 1]"
        )
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "must be in [0, 1]")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "betas": list(self.betas)}


def learning_rate(optim: OptimConfig, step: Any, progress: Any = None) -> Any:
    """Learning rate of a step; works on numbers and on traced arrays.

    Args:
        optim: schedule.
        step: i32[] or int, from 0.
        progress: share of the run that is over, in [0, 1], for runs that stop by the clock; None: taken from ``step``.

    Returns:
        f32[]. Warm-up goes by steps in either case: it is the moments that need it, not the clock.

    Raises:
        ConfigError: neither ``progress`` nor ``total_steps`` says how long the run is.
    """
    # On the host NumPy: an eager jnp operation would wait in the queue behind the step that is running.
    xp = jnp if isinstance(step, jax.Array) or isinstance(progress, jax.Array) else np
    warm = xp.minimum(1.0, (step + 1) / max(optim.warmup_steps, 1))
    if optim.schedule == "constant":
        return xp.asarray(optim.lr * warm, xp.float32)
    if progress is None:
        require(
            optim.total_steps is not None,
            "optim.total_steps",
            None,
            f"schedule={optim.schedule!r} needs it; set it, or use schedule='constant'",
        )
        assert optim.total_steps is not None
        progress = (step - optim.warmup_steps) / (optim.total_steps - optim.warmup_steps)
    progress = xp.clip(xp.asarray(progress, xp.float32), 0.0, 1.0)
    if optim.schedule == "wsd":
        left = xp.minimum(1.0, (1.0 - progress) / optim.decay_fraction)
    else:
        left = 0.5 * (1.0 + xp.cos(xp.pi * progress))
    ratio = optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * left
    return xp.asarray(optim.lr * warm * ratio, xp.float32)


def decays(name: str) -> bool:
    """Whether the parameter of this dotted name is subject to weight decay."""
    *owners, last = name.split(".")
    is_norm = bool(owners) and (owners[-1].endswith("norm") or owners[-1] == "norm_f")
    return not (is_norm or last in UNDECAYED)


def decay_mask(params: Params) -> Any:
    """True where weight decay applies: projections, embedding and convolution, not norms, biases, A_log, D, dt_bias."""
    return map_named(lambda name, _: decays(name), params)


def make_optimizer(optim: OptimConfig) -> optax.GradientTransformation:
    """AdamW's direction, to be multiplied by minus the learning rate.

    Neither the rate nor the clipping is inside: the rate may come with the batch (:class:`TrainPlan`), and the norm is
    computed by the train step, which reports it and needs it to judge the gradient.
    """
    adam = optax.scale_by_adam(*optim.betas, eps=optim.eps)
    if optim.weight_decay == 0:
        return adam
    return optax.chain(adam, optax.add_decayed_weights(optim.weight_decay, mask=decay_mask))

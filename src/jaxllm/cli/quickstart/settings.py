"""Every number of the quickstart in one place: model, batch, precision and schedule."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxllm.cli import field_types, overrides
from jaxllm.cli.errors import UserError
from jaxllm.config import ModelConfig, decode, one_of, positive


@dataclass(frozen=True)
class Settings:
    """Model, batch and schedule of a quickstart run.

    Attributes:
        preset: the model; its vocabulary becomes that of the tokenizer.
        vocab_size: entries of the tokenizer that is trained.
        matmul: operands of large products: "auto" is bfloat16 where the device multiplies it in hardware.
        batch_size: rows per step.
        seq_len: tokens per row.
        lr: peak learning rate.
        warmup_steps: steps in which the rate rises.
        schedule: after the warm-up, by the clock: "wsd" or "cosine".
        decay_fraction: wsd: share of the time, at its end, in which the rate falls to zero.
        weight_decay: of matrices.
        beta2: of Adam's second moment.
        clip_norm: largest norm of the gradient.
        evaluations: how often the validation loss is taken on the way.
        evaluation_tokens: validation tokens of each of these; before and after training, all are taken.
    """

    preset: str = "quickstart"
    vocab_size: int = 4096
    matmul: Literal["auto", "bfloat16", "compute"] = "auto"
    batch_size: int = 2
    seq_len: int = 512
    lr: float = 3e-3
    warmup_steps: int = 50
    schedule: Literal["wsd", "cosine"] = "wsd"
    decay_fraction: float = 0.8
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip_norm: float = 1.0
    evaluations: int = 8
    evaluation_tokens: int = 16384

    def __post_init__(self) -> None:
        positive(
            vocab_size=self.vocab_size,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            evaluations=self.evaluations,
            evaluation_tokens=self.evaluation_tokens,
        )
        one_of("matmul", self.matmul, "auto", "bfloat16", "compute")


# Model and precision were chosen by CPU time per token; batch, rate and schedule were not searched.
CPU = Settings()
# What a single GPU or TPU core trains in the same minutes.
ACCELERATOR = Settings(
    preset="small", vocab_size=16384, batch_size=32, seq_len=1024, lr=1e-3, evaluation_tokens=262144
)


def for_backend(backend: str) -> Settings:
    """The settings of a device.

    Args:
        backend: ``jax.default_backend()``.
    """
    return CPU if backend == "cpu" else ACCELERATOR


def override(
    settings: Settings, model: ModelConfig, changes: tuple[str, ...]
) -> tuple[Settings, ModelConfig]:
    """Settings and model after ``--set``: plain names are settings, ``model.`` leads to the model's fields.

    Raises:
        UserError: a change that is not NAME=VALUE.
        ConfigError: an unknown name, or a value that does not fit.
    """
    wanted = overrides.apply({**asdict(settings), "model": model.to_dict()}, changes)
    fields: Any = wanted.pop("model")
    if not isinstance(fields, dict):
        raise UserError("--set model", fields, "model.FIELD=VALUE", "--preset chooses another model.")
    wanted, fields = field_types.checked(Settings, wanted), field_types.checked(ModelConfig, fields, "model.")
    return decode(Settings, wanted), decode(ModelConfig, fields, "model.")

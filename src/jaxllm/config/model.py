"""The model: a pattern string and the settings of its parts.

One residual sub-block per letter: ``M`` Mamba-2, ``G`` gated DeltaNet, ``J`` JetBlock, ``*`` attention, ``W``
sliding-window attention, ``-`` MLP, ``E`` mixture of experts. A Llama layer is ``*-``, a Mixtral layer ``*E``.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxllm.config.attention import AttentionConfig
from jaxllm.config.checks import one_of, positive, positive_fields, require
from jaxllm.config.codec import decode, encode
from jaxllm.config.feedforward import MLPConfig, MoEConfig
from jaxllm.config.precision import Precision
from jaxllm.config.recurrent import GatedDeltaConfig, JetConfig, MambaConfig

LETTERS = {
    "M": "Mamba-2",
    "G": "gated DeltaNet",
    "J": "JetBlock",
    "*": "attention",
    "W": "sliding-window attention",
    "-": "MLP",
    "E": "mixture of experts",
}


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction (arXiv 2512.20856, section 3).

    Attributes:
        pattern: letters of one prediction block; the mixers' settings are the model's.
        blocks: blocks in the checkpoint; a single one serves every depth, otherwise block k serves depth k.
    """

    pattern: str = "*E"
    blocks: int = 1

    def __post_init__(self) -> None:
        positive_fields(self, "mtp", "blocks")
        require(bool(self.pattern), "mtp.pattern", self.pattern, "must have at least one letter")


@dataclass(frozen=True)
class ModelConfig:
    """A hybrid decoder: one residual sub-block ``h + mixer(RMSNorm(h))`` per letter of ``pattern``.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        pattern: one letter per sub-block: M, G, J, *, W, -, E.
        mamba: needed by M.
        attention: needed by * and W.
        mlp: needed by -.
        moe: needed by E.
        delta: needed by G.
        jet: needed by J.
        mtp: multi-token prediction, or None.
        norm_eps: epsilon of every RMSNorm.
        norm_cast: "last": the norm's weight is multiplied in float32 and the product cast (Nemotron-H); "first": cast,
            then multiply (Llama). They differ below float32 only.
        tie_embeddings: the head is the embedding transposed.
        init_std: standard deviation of linear weights; residual-writing ones are divided by sqrt(len(pattern)).
        scan_layers: repeated groups of letters run under ``lax.scan``, their parameters stacked: a deep model then
            compiles in a fraction of the time. For training; `functional.unstack` gives one entry per layer again.
        precision: dtypes.
    """

    vocab_size: int
    hidden_size: int
    pattern: str
    mamba: MambaConfig | None = None
    attention: AttentionConfig | None = None
    mlp: MLPConfig | None = None
    moe: MoEConfig | None = None
    delta: GatedDeltaConfig | None = None
    jet: JetConfig | None = None
    mtp: MTPConfig | None = None
    norm_eps: float = 1e-5
    norm_cast: Literal["last", "first"] = "last"
    tie_embeddings: bool = False
    init_std: float = 0.02
    scan_layers: bool = False
    precision: Precision = field(default_factory=Precision)

    def __post_init__(self) -> None:
        positive(vocab_size=self.vocab_size, hidden_size=self.hidden_size)
        require(bool(self.pattern), "pattern", self.pattern, "must have at least one letter")
        patterns = {"pattern": self.pattern} | ({} if self.mtp is None else {"mtp.pattern": self.mtp.pattern})
        known = ", ".join(f"{letter} ({name})" for letter, name in LETTERS.items())
        for field_name, pattern in patterns.items():
            unknown = sorted(set(pattern) - set(LETTERS))
            require(
                not unknown,
                field_name,
                pattern,
                f"unknown letter {', '.join(unknown)}; known letters are {known}",
            )
            for letters, name in (
                ("M", "mamba"),
                ("*W", "attention"),
                ("-", "mlp"),
                ("E", "moe"),
                ("G", "delta"),
                ("J", "jet"),
            ):
                if set(letters) & set(pattern):
                    require(
                        getattr(self, name) is not None, name, None, f"the {field_name} {pattern!r} needs it"
                    )
        if "W" in "".join(patterns.values()):
            window = self.attention.window if self.attention else None
            require(window is not None, "attention.window", window, "the letter W needs a window")
        if self.moe is not None and self.moe.latent_size is not None:
            require(
                self.moe.latent_size <= self.hidden_size,
                "moe.latent_size",
                self.moe.latent_size,
                f"must be at most hidden_size={self.hidden_size}",
            )
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be positive")
        one_of("norm_cast", self.norm_cast, "last", "first")
        require(self.init_std > 0, "init_std", self.init_std, "must be positive")

    @property
    def letters(self) -> str:
        """Every sub-block's letter, those of the prediction blocks after the model's own."""
        return self.pattern if self.mtp is None else self.pattern + self.mtp.pattern * self.mtp.blocks

    @property
    def residual_std(self) -> float:
        """Standard deviation of the linear weights that write to the residual stream."""
        return self.init_std / len(self.pattern) ** 0.5

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; infinities are the string "inf"."""
        return encode(self)

    def to_json(self) -> str:
        """JSON text of :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelConfig":
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown or missing field, by its path.
        """
        return decode(cls, data)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))

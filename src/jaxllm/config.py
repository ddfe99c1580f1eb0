"""Model configuration: frozen dataclasses, validated on construction, with a JSON round trip.

A model is a pattern string with one residual sub-block per letter: ``M`` Mamba-2, ``G`` gated DeltaNet, ``J`` JetBlock,
``*`` attention, ``W`` sliding-window attention, ``-`` MLP, ``E`` mixture of experts. A Llama layer is ``*-``, a Mixtral
layer ``*E``.
"""

import json
import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

LETTERS = {
    "M": "Mamba-2",
    "G": "gated DeltaNet",
    "J": "JetBlock",
    "*": "attention",
    "W": "sliding-window attention",
    "-": "MLP",
    "E": "mixture of experts",
}


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the field, what was given and what is allowed."""


def require(condition: bool, name: str, given: Any, allowed: str) -> None:
    """Raise ConfigError unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{name}={given!r}: {allowed}")


def positive(**values: int) -> None:
    """Raise ConfigError unless every value is an integer of at least 1."""
    for name, value in values.items():
        require(isinstance(value, int) and value >= 1, name, value, "must be an integer of at least 1")


@dataclass(frozen=True)
class Precision:
    """Dtypes of one run.

    Attributes:
        param: storage of the (master) parameters.
        compute: residual stream and activations.
        accum: accumulation of matrix products, softmax, norms and recurrent states.
        matmul: dtype to which operands and cotangents of the large products are rounded; "compute" leaves them.
    """

    param: Literal["float32", "bfloat16"] = "float32"
    compute: Literal["float32", "bfloat16"] = "float32"
    accum: Literal["float32"] = "float32"
    matmul: Literal["compute", "bfloat16"] = "compute"

    def __post_init__(self) -> None:
        for name in ("param", "compute"):
            require(
                getattr(self, name) in ("float32", "bfloat16"),
                f"precision.{name}",
                getattr(self, name),
                "float32 or bfloat16",
            )
        require(
            self.accum == "float32", "precision.accum", self.accum, "float32 is the only accumulation dtype"
        )
        require(
            self.matmul in ("compute", "bfloat16"), "precision.matmul", self.matmul, "compute or bfloat16"
        )

    @property
    def operand(self) -> str | None:
        """Operand dtype of large products; None keeps the operands' own."""
        return None if self.matmul == "compute" else self.matmul


@dataclass(frozen=True)
class MambaConfig:
    """Mamba-2 mixer (arXiv 2405.21060; layout of Nemotron-H, arXiv 2504.03624).

    Attributes:
        num_heads: H; the inner width is H * P, whatever the hidden size.
        head_dim: P.
        state_size: N.
        n_groups: heads per group share B and C; heads of a group are contiguous.
        conv_kernel: width of the causal convolution over x, B and C.
        chunk_size: chunk of the scan; the result does not depend on it.
        dt_limit: clamp of dt after softplus; (0, inf) is none.
        norm_groups: groups of the gated RMSNorm; None takes n_groups (Nemotron-H); Mamba-2 checkpoints have 1.
        conv_bias: bias of the convolution.
        proj_bias: biases of the two projections.
    """

    num_heads: int
    head_dim: int = 64
    state_size: int = 128
    n_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 128
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm_groups: int | None = None
    conv_bias: bool = True
    proj_bias: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dt_limit", tuple(float(v) for v in self.dt_limit))
        positive(
            **{
                f"mamba.{n}": getattr(self, n)
                for n in ("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "chunk_size")
            }
        )
        require(self.conv_kernel >= 2, "mamba.conv_kernel", self.conv_kernel, "must be at least 2")
        require(
            self.num_heads % self.n_groups == 0,
            "mamba.n_groups",
            self.n_groups,
            f"must divide mamba.num_heads={self.num_heads}",
        )
        require(
            self.inner_size % self.gate_groups == 0 and self.gate_groups >= 1,
            "mamba.norm_groups",
            self.norm_groups,
            f"must divide num_heads * head_dim = {self.inner_size}",
        )
        low, high = self.dt_limit
        require(0 <= low < high, "mamba.dt_limit", self.dt_limit, "must be (low, high) with 0 <= low < high")

    @property
    def inner_size(self) -> int:
        """H * P."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner_size + 2 * self.n_groups * self.state_size

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, P, N) of the recurrence's state."""
        return self.num_heads, self.head_dim, self.state_size

    @property
    def gate_groups(self) -> int:
        """Groups of the gated norm."""
        return self.n_groups if self.norm_groups is None else self.norm_groups


@dataclass(frozen=True)
class GatedDeltaConfig:
    """Gated DeltaNet mixer (arXiv 2412.06464), with the options of Qwen3-Next and OLMo-Hybrid.

    Attributes:
        num_heads: H, heads of queries and keys.
        num_value_heads: Hv; value head h reads the query and key head h // (Hv / H). None: as many as ``num_heads``.
        key_head_dim: dk.
        value_head_dim: dv.
        conv_kernel: width of the causal convolution over q, k and v.
        chunk_size: chunk of the recurrence; the result does not depend on it.
        allow_neg_eigval: writes of strength up to 2 instead of 1, so that a state can change its sign (OLMo-Hybrid).
        norm_eps: epsilon of the gated norm; None takes the model's (Qwen3-Next).
    """

    num_heads: int
    num_value_heads: int | None = None
    key_head_dim: int = 128
    value_head_dim: int = 128
    conv_kernel: int = 4
    chunk_size: int = 64
    allow_neg_eigval: bool = False
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        names = ("num_heads", "key_head_dim", "value_head_dim", "conv_kernel", "chunk_size")
        positive(**{f"delta.{n}": getattr(self, n) for n in names})
        require(self.conv_kernel >= 2, "delta.conv_kernel", self.conv_kernel, "must be at least 2")
        require(
            self.value_heads >= 1 and self.value_heads % self.num_heads == 0,
            "delta.num_value_heads",
            self.num_value_heads,
            f"must be a multiple of delta.num_heads={self.num_heads}",
        )
        positive_eps = self.norm_eps is None or self.norm_eps > 0
        require(positive_eps, "delta.norm_eps", self.norm_eps, "must be positive, or None for the model's")

    @property
    def value_heads(self) -> int:
        """Hv."""
        return self.num_heads if self.num_value_heads is None else self.num_value_heads

    @property
    def key_size(self) -> int:
        """H * dk."""
        return self.num_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """Hv * dv."""
        return self.value_heads * self.value_head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: q, k and v."""
        return 2 * self.key_size + self.value_size

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(Hv, dk, dv) of the recurrence's state."""
        return self.value_heads, self.key_head_dim, self.value_head_dim


@dataclass(frozen=True)
class JetConfig:
    """JetBlock mixer (Jet-Nemotron, arXiv 2508.15884): the gated delta rule with an input-generated convolution of v.

    Attributes:
        num_heads: H, heads of queries, keys and values.
        key_head_dim: dk.
        value_head_dim: dv.
        conv_kernel: taps of the generated kernels.
        generator_reduction: the generator's hidden width is H * dv divided by this.
        norm_eps: epsilon of the gated norm.
        chunk_size: chunk of the recurrence; the result does not depend on it.
    """

    num_heads: int
    key_head_dim: int = 96
    value_head_dim: int = 256
    conv_kernel: int = 4
    generator_reduction: int = 8
    norm_eps: float = 1e-5
    chunk_size: int = 64

    def __post_init__(self) -> None:
        names = (
            "num_heads",
            "key_head_dim",
            "value_head_dim",
            "conv_kernel",
            "generator_reduction",
            "chunk_size",
        )
        positive(**{f"jet.{n}": getattr(self, n) for n in names})
        require(self.conv_kernel >= 2, "jet.conv_kernel", self.conv_kernel, "must be at least 2")
        require(
            self.value_size >= self.generator_reduction,
            "jet.generator_reduction",
            self.generator_reduction,
            f"must be at most num_heads * value_head_dim = {self.value_size}",
        )
        require(self.norm_eps > 0, "jet.norm_eps", self.norm_eps, "must be positive")

    @property
    def key_size(self) -> int:
        """H * dk."""
        return self.num_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """H * dv."""
        return self.num_heads * self.value_head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: v."""
        return self.value_size

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, dk, dv) of the recurrence's state."""
        return self.num_heads, self.key_head_dim, self.value_head_dim

    @property
    def generator_size(self) -> int:
        """Hidden width of the kernel generator."""
        return self.value_size // self.generator_reduction


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864), half-split layout.

    Attributes:
        theta: base of the frequencies.
        scaling: "none", "linear" (positions / factor) or "llama3" (smooth scaling by wavelength).
        factor: scaling factor.
        low_freq_factor: llama3: wavelengths above original / this are divided by factor.
        high_freq_factor: llama3: wavelengths under original / this are kept.
        original_max_position: llama3: context length before scaling.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        require(self.theta > 0, "rope.theta", self.theta, "must be positive")
        require(
            self.scaling in ("none", "linear", "llama3"),
            "rope.scaling",
            self.scaling,
            "none, linear or llama3",
        )
        require(self.factor >= 1, "rope.factor", self.factor, "must be at least 1")


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention.

    Attributes:
        num_heads: H.
        num_kv_heads: K; query head h reads kv head h // (H / K).
        head_dim: d; H * d need not equal the hidden size.
        rope: rotary positions, or None for no positional term (Nemotron-H).
        window: keys that a ``W`` layer sees, the token itself included; ``*`` layers see all.
        qk_norm: RMSNorm over head_dim on queries and keys before RoPE (Qwen3).
        qkv_bias: biases of q, k and v (Qwen2).
        out_bias: bias of the output projection.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    rope: RopeConfig | None = None
    window: int | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        positive(**{f"attention.{n}": getattr(self, n) for n in ("num_heads", "num_kv_heads", "head_dim")})
        require(
            self.num_heads % self.num_kv_heads == 0,
            "attention.num_kv_heads",
            self.num_kv_heads,
            f"must divide attention.num_heads={self.num_heads}",
        )
        if self.window is not None:
            positive(**{"attention.window": self.window})
        if self.rope is not None:
            require(self.head_dim % 2 == 0, "attention.head_dim", self.head_dim, "must be even with rope")


@dataclass(frozen=True)
class MLPConfig:
    """Feed-forward block: ``relu2`` is down(relu(up x)^2), ``swiglu`` is down(silu(gate x) * up x)."""

    intermediate_size: int
    activation: Literal["relu2", "swiglu"] = "relu2"
    bias: bool = False

    def __post_init__(self) -> None:
        positive(**{"mlp.intermediate_size": self.intermediate_size})
        require(self.activation in ("relu2", "swiglu"), "mlp.activation", self.activation, "relu2 or swiglu")


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
        positive(**{"mtp.blocks": self.blocks})
        require(bool(self.pattern), "mtp.pattern", self.pattern, "must have at least one letter")


@dataclass(frozen=True)
class MoEConfig:
    """Sparse mixture of experts (Nemotron 3, arXiv 2512.20848 and 2512.20856; DeepSeek-V3, 2412.19437; Mixtral, 2401.04088).

    Attributes:
        num_experts: E; routed experts.
        top_k: experts of each token.
        intermediate_size: F of each routed expert.
        shared_intermediate_size: width of the MLP that every token goes through besides; None (or 0): there is none.
        activation: of all experts, as in :class:`MLPConfig`.
        router: "sigmoid" scores each expert by itself, "softmax" all of them together.
        correction_bias: a bias per expert is added to the scores to select by, not to those to combine by; training
            moves it towards an even load, without a gradient (arXiv 2408.15664).
        norm_topk: the chosen scores are divided by their sum.
        scaling: factor of the combined experts, after ``norm_topk``.
        n_groups: groups of consecutive experts of which ``topk_groups`` may be chosen from (DeepSeek-V3).
        topk_groups: those with the largest sum of their two best scores.
        latent_size: width in which the routed experts work, between two projections that they share (LatentMoE); None:
            the hidden size, without projections.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int | None = None
    activation: Literal["relu2", "swiglu"] = "relu2"
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    correction_bias: bool = True
    norm_topk: bool = True
    scaling: float = 1.0
    n_groups: int = 1
    topk_groups: int = 1
    latent_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared_intermediate_size", self.shared_intermediate_size or None)
        sizes = ("num_experts", "top_k", "intermediate_size", "n_groups", "topk_groups")
        positive(**{f"moe.{name}": getattr(self, name) for name in sizes})
        for name in ("shared_intermediate_size", "latent_size"):
            if getattr(self, name) is not None:
                positive(**{f"moe.{name}": getattr(self, name)})
        require(self.activation in ("relu2", "swiglu"), "moe.activation", self.activation, "relu2 or swiglu")
        require(self.router in ("sigmoid", "softmax"), "moe.router", self.router, "sigmoid or softmax")
        require(self.scaling > 0, "moe.scaling", self.scaling, "must be positive")
        require(
            self.top_k <= self.num_experts,
            "moe.top_k",
            self.top_k,
            f"must be at most moe.num_experts={self.num_experts}",
        )
        grouped = self.n_groups == 1 or (self.num_experts % self.n_groups == 0 and self.group_size >= 2)
        require(
            grouped,
            "moe.n_groups",
            self.n_groups,
            f"must divide moe.num_experts={self.num_experts} into groups of at least 2, or be 1",
        )
        require(
            self.topk_groups <= self.n_groups,
            "moe.topk_groups",
            self.topk_groups,
            f"must be at most moe.n_groups={self.n_groups}",
        )
        require(
            self.top_k <= self.topk_groups * self.group_size,
            "moe.topk_groups",
            self.topk_groups,
            f"groups of {self.group_size} experts hold fewer than moe.top_k={self.top_k}",
        )

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.num_experts // self.n_groups


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
        require(self.norm_cast in ("last", "first"), "norm_cast", self.norm_cast, "last or first")
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
        return _encode(asdict(self))

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


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return "inf" if value == math.inf else value


def _dataclass_of(annotation: Any) -> type | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and is_dataclass(o)), None)


def decode(cls: type, data: Any, path: str = "") -> Any:
    """Build the dataclass ``cls`` from nested dictionaries, with errors that name the field's path.

    Raises:
        ConfigError: a field that ``cls`` does not have, or one without a default that is missing.
    """
    require(isinstance(data, dict), path or cls.__name__, data, "must be a mapping of fields")
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(data) - set(known))
    require(
        not unknown,
        path + (unknown[0] if unknown else ""),
        "unknown field",
        f"{cls.__name__} has {', '.join(known)}",
    )
    missing = [
        n for n, f in known.items() if n not in data and f.default is MISSING and f.default_factory is MISSING
    ]
    require(not missing, path + (missing[0] if missing else ""), "missing", f"{cls.__name__} needs it")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in data.items():
        inner = _dataclass_of(hints[name])
        if inner is not None and value is not None:
            value = decode(inner, value, f"{path}{name}.")
        elif isinstance(value, list):
            value = tuple(math.inf if item == "inf" else item for item in value)
        elif value == "inf":
            value = math.inf
        values[name] = value
    return cls(**values)

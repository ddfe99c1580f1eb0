"""config.json of the attention families: Llama (arXiv 2407.21783), Qwen2 (2407.10671) and Qwen3 (2505.09388)."""

from typing import Any, Literal

from jaxllm.config import (
    AttentionConfig,
    ConfigError,
    JetConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    require,
)
from jaxllm.hf.fields import Fields

ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_rope(fields: Fields, theta: float = 10000.0) -> RopeConfig:
    """Rotary positions in transformers 5's form (``rope_parameters``) or the older ``rope_theta``, ``rope_scaling``.

    Raises:
        ConfigError: a kind of scaling that jaxllm does not have (yarn, dynamic, longrope), or unknown keys of it.
    """
    theta = fields.get("rope_theta", theta)
    new, older = fields.get("rope_parameters"), fields.get("rope_scaling")
    require(
        not (new and older) or new == older, "rope_scaling", older, f"rope_parameters={new!r} says otherwise"
    )
    given = dict(new or older or {})
    fields.only("partial_rotary_factor", 1.0, "all of head_dim is rotated")
    theta = given.pop("rope_theta", theta)
    partial = given.pop("partial_rotary_factor", 1.0)
    require(partial == 1.0, "rope_parameters.partial_rotary_factor", partial, "all of head_dim is rotated")
    kinds = {given.pop(key) for key in ("rope_type", "type") if key in given} or {"default"}
    kind = kinds.pop()
    require(
        not kinds and kind in ROPE_KEYS,
        "rope_type",
        kind,
        f"unsupported; supported are {', '.join(ROPE_KEYS)}",
    )
    if kind == "default":
        # A length that is only recorded.
        given.pop("original_max_position_embeddings", None)
    unknown, missing = sorted(set(given) - ROPE_KEYS[kind]), sorted(ROPE_KEYS[kind] - set(given))
    require(not unknown, "rope_parameters", unknown, f"unknown with rope_type {kind!r}")
    require(not missing, "rope_parameters", missing, f"missing with rope_type {kind!r}")
    if kind == "default":
        return RopeConfig(theta=float(theta))
    if kind == "linear":
        return RopeConfig(theta=float(theta), scaling="linear", factor=float(given["factor"]))
    return RopeConfig(
        theta=float(theta),
        scaling="llama3",
        factor=float(given["factor"]),
        low_freq_factor=float(given["low_freq_factor"]),
        high_freq_factor=float(given["high_freq_factor"]),
        original_max_position=int(given["original_max_position_embeddings"]),
    )


def max_length(rope: RopeConfig) -> int:
    """What to tell servers that ask for a longest sequence; the model has none of its own."""
    return int(rope.original_max_position * rope.factor) if rope.scaling == "llama3" else 32768


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The older form, which transformers 4 and 5 and other engines read."""
    if rope.scaling == "none":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def window_of(fields: Fields, layers: int) -> tuple[str, int | None]:
    """(attention letters, window) of Qwen's sliding-window fields.

    transformers' rule: ``layer_types`` where it is there; else the layers from ``max_window_layers`` on slide if
    ``use_sliding_window``.
    """
    used = fields.get("use_sliding_window", False)
    # null says that there is none; only an absent field takes the class's default.
    window = fields.data.get("sliding_window", 4096) if used else None
    first = fields.get("max_window_layers", 28)
    types = fields.get("layer_types")
    fields.skip("sliding_window")
    if types is None:
        slides = window is not None
        types = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(layers)]
    known = {"full_attention": "*", "attention": "*", "sliding_attention": "W"}
    unknown = sorted(set(types) - set(known))
    require(not unknown, "layer_types", unknown, f"known are {', '.join(known)}")
    require(len(types) == layers, "layer_types", types, f"needs num_hidden_layers={layers} entries")
    letters = "".join(known[t] for t in types)
    require(
        window is not None or "W" not in letters,
        "use_sliding_window",
        used,
        "layer_types has sliding_attention",
    )
    return letters, window if "W" in letters else None


def read_layers(fields: Fields, *, eps: float, head_dim: int | None, qkv_bias: bool, out_bias: bool, qk_norm: bool,
                mlp_bias: bool, letters: str, window: int | None, norm_cast: Literal["first", "last"] = "first",
                jet: JetConfig | None = None, ffn: str | None = None, moe: MoEConfig | None = None,
                rope_theta: float = 10000.0) -> ModelConfig:  # fmt: skip
    """The model of pairs of a letter of ``letters`` and a feed-forward one (``ffn``; None: dense MLPs)."""
    ffn = ffn or "-" * len(letters)
    hidden: int = fields.need("hidden_size")
    heads: int = fields.need("num_attention_heads")
    if head_dim is None:
        require(
            hidden % heads == 0,
            "num_attention_heads",
            heads,
            f"must divide hidden_size={hidden} without head_dim",
        )
        head_dim = hidden // heads
    fields.only("hidden_act", "silu", "the MLP's activation is silu")
    return ModelConfig(
        vocab_size=fields.need("vocab_size"),
        hidden_size=hidden,
        pattern="".join(pair for both in zip(letters, ffn, strict=True) for pair in both),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads", heads),
            head_dim=head_dim,
            rope=read_rope(fields, rope_theta),
            window=window,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
        ),
        mlp=MLPConfig(fields.need("intermediate_size"), "swiglu", mlp_bias) if "-" in ffn else None,
        moe=moe,
        norm_eps=fields.get("rms_norm_eps", eps),
        jet=jet,
        norm_cast=norm_cast,
        tie_embeddings=fields.get("tie_word_embeddings", False),
        init_std=fields.get("initializer_range", 0.02),
    )


def read_llama(fields: Fields) -> ModelConfig:
    """Llama; ``attention_bias`` puts biases on all four projections."""
    bias = fields.get("attention_bias", False)
    layers = fields.need("num_hidden_layers")
    fields.only("sliding_window", None, "Llama has no window")
    return read_layers(
        fields,
        eps=1e-6,
        head_dim=fields.get("head_dim"),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=False,
        mlp_bias=fields.get("mlp_bias", False),
        letters="*" * layers,
        window=None,
    )


def read_qwen2(fields: Fields) -> ModelConfig:
    """Qwen2: biases on q, k and v, always."""
    letters, window = window_of(fields, fields.need("num_hidden_layers"))
    # transformers' class has no such field, but honours it where it is set.
    head_dim = fields.get("head_dim")
    return read_layers(fields, eps=1e-6, head_dim=head_dim, qkv_bias=True, out_bias=False, qk_norm=False,
                 mlp_bias=False, letters=letters, window=window)  # fmt: skip


def read_qwen3(fields: Fields) -> ModelConfig:
    """Qwen3: RMSNorm on queries and keys; ``attention_bias`` puts biases on all four projections."""
    letters, window = window_of(fields, fields.need("num_hidden_layers"))
    bias = fields.get("attention_bias", False)
    head_dim = fields.get("head_dim", 128)
    return read_layers(fields, eps=1e-6, head_dim=head_dim, qkv_bias=bias, out_bias=bias, qk_norm=True,
                 mlp_bias=False, letters=letters, window=window)  # fmt: skip


def write_layers(
    cfg: ModelConfig, *, letters: str, ffn: str = "-", norm_cast: str = "first"
) -> dict[str, Any]:
    """Inverse of :func:`read_layers`: a model of pairs, one of ``letters`` and one of ``ffn``.

    Raises:
        ConfigError: the family does not have such layers.
    """
    pattern, a, mlp = cfg.pattern, cfg.attention, cfg.mlp
    mixers, others = pattern[::2], set(pattern[1::2])
    layered = len(pattern) % 2 == 0 and set(mixers) <= set(letters) and others <= set(ffn)
    pairs = " or ".join(letter + other for other in ffn for letter in letters)
    require(layered, "pattern", pattern, f"must be {pairs} repeated")
    assert a is not None
    dense = {}
    if mlp is not None and "-" in others:
        require(mlp.activation == "swiglu", "mlp.activation", mlp.activation, "the family's is swiglu")
        dense = {"intermediate_size": mlp.intermediate_size}
    require(cfg.norm_cast == norm_cast, "norm_cast", cfg.norm_cast, f"the family's is {norm_cast!r}")
    if a.rope is None:
        raise ConfigError("attention.rope=None: the family has rotary positions")
    return {
        "num_hidden_layers": len(mixers),
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        **dense,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "attention_dropout": 0.0,
        "max_position_embeddings": max_length(a.rope),
        **write_rope(a.rope),
    }


def expect(section: Any, name: str, **values: Any) -> None:
    """Raise ConfigError unless each field of ``section`` has the family's value."""
    for field, value in values.items():
        given = getattr(section, field)
        require(given == value, f"{name}.{field}", given, f"the family's is {value}")


def write_llama(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of Llama."""
    out = write_layers(cfg, letters="*")
    expect(cfg.attention, "attention", qk_norm=False)
    assert cfg.attention is not None and cfg.mlp is not None
    a = cfg.attention
    require(a.qkv_bias == a.out_bias, "attention.out_bias", a.out_bias, f"must be qkv_bias={a.qkv_bias}")
    return out | {"attention_bias": a.qkv_bias, "mlp_bias": cfg.mlp.bias}


def _write_window(cfg: ModelConfig) -> dict[str, Any]:
    mixers = cfg.pattern[::2]
    if "W" not in mixers:
        return {"use_sliding_window": False}
    assert cfg.attention is not None
    types = ["sliding_attention" if letter == "W" else "full_attention" for letter in mixers]
    # max_window_layers is what transformers 4 reads; it can say only "from this layer on".
    return {
        "use_sliding_window": True,
        "sliding_window": cfg.attention.window,
        "max_window_layers": mixers.index("W"),
        "layer_types": types,
    }


def write_qwen2(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of Qwen2."""
    out = write_layers(cfg, letters="*W")
    expect(cfg.attention, "attention", qk_norm=False, qkv_bias=True, out_bias=False)
    expect(cfg.mlp, "mlp", bias=False)
    return out | _write_window(cfg)


def write_qwen3(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of Qwen3."""
    out = write_layers(cfg, letters="*W")
    expect(cfg.attention, "attention", qk_norm=True)
    expect(cfg.mlp, "mlp", bias=False)
    assert cfg.attention is not None
    a = cfg.attention
    require(a.qkv_bias == a.out_bias, "attention.out_bias", a.out_bias, f"must be qkv_bias={a.qkv_bias}")
    return out | {"attention_bias": a.qkv_bias} | _write_window(cfg)

"""Random mixers of transformers beside ours with the same weights; every tensor is away from its initial value."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.batch import PackedBatch
from jaxllm.config import GatedDeltaConfig, MambaConfig, ModelConfig
from jaxllm.linear import Context
from jaxllm.model.gated_delta import GatedDelta
from jaxllm.model.mamba import Mamba
from tests.quick import QUICK

# Of two float32 computations from each other: test_mixer_oracle.check says why not 1e-5.
TOLERANCE = 3e-5


@dataclass
class Pair:
    """Our mixer's class, configuration and weights, an input, and what the other implementation makes of it."""

    kind: type[nnx.Module]
    cfg: ModelConfig
    weights: dict[str, np.ndarray]
    x: np.ndarray
    expected: np.ndarray


def scramble(module: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Give every parameter of a torch module a random value that matters; the values by name."""
    import torch

    values = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            normal = rng.standard_normal(tuple(parameter.shape))
            if name.endswith(("A_log", "dt_bias")):
                value = 0.7 * normal - 0.5
            elif "norm" in name or name == "D":
                value = 1 + 0.4 * normal
            elif "conv" in name or name.endswith("bias"):
                value = 0.5 * normal
            else:
                value = 1.5 * normal / parameter.shape[-1] ** 0.5
            values[name] = value.astype(np.float32)
            parameter.copy_(torch.from_numpy(values[name]))
    return values


def _run(module: Any, x: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return module.eval()(torch.from_numpy(x)).numpy()


def _delta_config(rng: np.random.Generator, grouped: bool) -> dict[str, Any]:
    heads = int(rng.integers(2, 4)) if grouped else int(rng.integers(1, 4))
    return {
        "hidden_size": 8 * int(rng.integers(2, 5)),
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads * (int(rng.integers(2, 4)) if grouped else 1),
        "linear_key_head_dim": int(rng.integers(3, 12)),
        "linear_value_head_dim": int(rng.integers(3, 12)),
        "linear_conv_kernel_dim": int(rng.integers(2, 5)),
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }


def _model(delta: GatedDeltaConfig, data: dict[str, Any], eps: float) -> ModelConfig:
    return ModelConfig(16, data["hidden_size"], "G", delta=delta, norm_eps=eps)


def _input(rng: np.random.Generator, width: int) -> np.ndarray:
    """Small enough that the epsilon of unit keys counts; sometimes more than one chunk of 64."""
    length = int(rng.choice([3, 29, 67, 131]))
    return (0.3 * rng.standard_normal((2, length, width))).astype(np.float32)


def _delta(data: dict[str, Any], **options: Any) -> GatedDeltaConfig:
    return GatedDeltaConfig(
        num_heads=data["linear_num_key_heads"],
        num_value_heads=data["linear_num_value_heads"],
        key_head_dim=data["linear_key_head_dim"],
        value_head_dim=data["linear_value_head_dim"],
        conv_kernel=data["linear_conv_kernel_dim"],
        **options,
    )


def _heads_apart(weight: np.ndarray, heads: int, sizes: list[int]) -> np.ndarray:
    """Rows that are stored head by head, reordered to segment by segment, and flipped to [in, out]."""
    parts = np.split(weight.reshape(heads, -1, weight.shape[1]), np.cumsum(sizes)[:-1], axis=1)
    return np.concatenate([part.reshape(-1, weight.shape[1]) for part in parts]).T


def qwen3_next(seed: int) -> Pair:
    """Grouped value heads, projections interleaved per key head."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    rng = np.random.default_rng([seed, 1])
    data = _delta_config(rng, grouped=True) | {"rms_norm_eps": 10 ** rng.uniform(-6, -2)}
    module = Qwen3NextGatedDeltaNet(Qwen3NextConfig(**data), 0)
    w = scramble(module, rng)
    d = _delta(data)
    per_key = d.value_heads // d.num_heads
    wide = per_key * d.value_head_dim
    weights = {
        "in_proj.weight": _heads_apart(
            w["in_proj_qkvz.weight"], d.num_heads, [d.key_head_dim, d.key_head_dim, wide, wide]
        ),
        "gate_proj.weight": _heads_apart(w["in_proj_ba.weight"], d.num_heads, [per_key, per_key]),
        "conv_weight": w["conv1d.weight"][:, 0].T,
        "A_log": w["A_log"],
        "dt_bias": w["dt_bias"],
        "norm.weight": w["norm.weight"],
        "out_proj.weight": w["out_proj.weight"].T,
    }
    x = _input(rng, data["hidden_size"])
    return Pair(GatedDelta, _model(d, data, data["rms_norm_eps"]), weights, x, _run(module, x))


def olmo_module(data: dict[str, Any]) -> Any:
    """OLMo-Hybrid's gated DeltaNet alone."""
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridConfig, OlmoHybridGatedDeltaNet

    return OlmoHybridGatedDeltaNet(OlmoHybridConfig(**data), 0)


def olmo_hybrid(seed: int) -> Pair:
    """Separate projections, writes of up to 2."""
    rng = np.random.default_rng([seed, 2])
    negative = bool(rng.integers(0, 2)) or seed % 3 == 0
    data = _delta_config(rng, grouped=bool(seed % 2)) | {"linear_allow_neg_eigval": negative}
    module = olmo_module(data)
    w = scramble(module, rng)
    fused = {name: np.concatenate([w[f"{n}_proj.weight"] for n in name]).T for name in ("qkvg", "ba")}
    weights = {
        "in_proj.weight": fused["qkvg"],
        "gate_proj.weight": fused["ba"],
        "conv_weight": w["conv1d.weight"][:, 0].T,
        "A_log": w["A_log"],
        "dt_bias": w["dt_bias"],
        "norm.weight": w["o_norm.weight"],
        "out_proj.weight": w["o_proj.weight"].T,
    }
    # The gated norm's epsilon is not the model's.
    cfg = _model(_delta(data, allow_neg_eigval=negative, norm_eps=1e-5), data, 1e-3)
    x = _input(rng, data["hidden_size"])
    return Pair(GatedDelta, cfg, weights, x, _run(module, x))


def _mamba(module: Any, data: dict[str, Any], rng: np.random.Generator) -> Pair:
    w = scramble(module, rng)
    limit = (0.0, float("inf")) if rng.integers(0, 2) else (0.02, 0.9)
    module.time_step_limit = limit
    mamba = MambaConfig(
        num_heads=data["mamba_n_heads"],
        head_dim=data["mamba_d_head"],
        state_size=data["mamba_d_state"],
        n_groups=data["mamba_n_groups"],
        conv_kernel=data["mamba_d_conv"],
        chunk_size=data["mamba_chunk_size"],
        conv_bias=data["mamba_conv_bias"],
        proj_bias=data["mamba_proj_bias"],
        dt_limit=limit,
    )
    renamed = {"conv1d.weight": "conv_weight", "conv1d.bias": "conv_bias"}
    flip = {"in_proj.weight", "out_proj.weight"}
    weights = {renamed.get(name, name): v.T if name in flip else v for name, v in w.items()}
    weights["conv_weight"] = weights["conv_weight"][:, 0].T
    cfg = ModelConfig(16, data["hidden_size"], "M", mamba=mamba, norm_eps=data["rms_norm_eps"])
    x = _input(rng, data["hidden_size"])
    return Pair(Mamba, cfg, weights, x, _run(module, x))


def _mamba_config(rng: np.random.Generator) -> dict[str, Any]:
    groups, per_group = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    heads = groups * per_group
    return {
        "hidden_size": 4 * heads,
        "mamba_n_heads": heads,
        "mamba_d_head": 8,
        "mamba_expand": 2,
        "mamba_d_state": int(rng.integers(3, 17)),
        "mamba_n_groups": groups,
        "mamba_d_conv": int(rng.integers(2, 5)),
        "mamba_chunk_size": int(rng.choice([8, 32])),
        "mamba_conv_bias": bool(rng.integers(0, 2)),
        "mamba_proj_bias": bool(rng.integers(0, 2)),
        "rms_norm_eps": 10 ** rng.uniform(-6, -2),
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }


def bamba(seed: int) -> Pair:
    """Mamba-2 as Bamba has it."""
    from transformers.models.bamba.modeling_bamba import BambaConfig, BambaMixer

    rng = np.random.default_rng([seed, 3])
    data = _mamba_config(rng)
    return _mamba(BambaMixer(BambaConfig(**data), 0), data, rng)


def granite(seed: int) -> Pair:
    """Mamba-2 as Granite 4 has it."""
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as hf

    rng = np.random.default_rng([seed, 4])
    data = _mamba_config(rng)
    module = hf.GraniteMoeHybridMambaLayer(hf.GraniteMoeHybridConfig(**data, layer_types=["mamba"]), 0)
    return _mamba(module, data, rng)


def build(kind: type[nnx.Module], cfg: ModelConfig, weights: dict[str, np.ndarray]) -> Any:
    """Our mixer with ``weights``, which must be all of its parameters."""
    mixer = kind(cfg, rngs=nnx.Rngs(0))
    flat = nnx.to_flat_state(nnx.state(mixer, nnx.Param))
    variables = {".".join(str(part) for part in path): variable for path, variable in flat}
    assert set(variables) == set(weights), set(variables) ^ set(weights)
    for name, variable in variables.items():
        assert variable.get_value().shape == weights[name].shape, name
        variable.set_value(jnp.asarray(weights[name]))
    nnx.update(mixer, nnx.from_flat_state(flat))
    return mixer


def ours(pair: Pair) -> np.ndarray:
    """What our mixer makes of the pair's input."""
    mixer = build(pair.kind, pair.cfg, pair.weights)
    batch = PackedBatch.from_rows(jnp.zeros(pair.x.shape[:2], jnp.int32))
    run = jax.jit(lambda x: mixer(x, batch, Context())[0], compiler_options=QUICK)
    return np.asarray(run(pair.x))


def exact(pair: Pair) -> np.ndarray:
    """What a gated DeltaNet makes of the pair's input in float64, token by token (arXiv 2412.06464)."""
    d = pair.cfg.delta
    assert pair.kind is GatedDelta and d is not None
    w = {name: value.astype(np.float64) for name, value in pair.weights.items()}
    x = pair.x.astype(np.float64)
    rows, length = x.shape[:2]
    sigmoid = lambda u: 1 / (1 + np.exp(-u))  # noqa: E731
    silu = lambda u: u * sigmoid(u)  # noqa: E731
    unit = lambda u: u / np.sqrt(np.sum(u * u, axis=-1, keepdims=True) + 1e-6)  # noqa: E731
    key, value = d.num_heads * d.key_head_dim, d.value_heads * d.value_head_dim
    inputs, z = np.split(x @ w["in_proj.weight"], [2 * key + value], axis=-1)
    beta, decay = np.split(x @ w["gate_proj.weight"], 2, axis=-1)
    padded = np.pad(inputs, ((0, 0), (d.conv_kernel - 1, 0), (0, 0)))
    mixed = silu(sum(padded[:, i : i + length] * tap for i, tap in enumerate(w["conv_weight"])))
    q, k, v = np.split(mixed, [key, 2 * key], axis=-1)
    q, k = (
        np.repeat(unit(u.reshape(rows, length, d.num_heads, -1)), d.value_heads // d.num_heads, axis=2)
        for u in (q, k)
    )
    v = v.reshape(rows, length, d.value_heads, -1)
    kept = np.exp(-np.exp(w["A_log"]) * np.logaddexp(0, decay + w["dt_bias"]))
    beta = sigmoid(beta) * (2 if d.allow_neg_eigval else 1)
    state = np.zeros((rows, d.value_heads, d.key_head_dim, d.value_head_dim))
    out = np.zeros_like(v)
    for t in range(length):
        state = kept[:, t, :, None, None] * state
        new = beta[:, t, :, None] * (v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * new[:, :, None]
        out[:, t] = np.einsum("bhkv,bhk->bhv", state, q[:, t]) * d.key_head_dim**-0.5
    eps = pair.cfg.norm_eps if d.norm_eps is None else d.norm_eps
    normed = out / np.sqrt(np.mean(out * out, axis=-1, keepdims=True) + eps) * w["norm.weight"]
    return (normed.reshape(z.shape) * silu(z)) @ w["out_proj.weight"]


def rounding(pair: Pair) -> float:
    """How far the exact output moves, as :func:`error` counts, with half an ulp of float32 in every weight and input.

    The most of four draws. The norm of heads divides by what a head has read: where that is little, as with few keys or none
    that resembles the query, it is a difference of larger terms, and their rounding grows by the inverse of the norm, at
    most ``norm_eps ** -0.5``. No float32 computation can do without.
    """
    rng, truth = np.random.default_rng(0), replace(pair, expected=exact(pair))

    def moved(value: np.ndarray) -> np.ndarray:
        return value.astype(np.float64) * (1 + 2.0**-24 * rng.uniform(-1, 1, value.shape))

    def draw() -> np.ndarray:
        weights = {name: moved(value) for name, value in pair.weights.items()}
        return exact(replace(pair, weights=weights, x=moved(pair.x)))

    return max(error(truth, draw()) for _ in range(4))


def error(pair: Pair, actual: np.ndarray | None = None) -> float:
    """max |difference| of what we compute (or ``actual``) over the standard deviation of what is expected."""
    actual = ours(pair) if actual is None else actual
    return float(np.abs(actual - pair.expected).max() / pair.expected.std())

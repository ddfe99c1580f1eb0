"""Planted errors: what a wrong bridge or model would compute. Every parity check must notice them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hf_layers import logits_by_layers
from hf_parity import Expected, assert_close

import jaxllm.model.attention
from jaxllm.config import ModelConfig
from jaxllm.linear import Context
from jaxllm.model.functional import LanguageModel, flatten, map_named
from jaxllm.model.layers import GatedRMSNorm, normalised
from jaxllm.model.mamba import Mamba
from jaxllm.model.moe import Router

Mutant = Callable[[LanguageModel, pytest.MonkeyPatch], LanguageModel]


def _config(change: Callable[[ModelConfig], ModelConfig]) -> Mutant:
    return lambda model, _: replace(model, cfg=change(model.cfg))


def _attention(**changes: Any) -> Mutant:
    return _config(lambda cfg: cfg.replace(attention=replace(cfg.attention, **changes)))


def _rope(**changes: Any) -> Mutant:
    return _config(
        lambda cfg: cfg.replace(attention=replace(cfg.attention, rope=replace(cfg.attention.rope, **changes)))
    )


def _mamba(**changes: Any) -> Mutant:
    return _config(lambda cfg: cfg.replace(mamba=replace(cfg.mamba, **changes)))


def _params(change: Callable[[str, jax.Array], jax.Array]) -> Mutant:
    return lambda model, _: replace(model, params=map_named(change, model.params))


def _swap(first: str, second: str) -> Mutant:
    """Exchange two equally shaped parameters of every layer."""
    other = {first: second, second: first}

    def apply(model: LanguageModel, _: pytest.MonkeyPatch) -> LanguageModel:
        flat = flatten(model.params)

        def swapped(path: str) -> str:
            return ".".join(other.get(part, part) for part in path.split("."))

        return replace(model, params=map_named(lambda path, _: flat[swapped(path)], model.params))

    return apply


def norm_before_gate(model: LanguageModel, patch: pytest.MonkeyPatch) -> LanguageModel:
    """Gated norm in the order of Qwen3-Next."""

    def call(self: GatedRMSNorm, y: jax.Array, z: jax.Array, ctx: Context) -> jax.Array:
        u = normalised(y.reshape(*y.shape[:-1], self.groups, -1), self.eps).reshape(y.shape)
        return u * self.weight[...] * jax.nn.silu(z)

    patch.setattr(GatedRMSNorm, "__call__", call)
    return model


def tiled_groups(model: LanguageModel, patch: pytest.MonkeyPatch) -> LanguageModel:
    """Head h reads group h % G."""
    right = Mamba.ops.scan

    def ssd(
        x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, *rest: Any, **options: Any
    ) -> Any:
        repeats = (1, 1, x.shape[2] // B.shape[2], 1)
        return right(x, dt, A, jnp.tile(B, repeats), jnp.tile(C, repeats), *rest, **options)

    patch.setattr(Mamba, "ops", Mamba.ops._replace(scan=ssd))
    return model


def tiled_heads(model: LanguageModel, patch: pytest.MonkeyPatch) -> LanguageModel:
    """Query head h reads kv head h % K."""
    right = jaxllm.model.attention.attention

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        repeats = (1, 1, q.shape[2] // k.shape[2], 1)
        return right(q, jnp.tile(k, repeats), jnp.tile(v, repeats), **options)

    patch.setattr(jaxllm.model.attention, "attention", attention)
    return model


def interleaved_rope(model: LanguageModel, patch: pytest.MonkeyPatch) -> LanguageModel:
    """Rotated pairs are neighbours instead of halves."""
    right = jaxllm.model.attention.apply_rope

    def rope(x: jax.Array, positions: jax.Array, config: Any) -> jax.Array:
        halves = jnp.concatenate([x[..., ::2], x[..., 1::2]], -1)
        return jnp.stack(jnp.split(right(halves, positions, config), 2, -1), -1).reshape(x.shape)

    patch.setattr(jaxllm.model.attention, "apply_rope", rope)
    return model


def _zero(*endings: str) -> Mutant:
    return _params(lambda path, value: value * 0 if path.endswith(endings) else value)


def _window_of(step: int) -> Mutant:
    return lambda model, patch: _attention(window=model.cfg.attention.window + step)(model, patch)


ANY: dict[str, Mutant] = {
    "norm epsilon": _config(lambda cfg: cfg.replace(norm_eps=cfg.norm_eps * 1.5)),
    "embedding off by one": _params(lambda p, v: jnp.roll(v, 1, 0) if p == "embed.weight" else v),
}
MAMBA: dict[str, Mutant] = {
    "norm before gate": norm_before_gate,
    "dt clamp": _mamba(dt_limit=(0.02, float("inf"))),
    "convolution reversed": _params(lambda p, v: v[::-1] if p.endswith("conv_weight") else v),
    "no D": _zero(".D"),
    "no dt bias": _zero("dt_bias"),
}
GROUPED: dict[str, Mutant] = {"groups tiled": tiled_groups}
ATTENTION: dict[str, Mutant] = {"kv heads tiled": tiled_heads}
ROPE: dict[str, Mutant] = {
    "rope theta": _rope(theta=9000.0),
    "rope interleaved": interleaved_rope,
    "gate and up exchanged": _swap("gate_proj", "up_proj"),
}
SCALED: dict[str, Mutant] = {"no rope scaling": _rope(scaling="none"), "rope factor": _rope(factor=3.0)}
BIASED: dict[str, Mutant] = {"no attention bias": _zero("q_proj.bias", "k_proj.bias", "v_proj.bias")}
NORMED: dict[str, Mutant] = {
    "no qk norm": _params(lambda p, v: v * 0 + 1 if p.endswith(("q_norm.weight", "k_norm.weight")) else v),
    "q and k norm exchanged": _swap("q_norm", "k_norm"),
}


def _experts(change: Callable[[jax.Array], jax.Array], *names: str) -> Mutant:
    return _params(lambda p, v: change(v) if p.endswith(tuple(f"experts.{name}" for name in names)) else v)


def gate_and_up_exchanged(value: jax.Array) -> jax.Array:
    """Halves of the fused projection."""
    return jnp.roll(value, value.shape[-1] // 2, axis=-1)


def biased_weights(model: LanguageModel, patch: pytest.MonkeyPatch) -> LanguageModel:
    """Experts are combined by the scores that they are chosen by."""
    right = Router.__call__

    def call(self: Router, x: jax.Array) -> Any:
        shares, ids, weights = right(self, x)
        bias = self.e_score_correction_bias[...][ids]
        return shares, ids, weights + 0.3 * bias * self.cfg.scaling

    patch.setattr(Router, "__call__", call)
    return model


def _moe(**changes: Any) -> Mutant:
    return _config(lambda cfg: cfg.replace(moe=replace(cfg.moe, **changes)))


ROUTED: dict[str, Mutant] = {
    "router transposed by one": _params(lambda p, v: jnp.roll(v, 1, 1) if p.endswith("gate.weight") else v),
    "experts off by one": _experts(lambda v: jnp.roll(v, 1, 0), "down_proj"),
    "half of the experts lost": _experts(lambda v: v.at[::2].set(0), "down_proj"),
    "router scale": _moe(scaling=1.1),
}
CORRECTED: dict[str, Mutant] = {
    "no correction bias": _zero("e_score_correction_bias"),
    "combined with the bias": biased_weights,
    "softmax router": _moe(router="softmax"),
}
SHARED: dict[str, Mutant] = {"no shared expert": _zero("shared_experts.down_proj.weight")}
WINDOWED: dict[str, Mutant] = {"window + 1": _window_of(1), "window - 1": _window_of(-1)}


# The letters of the layers whose code a mutant patches; the others change parameters or configurations.
PATCHED = {
    "norm before gate": "M",
    "groups tiled": "M",
    "kv heads tiled": "*W",
    "rope interleaved": "*W",
    "combined with the bias": "E",
}


def mutants(cfg: ModelConfig) -> dict[str, Mutant]:
    """Those that change what ``cfg`` computes."""
    out = dict(ANY)
    if cfg.mamba is not None:
        out |= MAMBA | (GROUPED if 1 < cfg.mamba.n_groups < cfg.mamba.num_heads else {})
        if cfg.mamba.n_groups > 1:
            out["one norm group"] = _mamba(norm_groups=1)
    a = cfg.attention
    if a is not None:
        out |= ATTENTION if 1 < a.num_kv_heads < a.num_heads else {}
        out |= ROPE if a.rope is not None else {}
        out |= SCALED if a.rope is not None and a.rope.scaling != "none" else {}
        out |= BIASED if a.qkv_bias else {}
        out |= NORMED if a.qk_norm else {}
        out |= WINDOWED if "W" in cfg.pattern else {}
    m = cfg.moe if "E" in cfg.pattern else None
    if m is not None:
        out |= ROUTED | {"norm_topk": _moe(norm_topk=not m.norm_topk), "top_k": _moe(top_k=m.top_k - 1)}
        out |= CORRECTED if m.correction_bias else {"sigmoid router": _moe(router="sigmoid")}
        out |= SHARED if m.shared_intermediate_size is not None else {}
        out |= {"no groups": _moe(n_groups=1, topk_groups=1)} if m.n_groups > 1 else {}
        if m.activation == "swiglu":
            out["experts' gate and up exchanged"] = _experts(gate_and_up_exchanged, "gate_up_proj")
        if "-" not in cfg.pattern:
            out.pop("gate and up exchanged", None)
    return out


def surviving(model: LanguageModel, expected: Expected) -> list[str]:
    """Names of the mutants that the parity check lets pass."""
    tokens, logits = expected.tokens, expected.logits
    assert_close(logits_by_layers(model, tokens), logits)
    names = []
    for name, mutant in mutants(model.cfg).items():
        with pytest.MonkeyPatch.context() as patch:
            wrong = mutant(model, patch)
            patched = {letter: name for letter in PATCHED[name]} if wrong is model else {}
            try:
                assert_close(logits_by_layers(wrong, tokens, patched), logits)
            except AssertionError as error:
                assert "max difference" in str(error), error
            else:
                names.append(name)
    return names

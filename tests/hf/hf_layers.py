"""A model's logits layer by layer, so that what planted errors leave as it is compiles once for all of them."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig
from jaxllm.model.functional import LanguageModel, abstract_params, flatten, map_named, merge
from tests.quick import QUICK

READS = {"M": "mamba", "*": "attention", "W": "attention", "-": "mlp", "E": "moe", "G": "delta", "J": "jet"}


@functools.partial(jax.jit, static_argnames=("cfg", "part", "variant"), compiler_options=QUICK)
def _run(params: Any, h: Any, batch: PackedBatch, *, cfg: ModelConfig, part: str, variant: str) -> jax.Array:
    model = merge(cfg, params)
    if part == "embed":
        return model.embed(batch.tokens, model.context())
    if part == "head":
        return model.head(model.norm_f(h))
    return model.layers[0](h, batch, model.context())[0]


def logits_by_layers(
    model: LanguageModel, tokens: np.ndarray, patched: Mapping[str, str] = MappingProxyType({})
) -> np.ndarray:
    """f32[B, T, V]; ``patched`` names what is patched in the layers of a letter, so that no program without it is used."""
    batch, flat = PackedBatch.from_rows(tokens), flatten(model.params)
    assert not model.cfg.scan_layers
    h = None
    last = len(model.cfg.pattern) - 1
    for number, letter in enumerate(model.cfg.pattern):
        # A model of this layer alone, without the settings that it does not read.
        unread = dict.fromkeys(set(READS.values()) - {READS[letter]})
        cfg = model.cfg.replace(pattern=letter, mtp=None, **unread)

        def of_layer(path: str, _: Any, number: int = number) -> Any:
            return flat[path.replace("layers.0.", f"layers.{number}.", 1)]

        params = map_named(of_layer, abstract_params(cfg))
        if number == 0:
            h = _run(params, None, batch, cfg=cfg, part="embed", variant="")
        h = _run(params, h, batch, cfg=cfg, part="layer", variant=patched.get(letter, ""))
        if number == last:
            h = _run(params, h, batch, cfg=cfg, part="head", variant="")
    return np.asarray(h, np.float32)

"""The model as pure functions of (config, parameters): what every jitted step is made of.

Parameters are the pure pytree ``nnx.as_pure`` gives (nested dictionaries of arrays); the module is put together
inside the jitted function, where it costs nothing.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jaxllm.axes import Axes
from jaxllm.config import ModelConfig, require
from jaxllm.model import scan
from jaxllm.model.hybrid import HybridLM
from jaxllm.model.layers import Linear

Params = Any


@functools.lru_cache(maxsize=64)
def _abstract(cfg: ModelConfig) -> tuple[Any, Any]:
    model = nnx.eval_shape(lambda: HybridLM(cfg, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param)


def split(model: HybridLM) -> tuple[ModelConfig, Params]:
    """(config, pure parameters) of a module."""
    _, params = nnx.split(model, nnx.Param)
    return model.cfg, nnx.as_pure(params)


def merge(cfg: ModelConfig, params: Params) -> HybridLM:
    """The module over ``params``; free inside a jitted function."""
    graphdef, abstract = _abstract(cfg)
    state = jax.tree.map(
        lambda variable, value: variable.replace(value),
        abstract,
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    return nnx.merge(graphdef, state)


@functools.lru_cache(maxsize=64)
def linear_weights(cfg: ModelConfig) -> frozenset[str]:
    """Dotted paths of the weights of all linear layers, the head's included unless it is tied."""
    modules = nnx.iter_modules(nnx.merge(*_abstract(cfg)))
    return frozenset(".".join(map(str, (*path, "weight"))) for path, m in modules if isinstance(m, Linear))


def init_params(cfg: ModelConfig, seed: int = 0, shardings: Any = None) -> Params:
    """Freshly initialised parameters (Nemotron-H's scheme), in ``cfg.precision.param``.

    Args:
        cfg: model.
        seed: of their values, which do not depend on ``shardings``.
        shardings: where each is made, as for ``jax.jit``; None: on the default device.
    """

    def build(key: jax.Array) -> Params:
        return split(HybridLM(cfg, rngs=nnx.Rngs(key)))[1]

    return jax.jit(build, out_shardings=shardings)(jax.random.key(seed))


def abstract_params(cfg: ModelConfig) -> Params:
    """ShapeDtypeStructs of every parameter; nothing is allocated."""
    return nnx.as_pure(_abstract(cfg)[1])


def flatten(tree: Params) -> dict[str, Any]:
    """Leaves by dotted path: ``layers.0.mixer.in_proj.weight``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(str(getattr(k, "key", k)) for k in path): leaf for path, leaf in flat}


def map_named(fn: Callable[..., Any], tree: Params, *rest: Any) -> Any:
    """``jax.tree.map`` with the dotted path as first argument."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(".".join(str(getattr(k, "key", k)) for k in path), *leaves), tree, *rest
    )


def unstack(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """(config, parameters) with one entry per layer, of a model whose repeated groups are stacked or not."""
    if not cfg.scan_layers:
        return cfg, params
    plain = cfg.replace(scan_layers=False)
    leaves = scan.unstacked(flatten(params), cfg.pattern)
    return plain, map_named(lambda name, _: leaves[name], abstract_params(plain))


def stack(cfg: ModelConfig, params: Params) -> Params:
    """Inverse of :func:`unstack`: parameters with one entry per layer as ``cfg`` holds them; copies."""
    if not cfg.scan_layers:
        return params
    target = abstract_params(cfg)
    leaves = scan.stacked(flatten(params), list(flatten(target)), cfg.pattern)
    return map_named(lambda name, _: leaves[name], target)


def param_axes(cfg: ModelConfig) -> dict[str, Axes]:
    """Axes of every parameter by dotted path (contract 5)."""
    variables = jax.tree_util.tree_flatten_with_path(
        _abstract(cfg)[1], is_leaf=lambda x: isinstance(x, nnx.Variable)
    )[0]
    return {
        ".".join(str(getattr(k, "key", k)) for k in path): v.get_metadata("axes") for path, v in variables
    }


def active_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Parameters that one token meets, by dotted path: all, but of the routed experts only ``top_k``."""

    def size(axes: Axes) -> int:
        first, *rest = axes
        stacked = first.name == "experts" and rest
        met = cfg.moe.top_k if stacked and cfg.moe is not None else first.size
        return met * math.prod(axis.size for axis in rest)

    return {path: size(axes) for path, axes in param_axes(cfg.replace(scan_layers=False)).items()}


@dataclass
class LanguageModel:
    """A model ready to use: configuration, parameters and, where there is one, its tokenizer.

    Attributes:
        cfg: configuration.
        params: pure parameters.
        tokenizer: a :class:`jaxllm.data.tokenizer.Tokenizer`, or None for token ids only.
        chat_template: Jinja source of the checkpoint's chat template, or None.
    """

    cfg: ModelConfig
    params: Params
    tokenizer: Any = None
    chat_template: str | None = None

    @property
    def module(self) -> HybridLM:
        """The NNX module over these parameters."""
        return merge(self.cfg, self.params)

    def render_chat(
        self, messages: Sequence[Any], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A conversation as text, by the checkpoint's own template; see :func:`jaxllm.data.chat.render_chat`.

        Args:
            messages: dictionaries with "role" and "content".
            add_generation_prompt: end with the beginning of an answer.
            variables: what else the template knows, such as ``tools``, ``enable_thinking`` or ``reasoning_budget``.

        Raises:
            ConfigError: the model has no tokenizer or no template, or what the template refuses.
        """
        from jaxllm.data.chat import render_chat

        require(self.tokenizer is not None, "tokenizer", None, "a chat needs a model with a tokenizer")
        template = self.chat_template or self.tokenizer.chat_template
        require(template is not None, "chat_template", None, "this model has none; give plain prompts")
        variables = self.tokenizer.special_tokens | variables
        return render_chat(template, messages, add_generation_prompt=add_generation_prompt, **variables)

    def encode_chat(
        self, messages: Sequence[Any], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """:meth:`render_chat` as token ids: a prompt for :func:`jaxllm.generate`."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.tokenizer.encode(text, parse_special=True)

"""Where the parts of a training state lie on a mesh, and whether a model fits it."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.axes import described
from jaxllm.config import ConfigError, ModelConfig, require
from jaxllm.model.functional import Params, abstract_params, map_named, param_axes
from jaxllm.train.balance import trained
from jaxllm.train.optim import OptimConfig, make_optimizer
from jaxllm.train.stages import check_stages
from jaxllm.train.state import TrainState, abstract_state
from parallel.mesh import MeshShape, make_mesh
from parallel.sharding import Placement, ShardingError


def param_specs(cfg: ModelConfig, place: Placement) -> Params:
    """PartitionSpec of every parameter at rest.

    Raises:
        ConfigError: an axis is not a multiple of the devices that share it; names the parameter and the numbers.
    """
    axes = param_axes(cfg)

    def spec(name: str, _: Any) -> PartitionSpec:
        try:
            return place.spec([described(axis) for axis in axes[name]])
        except ShardingError as error:
            raise ConfigError(f"mesh: {name} has {error}") from error

    return map_named(spec, abstract_params(cfg))


def param_shardings(cfg: ModelConfig, place: Placement) -> Params:
    """NamedSharding of every parameter at rest; raises as :func:`param_specs`."""
    return jax.tree.map(
        lambda spec: NamedSharding(place.mesh, spec),
        param_specs(cfg, place),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def state_shardings(cfg: ModelConfig, optim: OptimConfig, place: Placement) -> TrainState:
    """NamedShardings of a training state: the optimiser's moments lie as their parameters do, counters are whole."""
    whole = NamedSharding(place.mesh, PartitionSpec())
    params = param_shardings(cfg, place)
    state = abstract_state(cfg, optim)
    opt_state = optax.tree_utils.tree_map_params(
        make_optimizer(optim),
        lambda _, sharding: sharding,
        state.opt_state,
        trained(params),
        transform_non_params=lambda _: whole,
    )
    return TrainState(params, opt_state, whole, whole, whole, whole)


def placement(cfg: ModelConfig, shape: MeshShape | None = None) -> Placement | None:
    """How the devices of the run share a model; None where there is one device.

    Args:
        cfg: model.
        shape: devices along each axis; None: all of them along ``data``.

    Raises:
        ConfigError: the mesh does not fit the devices or the model.
    """
    shape = shape or MeshShape(data=jax.device_count())
    check_mesh(cfg, shape)
    try:
        mesh = make_mesh(shape)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if mesh.size == 1:
        return None
    place = Placement(mesh)
    param_specs(cfg, place)
    return place


def gathered(params: Params, place: Placement | None) -> Params:
    """``params`` whole on every device, one array at a time: for files and other programs."""
    if place is None:
        return params
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(place.mesh, PartitionSpec()))
    return jax.tree.map(whole, params)


def check_mesh(cfg: ModelConfig, shape: MeshShape, *, vocabulary: bool = True) -> None:
    """Raise ConfigError unless every axis of the mesh has something of the model to share, in equal parts.

    Args:
        cfg: model.
        shape: devices along each axis.
        vocabulary: check its size too; a tokenizer may decide it later.
    """
    if shape.stage > 1:
        check_stages(cfg, shape)
    letters = set(cfg.letters)
    if shape.expert > 1:
        require("E" in letters, "mesh.expert", shape.expert, f"pattern={cfg.pattern!r} has no experts (E)")
        assert cfg.moe is not None
        count = cfg.moe.num_experts
        require(
            count % shape.expert == 0, "mesh.expert", shape.expert, f"must divide moe.num_experts={count}"
        )
    for name, size in _shared_by_tensor(cfg, letters).items():
        if name == "vocab_size" and not vocabulary:
            continue
        require(size % shape.tensor == 0, "mesh.tensor", shape.tensor, f"must divide {name}={size}")
    for name, size in _shared_or_copied(cfg, letters).items():
        fits = size % shape.tensor == 0 or shape.tensor % size == 0
        require(fits, "mesh.tensor", shape.tensor, f"must divide {name}={size}, or be a multiple of it")


def _shared_by_tensor(cfg: ModelConfig, letters: set[str]) -> dict[str, int]:
    """Sizes by field of what no device may have a copy of."""
    found = {"vocab_size": cfg.vocab_size}
    if cfg.attention is not None and letters & set("*W"):
        found["attention.num_heads"] = cfg.attention.num_heads
    if cfg.mamba is not None and "M" in letters:
        found["mamba.num_heads"] = cfg.mamba.num_heads
    if cfg.delta is not None and "G" in letters:
        found["delta.num_value_heads"] = cfg.delta.value_heads
    if cfg.jet is not None and "J" in letters:
        found["jet.num_heads"] = cfg.jet.num_heads
    if cfg.mlp is not None and "-" in letters:
        found["mlp.intermediate_size"] = cfg.mlp.intermediate_size
    if cfg.moe is not None and "E" in letters:
        found["moe.intermediate_size"] = cfg.moe.intermediate_size
        if cfg.moe.shared_intermediate_size is not None:
            found["moe.shared_intermediate_size"] = cfg.moe.shared_intermediate_size
    return found


def _shared_or_copied(cfg: ModelConfig, letters: set[str]) -> dict[str, int]:
    """Sizes by field of what several heads read: with fewer of them than devices, neighbours have a copy."""
    found = {}
    if cfg.attention is not None and letters & set("*W"):
        found["attention.num_kv_heads"] = cfg.attention.num_kv_heads
    if cfg.mamba is not None and "M" in letters:
        found["mamba.n_groups"] = cfg.mamba.n_groups
        found["mamba.norm_groups"] = cfg.mamba.gate_groups
    if cfg.delta is not None and "G" in letters:
        found["delta.num_heads"] = cfg.delta.num_heads
    return found

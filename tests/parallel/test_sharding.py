"""The table from axis names to mesh axes, and what does not fit it; counted on abstract meshes."""

import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.config import (
    AttentionConfig,
    ConfigError,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
)
from jaxllm.train.placement import check_mesh, param_specs
from parallel.mesh import MeshShape, abstract_mesh
from parallel.sharding import Placement, ShardingError

CFG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    pattern="M*-E",
    mamba=MambaConfig(8, head_dim=8, state_size=8, n_groups=2),
    attention=AttentionConfig(8, 2, 8),
    mlp=MLPConfig(64),
    moe=MoEConfig(8, 2, 16, activation="swiglu"),
)


def specs(cfg=CFG, **sizes):
    from jaxllm.model.functional import flatten

    return flatten(param_specs(cfg, Placement(abstract_mesh(MeshShape(**sizes)))))


def test_matrices_are_cut_twice_and_vectors_not_at_all():
    found = specs(fsdp=2, tensor=2, expert=2)
    stored = ("fsdp", "expert")
    assert found["embed.weight"] == P("tensor", stored)
    assert found["layers.1.mixer.q_proj.weight"] == P(stored, "tensor")
    assert found["layers.1.mixer.o_proj.weight"] == P("tensor", stored)
    assert found["layers.2.mixer.down_proj.weight"] == P("tensor", stored)
    assert found["layers.3.mixer.experts.down_proj"] == P("expert", "tensor", "fsdp")
    assert found["layers.3.mixer.gate.weight"] == P((*stored, "tensor"), None)
    assert all(
        spec == P(None) for name, spec in found.items() if name.endswith(("norm.weight", "A_log", "bias"))
    )


def test_fused_weights_rest_along_their_other_axis():
    found = specs(fsdp=2, tensor=2, expert=2)
    assert found["layers.0.mixer.in_proj.weight"] == P(("fsdp", "expert", "tensor"), None)
    assert found["layers.0.mixer.out_proj.weight"] == P("tensor", ("fsdp", "expert"))
    assert found["layers.3.mixer.experts.gate_up_proj"] == P("expert", ("fsdp", "tensor"), None)


def test_so_do_heads_that_are_fewer_than_devices():
    assert specs(tensor=4)["layers.1.mixer.k_proj.weight"] == P("tensor", None)
    assert specs(tensor=2)["layers.1.mixer.k_proj.weight"] == P(None, "tensor")


def test_stacked_layers_keep_their_axis_whole():
    found = specs(CFG.replace(pattern="-E-E", scan_layers=True), fsdp=2, expert=2)
    assert found["groups.0.blocks.0.mixer.up_proj.weight"] == P(None, ("fsdp", "expert"), None)
    assert found["groups.0.blocks.1.mixer.experts.down_proj"] == P(None, "expert", None, "fsdp")
    assert found["groups.0.blocks.1.mixer.gate.weight"] == P(None, ("fsdp", "expert"), None)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tensor": 3}, "mesh.tensor=3: must divide vocab_size=64"),
        ({"tensor": 16}, "mesh.tensor=16: must divide attention.num_heads=8"),
        ({"expert": 3}, "mesh.expert=3: must divide moe.num_experts=8"),
        ({"stage": 2}, "mesh.stage=2: needs stacked layers"),
    ],
)
def test_what_does_not_fit_is_named_with_its_numbers(sizes, words):
    with pytest.raises(ConfigError) as error:
        check_mesh(CFG, MeshShape(**sizes))
    assert words in str(error.value)


STACKED = CFG.replace(pattern="M-E" * 4, scan_layers=True)


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({}, {"stage": 3}, "pattern='M-EM-EM-EM-E' is 4 x 'M-E', which must be one motif"),
        ({"pattern": "M-M-E"}, {"stage": 2}, "pattern='M-M-E' is 2 x 'M-' + 1 x 'E'"),
        ({"mtp": MTPConfig(pattern="E")}, {"stage": 2}, "mesh.stage=2: does not train prediction blocks"),
        ({}, {"stage": 2, "context": 2}, "mesh.context=2: must be 1 beside mesh.stage=2: give"),
    ],
)
def test_stages_that_cannot_be_are_named(changes, sizes, words):
    with pytest.raises(ConfigError) as error:
        check_mesh(STACKED.replace(**changes), MeshShape(**sizes))
    assert words in str(error.value)


def test_stages_share_the_layers():
    found = specs(STACKED, stage=4, fsdp=2)
    assert found["groups.0.blocks.1.mixer.up_proj.weight"] == P("stage", "fsdp", None)
    assert found["groups.0.blocks.0.norm.weight"] == P("stage", None)
    assert found["embed.weight"] == P(None, "fsdp")


def test_an_axis_without_use_is_refused():
    with pytest.raises(ConfigError, match=r"mesh.expert=2: pattern='M\*-' has no experts"):
        check_mesh(CFG.replace(pattern="M*-"), MeshShape(expert=2))


def test_groups_that_neither_divide_nor_are_divided():
    cfg = CFG.replace(mamba=MambaConfig(8, head_dim=6, state_size=8, n_groups=2, norm_groups=3))
    with pytest.raises(ConfigError, match=r"must divide mamba\.norm_groups=3, or be a multiple"):
        check_mesh(cfg, MeshShape(tensor=2))


def test_widths_that_do_not_divide_are_named():
    with pytest.raises(ConfigError, match=r"embed.weight has embed = 32: must be a multiple of fsdp=5"):
        specs(fsdp=5)
    place = Placement(abstract_mesh(MeshShape(tensor=4)))
    with pytest.raises(ShardingError, match="mlp = 6: must be a multiple of tensor=4"):
        place.spec([((("mlp", 6),),), ((("embed", 8),),)])

"""The work of a model, counted from its configuration, against the model itself."""

import pytest
from _bounds import decode_bytes, flops, passes, products, projections
from _tasks import model_config

from jaxllm.model.functional import abstract_params, flatten


@pytest.mark.parametrize("name", ["quickstart", "wide", "tiny"])
def test_projections_are_all_weight_matrices(name):
    cfg = model_config(name)
    sizes = [
        leaf.size
        for path, leaf in flatten(abstract_params(cfg)).items()
        if path.endswith("weight") and leaf.ndim == 2 and not path.startswith("embed") and "conv" not in path
    ]
    assert sum(k * n for k, n in projections(cfg.to_dict())) == sum(sizes)


def test_training_takes_the_head_everywhere_prefill_once_per_row():
    config = model_config("tiny").to_dict()
    weights = sum(k * n for k, n in projections(config))
    train = products(config, {"kind": "train", "batch": 2, "length": 16})
    assert flops(train) == 2 * 32 * weights
    head = config["hidden_size"] * config["vocab_size"]
    prefill = products(config, {"kind": "prefill", "batch": 2, "length": 16})
    assert flops(prefill) == 2 * 32 * (weights - head) + 2 * 2 * head
    assert (passes("train"), passes("prefill")) == (3, 1)


def test_decode_moves_weights_once_and_states_per_row():
    config = model_config("tiny").to_dict()
    weights = sum(k * n for k, n in projections(config))
    task = {"kind": "decode", "batch": 1, "length": 16, "new": 16}
    recurrent = 2 * 4 * 4 * 32 * 32
    cached = 24 * 2 * 4 * 1 * 32
    assert decode_bytes(config, task, 4) == 4 * weights + recurrent + cached
    assert decode_bytes(config, task | {"batch": 3}, 4) == 4 * weights + 3 * (recurrent + cached)
    assert decode_bytes(config, task, 2) == 2 * weights + recurrent + cached // 2

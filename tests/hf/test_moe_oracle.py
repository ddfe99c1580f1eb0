"""Random mixtures of experts, and the attention of Jet-Nemotron, against live transformers models: any family, any shape,
both directions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_cases import HYBRID, TRANSFORMER, prompt
from hf_mutants import mutants, surviving
from hf_parity import DISTINCT, TOLERANCE, check_cached, check_prefill

import jaxllm.hf as hf
from tests.nightly_record import recorded

pytestmark = [
    pytest.mark.oracle,
    # torch, transformers and its dependencies.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]
FAMILIES = ("nemotron_h", "mixtral", "qwen3_moe", "nemotron_latent", "qwen2")
DRAWS = 20


def random_config(family: str, seed: int) -> dict[str, Any]:
    """Sizes, routing options and layer orders drawn from ``seed``."""
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    experts = int(pick(4, 6, 8, 12))
    # With one expert, or all of them, some planted errors change nothing.
    top_k = int(rng.integers(2, 1 + min(4, experts - 1)))
    width = int(pick(20, 28, 36))
    if family == "mixtral":
        return TRANSFORMER | {
            "model_type": family,
            "num_local_experts": experts,
            "num_experts_per_tok": top_k,
            "intermediate_size": width,
            "sliding_window": pick(None, 6),
        }
    if family == "qwen3_moe":
        return TRANSFORMER | {
            "model_type": family,
            "num_experts": experts,
            "num_experts_per_tok": top_k,
            "moe_intermediate_size": width,
            "norm_topk_prob": pick(True, False),
            "mlp_only_layers": pick([], [0], [1]),
            "attention_bias": pick(True, False),
        }
    if family == "qwen2":
        # Jet-Nemotron's attention is Qwen2's: biases on q, k and v, windows in some layers.
        return TRANSFORMER | {
            "model_type": family,
            "num_key_value_heads": int(pick(1, 2, 4)),
            "head_dim": int(pick(12, 20)),
            "intermediate_size": int(pick(40, 72)),
            "use_sliding_window": True,
            "sliding_window": int(rng.integers(4, 12)),
            "max_window_layers": int(pick(0, 1)),
            "tie_word_embeddings": pick(True, False),
        }
    # Random order, an expert layer in any case, and attention: transformers' cache cannot do without. Groups of at least
    # two experts.
    letters = [*rng.choice(["M", "*", "-", "E"], 2).tolist(), "*", "E"]
    groups = int(pick(1, 2))
    return HYBRID | {
        "hybrid_override_pattern": "".join(rng.permutation(letters)),
        "n_groups": int(pick(1, 2, 8)),
        "n_routed_experts": experts,
        "num_experts_per_tok": min(top_k, experts // groups),
        "moe_intermediate_size": width,
        "moe_shared_expert_intermediate_size": int(pick(16, 44)),
        "moe_latent_size": int(pick(20, 48)) if family == "nemotron_latent" else None,
        "n_group": groups,
        "topk_group": 1,
        "norm_topk_prob": pick(True, False),
        "routed_scaling_factor": float(pick(1.0, 2.5, 5.0)),
    }


def agrees(config: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Prefill, cached decode and 48 greedy tokens agree; what was loaded is saved without a changed bit.

    Returns:
        The worst error in standard deviations of the logits, greedy tokens at near ties, planted errors, all noticed.
    """
    from hf_oracle import build, expect, routes

    print(config)
    for attempt in range(seed, seed + 20):
        theirs = build(config, attempt)
        expected = expect(theirs, prompt(attempt))
        varied = len(set(expected.greedy.tolist())) >= DISTINCT and expected.logits.std() >= 1
        if varied and routes(theirs, expected):
            break
    theirs.save_pretrained(folder / "theirs")
    model = hf.load(folder / "theirs")
    error = check_prefill(model, expected)
    cached, ties = check_cached(model, expected)
    print(f"prefill {error:.1e}, cached {cached:.1e}, near ties {ties}")
    hf.save(model, folder / "ours", family=config["model_type"])
    names = hf.tensor_dtypes(folder / "theirs")
    assert hf.tensor_dtypes(folder / "ours") == names
    from safetensors.numpy import load_file

    a, b = (load_file(folder / side / "model.safetensors") for side in ("theirs", "ours"))
    assert all(a[name].tobytes() == b[name].tobytes() for name in names)
    assert surviving(model, expected) == []
    return {"error": max(error, cached), "near_ties": ties, "planted_errors_noticed": len(mutants(model.cfg))}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", range(3))
def test_random_configurations_of_each_family(family: str, number: int, seed: int, tmp_path: Path) -> None:
    agrees(random_config(family, seed + number), (seed + number) % 1000, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", range(DRAWS))
def test_twenty_random_configurations_of_each_family(family: str, number: int, tmp_path: Path) -> None:
    """Writes what it found to experiments/results."""
    with recorded("tests/hf/test_moe_oracle.py", family, number, of=DRAWS, tolerance=TOLERANCE) as found:
        found |= agrees(random_config(family, 100 + number), number, tmp_path)

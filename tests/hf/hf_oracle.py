"""The other implementation: transformers on torch, imported only here."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
from hf_cases import CASES, prompt, weight
from hf_parity import Expected

NEW_TOKENS = 48


def build(config: dict[str, Any], seed: int = 0, dtype: str = "float32") -> Any:
    """A transformers model whose every tensor is :func:`hf_cases.weight`, with no clamp of dt."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    config = copy.deepcopy(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    with torch.no_grad():
        for name, tensor in disk_tensors(model):
            tensor.copy_(torch.from_numpy(weight(name, tuple(tensor.shape), seed)))
    unclamp(model)
    return model.to(getattr(torch, dtype))


def disk_name(model: Any, name: str) -> str:
    """The name that save_pretrained writes."""
    hybrid = type(model).__name__ == "NemotronHForCausalLM"
    return name.replace("model.", "backbone.", 1) if hybrid and name.startswith("model.") else name


# The names of an expert's parts by those of the stacked tensors that transformers 5 keeps in memory.
EXPERT_PARTS = {
    "nemotron_h": {"up_proj": ["up_proj"], "down_proj": ["down_proj"]},
    "mixtral": {"gate_up_proj": ["w1", "w3"], "down_proj": ["w2"]},
    "qwen3_moe": {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]},
}


def disk_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """(disk name, view) of everything that save_pretrained writes, without the tied head."""
    biases = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    kind = model.config.model_type
    for name, tensor in [*model.named_parameters(), *biases]:
        disk = disk_name(model, name)
        if kind == "mixtral":
            disk = disk.replace(".mlp.", ".block_sparse_moe.")
        owner, _, stack = disk.rpartition(".")
        if not owner.endswith(".experts"):
            yield disk, tensor
            continue
        parts = EXPERT_PARTS[kind][stack]
        for number, expert in enumerate(tensor):
            for part, view in zip(parts, expert.chunk(len(parts)), strict=True):
                yield f"{owner}.{number}.{part}.weight", view


def shapes(model: Any) -> dict[str, list[int]]:
    """Disk name to shape, without the tied head."""
    return {name: list(tensor.shape) for name, tensor in disk_tensors(model)}


def unclamp(model: Any) -> None:
    """transformers clamps dt of Nemotron-H from below in prefill, which no trained checkpoint means."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))


def expect(model: Any, tokens: np.ndarray, prefix: int = 19, new_tokens: int = NEW_TOKENS) -> Expected:
    """Prefill, cached decode from ``prefix`` and a greedy continuation of the first row."""
    import torch

    # Mamba-2 has its own name for the cache.
    key = "cache_params" if type(model).__name__ == "Mamba2ForCausalLM" else "past_key_values"

    def call(ids: Any, cache: Any = None) -> Any:
        out = model(torch.as_tensor(ids), use_cache=True, **({} if cache is None else {key: cache}))
        return out.logits[:, -1].float().numpy(), getattr(out, key)

    with torch.no_grad():
        full = model(torch.as_tensor(tokens), use_cache=False).logits.float().numpy()
        _, cache = call(tokens[:, :prefix])
        cached = []
        for t in range(prefix, tokens.shape[1]):
            logits, cache = call(tokens[:, t : t + 1], cache)
            cached.append(logits)
        logits, cache = call(tokens[:1])
        greedy, gaps = [], []
        for _ in range(new_tokens):
            low, high = np.sort(logits[0])[-2:]
            gaps.append(high - low)
            greedy.append(int(logits[0].argmax()))
            logits, cache = call(np.array([[greedy[-1]]]), cache)
    return Expected(tokens, full, np.array(greedy), np.array(gaps, np.float32), np.stack(cached, 1), prefix)


def routes(model: Any, expected: Expected) -> bool:
    """Correction biases and groups decide an expert of some token, where there are any: by chance they may decide none."""
    import torch

    def moved() -> bool:
        with torch.no_grad():
            logits = model(torch.as_tensor(expected.tokens), use_cache=False).logits.float().numpy()
        return bool(np.abs(logits - expected.logits).max() > 0.01 * expected.logits.std())

    found = []
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            kept = bias.clone()
            bias.zero_()
            found.append(moved())
            bias.copy_(kept)
    for module in model.modules():
        if getattr(module, "num_group", 1) > 1:
            groups = module.num_group, module.topk_group
            module.num_group = module.topk_group = 1
            found.append(moved())
            module.num_group, module.topk_group = groups
    return all(found)


def expect_case(name: str, seed: int = 0) -> tuple[Any, Expected]:
    """(transformers model, what it computes) of a case."""
    model = build(CASES[name], seed)
    return model, expect(model, prompt(seed))

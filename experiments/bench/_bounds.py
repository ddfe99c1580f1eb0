"""What a model must at least do per token, from its configuration as JSON: products and bytes."""

from typing import Any

Shape = tuple[int, int, int]


def projections(config: dict[str, Any]) -> list[tuple[int, int]]:
    """(in, out) of every weight matrix but the embedding, head last; products with states are left out."""
    width, mamba, attention, mlp = (config[k] for k in ("hidden_size", "mamba", "attention", "mlp"))
    found: list[tuple[int, int]] = []
    for letter in config["pattern"]:
        if letter == "M":
            inner = mamba["num_heads"] * mamba["head_dim"]
            fused = 2 * inner + 2 * mamba["n_groups"] * mamba["state_size"] + mamba["num_heads"]
            found += [(width, fused), (inner, width)]
        elif letter == "-":
            gates = 2 if mlp["activation"] == "swiglu" else 1
            found += [(width, mlp["intermediate_size"])] * gates + [(mlp["intermediate_size"], width)]
        else:
            q, kv = (attention[k] * attention["head_dim"] for k in ("num_heads", "num_kv_heads"))
            found += [(width, q), (width, kv), (width, kv), (q, width)]
    return [*found, (width, config["vocab_size"])]


def products(config: dict[str, Any], task: dict[str, Any]) -> dict[Shape, int]:
    """(m, k, n) to count of the forward products of a train or prefill task; prefill takes the head once per row."""
    *inner, head = projections(config)
    rows = task["batch"] * task["length"]
    counts: dict[Shape, int] = {}
    for k, n in inner:
        counts[rows, k, n] = counts.get((rows, k, n), 0) + 1
    shape = (task["batch"] if task["kind"] == "prefill" else rows, *head)
    counts[shape] = counts.get(shape, 0) + 1
    return counts


def flops(counts: dict[Shape, int]) -> int:
    """Two per multiply-add."""
    return sum(2 * m * k * n * count for (m, k, n), count in counts.items())


def passes(kind: str) -> int:
    """Products of a training step over those of its forward pass: backward has two for each."""
    return 3 if kind == "train" else 1


def decode_bytes(config: dict[str, Any], task: dict[str, Any], item: int) -> int:
    """Bytes that one decode step must move: weights once, recurrent states in and out, keys and values in.

    Args:
        config: of the model.
        task: of kind decode; attention reads the mean length.
        item: bytes of a stored weight, key or value; recurrent states are float32.
    """
    weights = item * sum(k * n for k, n in projections(config))
    mamba, attention = config["mamba"], config["attention"]
    state = 0
    if mamba:
        state += (
            config["pattern"].count("M")
            * 2
            * 4
            * mamba["num_heads"]
            * mamba["head_dim"]
            * mamba["state_size"]
        )
    if attention:
        layers = config["pattern"].count("*")
        length = task["length"] + task["new"] // 2
        state += layers * length * 2 * item * attention["num_kv_heads"] * attention["head_dim"]
    return weights + task["batch"] * state

"""What a model is made of, in figures: parameters per part, and the state that a sequence leaves behind."""

from dataclasses import dataclass
from math import prod

from jaxllm.config import LETTERS, ModelConfig

MTP = "multi-token prediction"


@dataclass(frozen=True)
class Part:
    """One kind of block.

    Attributes:
        name: "embedding", a mixer's or FFN's name, "norms", "head" or "multi-token prediction".
        blocks: how many there are.
        parameters: of all of them together.
    """

    name: str
    blocks: int
    parameters: int


def parts(cfg: ModelConfig) -> list[Part]:
    """Parts in the order of the forward pass; their parameters add up to the model's."""
    from jaxllm.model.functional import abstract_params, flatten

    cfg = cfg.replace(scan_layers=False)
    totals: dict[str, int] = {}
    norms = 0
    for name, leaf in flatten(abstract_params(cfg)).items():
        path = name.split(".")
        if path[0] == "layers" and path[2] == "mixer":
            part = LETTERS[cfg.pattern[int(path[1])]]
        else:
            part = {"embed": "embedding", "lm_head": "head", "mtp": MTP}.get(path[0], "norms")
        totals[part] = totals.get(part, 0) + prod(leaf.shape)
        norms += part == "norms"
    order = ["embedding", *LETTERS.values(), "norms", "head", MTP]
    blocks = {name: cfg.pattern.count(letter) for letter, name in LETTERS.items()} | {"norms": norms}
    blocks |= {} if cfg.mtp is None else {MTP: cfg.mtp.blocks}
    found = [Part(name, blocks.get(name, 1), totals[name]) for name in order if name in totals]
    return [*found, Part("head (the embedding transposed)", 1, 0)] if cfg.tie_embeddings else found


def parameter_count(cfg: ModelConfig) -> int:
    """All parameters."""
    return sum(part.parameters for part in parts(cfg))


def active_parameter_count(cfg: ModelConfig) -> int:
    """Parameters that one token meets, the embedding and the head included; fewer than all with routed experts."""
    from jaxllm.model.functional import active_sizes

    return sum(active_sizes(cfg).values())


def per_token_state_bytes(cfg: ModelConfig) -> int:
    """Bytes by which a sequence's state grows with each token; 0 for a purely recurrent model."""
    from jaxllm.cache.state import state_bytes

    return state_bytes(cfg, 2) - state_bytes(cfg, 1)

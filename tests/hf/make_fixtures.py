"""Record what transformers computes for every case, to check without torch.

    PYTHONPATH=src:.:tests/hf python tests/hf/make_fixtures.py

Writes fixtures/<case>.npz: config.json, tensor names and shapes (their values are hf_cases.weight with the seed),
tokens, logits and a greedy continuation.
"""

import json
from pathlib import Path

import numpy as np
import transformers
from hf_cases import CASES, RECORDED
from hf_oracle import expect_case, shapes

FIXTURES = Path(__file__).parent / "fixtures"


def main() -> None:
    """Write every fixture."""
    for name in RECORDED:
        for seed in range(100):
            model, expected = expect_case(name, seed)
            # A continuation that falls into a short cycle tests little.
            if len(set(expected.greedy.tolist())) >= 12 and expected.logits.std() >= 1.1:
                break
        np.savez_compressed(
            FIXTURES / f"{name}.npz",
            config=json.dumps(CASES[name]),
            shapes=json.dumps(shapes(model)),
            versions=json.dumps({"transformers": transformers.__version__}),
            seed=seed,
            tokens=expected.tokens,
            logits=expected.logits,
            greedy=expected.greedy,
            gaps=expected.gaps,
        )
        print(
            name, "seed", seed, "std", expected.logits.std(), "distinct", len(set(expected.greedy.tolist()))
        )


if __name__ == "__main__":
    main()

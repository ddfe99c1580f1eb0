"""What a quickstart run must have left: its files, its figures, a model that beats gzip and bigrams, a folder for others."""

import json
import math
import sys
from pathlib import Path

FILES = (
    "figures.json",
    "metrics.jsonl",
    "loss.png",
    "tokenizer.json",
    "hf/config.json",
    "hf/model.safetensors",
    "checkpoints",
)


def check_figures(run: Path) -> None:
    """Raise SystemExit for what is missing or not good enough."""
    missing = [name for name in FILES if not (run / name).exists()]
    if missing:
        raise SystemExit(f"{run}: {', '.join(missing)} missing")
    data = json.loads((run / "figures.json").read_text(encoding="utf-8"))
    figures = data["figures"]
    lost = [name for name in ("beats_gzip", "beats_bigram") if data[name] is not True]
    if lost:
        raise SystemExit(
            f"{run}: not {', not '.join(lost)}: {figures['bits_per_byte_after']:.3f} bits per byte"
        )
    odd = [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
    if odd:
        raise SystemExit(f"{run}: {', '.join(odd)} not finite")
    print(
        f"{figures['bits_per_byte_after']:.3f} bits per byte against {figures['gzip_bits_per_byte']:.3f} of gzip and "
        f"{figures['bigram_bits_per_byte']:.3f} of bigrams, after {figures['train_seconds'] / 60:.1f} minutes"
    )


def check_transformers(folder: Path) -> None:
    """The exported folder in transformers: it loads, and is no worse than a uniform guess by far."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(
        [
            [
                tokenizer.bos_token_id,
                *tokenizer.encode("import os\nimport sys\n\n\ndef main():\n    return 0\n"),
            ]
        ]
    )
    with torch.no_grad():
        loss = float(model(ids, labels=ids, use_cache=False).loss)
    if not loss < 0.7 * math.log(model.config.vocab_size):
        raise SystemExit(f"{folder}: loss {loss:.2f} in transformers; the weights did not arrive")
    print(
        f"transformers loads the export: {model.__class__.__name__}, loss {loss:.2f} on a few lines of Python"
    )


if __name__ == "__main__":
    if "--transformers" in sys.argv:
        check_transformers(Path(sys.argv[1]) / "hf")
    else:
        check_figures(Path(sys.argv[1]))

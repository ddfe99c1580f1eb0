"""``jaxllm eval``: what a checkpoint makes of some text, and what simple models make of it."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from jaxllm.cli.errors import UserError

if TYPE_CHECKING:
    from jaxllm.data.corpus import Corpus, Documents
    from jaxllm.model.functional import LanguageModel


@dataclass(frozen=True)
class Args:
    """Measure loss, perplexity and bits per byte of a model on text; every token is scored exactly once.

    Attributes:
        folder: a Hugging Face folder, or a run folder of jaxllm.
        data: 'stdlib', a glob of .txt, .py or .md files, FILE.jsonl:COLUMN, FILE.parquet:COLUMN, or hf:NAME:SPLIT:COLUMN.
        split: which documents: the 5 % that training leaves out, those it learns from, or both.
        window: most tokens that the model sees at once; longer documents are cut into overlapping windows.
        stride: tokens between the starts of two windows; the default is half a window.
        limit: measure this many documents only.
        baselines: also measure gzip, xz, and n-gram models of the training documents.
        json: print the figures as JSON.
    """

    folder: Positional[Path]
    data: str = "stdlib"
    split: Literal["validation", "train", "all"] = "validation"
    window: int = 1024
    stride: int | None = None
    limit: int | None = None
    baselines: bool = False
    json: bool = False

    def check(self) -> None:
        """Raise UserError for sizes out of range."""
        if self.window < 2:
            raise UserError("--window", self.window, "a whole number of at least 2")
        if self.stride is not None and not 1 <= self.stride < self.window:
            raise UserError(
                "--stride", self.stride, f"a whole number from 1 to {self.window - 1}, below --window"
            )
        if self.limit is not None and self.limit < 1:
            raise UserError("--limit", self.limit, "a whole number of at least 1")


def _chosen(corpus: "Corpus", split: str, limit: int | None) -> "Documents":
    from jaxllm.data.corpus import Documents

    parts = {
        "validation": (corpus.validation,),
        "train": (corpus.train,),
        "all": (corpus.train, corpus.validation),
    }
    items = [document for part in parts[split] for document in part.items if document.text]
    return Documents(tuple(items[:limit]))


def _baselines(model: "LanguageModel", corpus: "Corpus", texts: Sequence[str]) -> list[dict[str, Any]]:
    """Compressors on the same bytes; n-gram models of the training documents on the same tokens."""
    import math

    import numpy as np

    from jaxllm.data.tokens import TokenCorpus
    from jaxllm.evaluate.text import prefix_token
    from jaxllm.measure.compressors import gzip_bits_per_byte, xz_bits_per_byte
    from jaxllm.measure.ngram import KneserNey

    text = "".join(texts).encode("utf-8", "surrogatepass")
    found = [
        {"name": "gzip -9", "loss": None, "bits_per_byte": gzip_bits_per_byte(text)},
        {"name": "xz -9", "loss": None, "bits_per_byte": xz_bits_per_byte(text)},
    ]
    prefix = prefix_token(model)

    def tokens(documents: Sequence[str]) -> TokenCorpus:
        encoded = model.tokenizer.encode_batch(list(documents), eos=True)
        return TokenCorpus.from_documents(([prefix, *ids] for ids in encoded), model.tokenizer.vocab_size)

    train, scored = tokens(corpus.train.texts), tokens(texts)
    for order, name in ((2, "Kneser-Ney bigram"), (3, "modified Kneser-Ney trigram")):
        fitted = KneserNey(train.tokens, train.offsets, model.tokenizer.vocab_size, order=order)
        loss = fitted.nats_per_token(np.asarray(scored.tokens), scored.offsets)
        bits = loss * scored.n_targets / (math.log(2) * len(text))
        found.append({"name": name, "loss": loss, "bits_per_byte": bits})
    return found


def examine(args: Args) -> dict[str, Any]:
    """Everything that eval prints, as plain JSON values."""
    from jaxllm.data.sources import load_documents
    from jaxllm.evaluate.text import score_documents
    from jaxllm.generation.folders import load

    corpus = load_documents(args.data)
    documents = _chosen(corpus, args.split, args.limit)
    model = load(args.folder)
    started = time.perf_counter()
    score = score_documents(model, documents.texts, window=args.window, stride=args.stride)
    seconds = time.perf_counter() - started
    baselines = _baselines(model, corpus, documents.texts) if args.baselines else []
    return {
        "folder": str(args.folder),
        "data": args.data,
        "split": args.split,
        "sha256": documents.sha256,
        **score.to_dict(),
        "seconds": seconds,
        "baselines": baselines,
    }


def _show(report: dict[str, Any]) -> None:
    from jaxllm.cli.display import count, duration, make_console, number, size, table

    console = make_console()
    about = table(f"{report['data']}, {report['split']}", "", right=(1,))
    about.add_row("documents", count(report["documents"]))
    about.add_row("text", size(report["bytes"]))
    about.add_row("tokens scored, each once", count(report["tokens"]))
    about.add_row("window, stride", f"{report['window']}, {report['stride']}")
    about.add_row("time (compilation included)", duration(report["seconds"]))
    about.add_row("loss in nats per token", number(report["loss"]))
    about.add_row("perplexity per token", number(report["perplexity"], 2))
    about.add_row("next token guessed", f"{report['accuracy']:.1%}")
    about.add_row("bits per byte", number(report["bits_per_byte"]))
    console.print(about)
    if report["baselines"]:
        rivals = table("on the same text", "nats per token", "bits per byte", right=(1, 2))
        rows = [
            {"name": "this model", **{key: report[key] for key in ("loss", "bits_per_byte")}},
            *report["baselines"],
        ]
        for row in sorted(rows, key=lambda row: row["bits_per_byte"]):
            rivals.add_row(row["name"], number(row["loss"]), number(row["bits_per_byte"]))
        console.print(rivals)


def run(args: Args) -> int:
    """Print the figures."""
    args.check()
    report = examine(args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0

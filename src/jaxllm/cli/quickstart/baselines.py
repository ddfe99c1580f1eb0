"""What the model has to beat, on the same validation targets."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import numpy as np

from jaxllm.data.packing import RowSource
from jaxllm.data.prepare import PreparedData
from jaxllm.measure.compressors import gzip_bits_per_byte, xz_bits_per_byte
from jaxllm.measure.ngram import KneserNey


@dataclass(frozen=True)
class Baseline:
    """A figure beside the model's.

    Attributes:
        key: its name in figures.json.
        label: its name in the table.
        bits_per_byte: on the validation text.
        nats_per_token: on the validation targets; None for compressors, which know no tokens.
    """

    key: str
    label: str
    bits_per_byte: float
    nats_per_token: float | None = None


def seen_documents(rows: RowSource, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, offsets) of what a model has seen in the first ``count`` rows, without repetitions of later epochs.

    Each piece of a document stands with the target of its last position, so that the n-grams counted are exactly the
    (context, target) pairs that the model was trained on.

    Args:
        rows: the training rows.
        count: rows seen; from a whole epoch on, this is the whole corpus.
    """
    if count >= rows.rows_per_epoch:
        return np.asarray(rows.corpus.tokens), np.asarray(rows.corpus.offsets, np.int64)
    pieces: list[np.ndarray] = []
    for index in range(count):
        row = rows[index]
        tokens, segments = row["tokens"], row["segment_ids"]
        targets, mask = row["targets"][:, 0], row["loss_mask"]
        ends = np.flatnonzero(np.diff(segments, append=-1))
        starts = np.concatenate([[0], ends[:-1] + 1])
        for start, end in zip(starts, ends):
            if segments[start] > 0:
                last = targets[end : end + 1] if mask[end] > 0 else tokens[:0]
                pieces.append(np.concatenate([tokens[start : end + 1], last]))
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    return np.concatenate(pieces), offsets


def measure_baselines(
    data: PreparedData, seen: tuple[np.ndarray, np.ndarray], progress: Callable[[str], None] = lambda _: None
) -> list[Baseline]:
    """gzip and xz on the validation text, Kneser-Ney models of the tokens that the model has seen.

    Args:
        data: the corpus, its tokenizer and its tokens.
        seen: as :func:`seen_documents` gives it.
        progress: told what comes next.
    """
    text = b"".join(document.encode() for document in data.corpus.validation.texts)
    progress("gzip -9")
    found = [Baseline("gzip", "gzip -9", gzip_bits_per_byte(text))]
    progress("xz -9")
    found.append(Baseline("xz", "xz -9", xz_bits_per_byte(text)))
    validation = data.validation
    scored_bytes = data.tokenizer.token_bytes(validation.tokens)
    for order, key, label in (
        (2, "bigram", "Kneser-Ney bigram"),
        (3, "trigram", "modified Kneser-Ney trigram"),
    ):
        progress(label)
        model = KneserNey(*seen, data.tokenizer.vocab_size, order=order)
        nats = model.nats_per_token(np.asarray(validation.tokens), np.asarray(validation.offsets, np.int64))
        found.append(Baseline(key, label, nats * validation.n_targets / (log(2) * scored_bytes), nats))
    return found

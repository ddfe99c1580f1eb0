"""From the name of a corpus to everything that training and measuring on it need."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxllm.data.corpus import Corpus, Documents
from jaxllm.data.sources import load_documents
from jaxllm.data.store import cached_tokens, join_encoded
from jaxllm.data.tokenizer import DEFAULT_VOCAB_SIZE, Tokenizer, trained_tokenizer
from jaxllm.data.tokens import TokenCorpus

# Characters per call of the tokenizer: enough to busy all cores, few enough to keep its result small.
_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True, eq=False)
class PreparedData:
    """A corpus, its tokenizer, and its two splits as tokens.

    Attributes:
        corpus: the text.
        tokenizer: what the tokens were made with.
        train: training tokens.
        validation: validation tokens.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    train: TokenCorpus
    validation: TokenCorpus


def tokenize(documents: Documents, tokenizer: Tokenizer, cache: str | Path | None = None) -> TokenCorpus:
    """Documents as tokens, each as begin token, text, end token; cached by the hashes of both arguments.

    Args:
        documents: one split.
        tokenizer: any.
        cache: cache folder; None: the user's.
    """
    key = f"begin, text, end:{tokenizer.fingerprint}:{documents.sha256}"
    encoded = (tokenizer.encode_batch(texts, bos=True, eos=True) for texts in _batches(documents.texts))
    return cached_tokens(key, lambda: join_encoded(encoded, tokenizer.vocab_size), cache)


def _batches(texts: list[str]) -> Iterator[Sequence[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def prepare_data(
    spec: str = "stdlib",
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    cache: str | Path | None = None,
) -> PreparedData:
    """Loads a corpus, trains or loads its tokenizer, and tokenises both splits; the last two from the cache if possible.

    Args:
        spec: as in `load_documents`.
        tokenizer: a tokenizer, or the path of one (`tokenizer.json` or its folder); None: one trained on the corpus.
        vocab_size: entries of a trained tokenizer.
        cache: cache folder; None: `$XDG_CACHE_HOME/jaxllm` or `~/.cache/jaxllm`.

    Raises:
        DataError: the corpus or the tokenizer cannot be used; the message says why and what to do.
    """
    corpus = load_documents(spec)
    if tokenizer is None:
        tokenizer = trained_tokenizer(corpus.train.texts, corpus.train.sha256, vocab_size, cache)
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)
    return PreparedData(
        corpus,
        tokenizer,
        tokenize(corpus.train, tokenizer, cache),
        tokenize(corpus.validation, tokenizer, cache),
    )

"""Small synthetic corpora."""

import itertools

import numpy as np

from jaxllm.data.tokens import TokenCorpus


def synthetic_corpus(lengths, vocab_size=97, seed=0) -> TokenCorpus:
    rng = np.random.default_rng(seed)
    return TokenCorpus.from_documents([rng.integers(0, vocab_size, length) for length in lengths], vocab_size)


def numbered_corpus(lengths) -> TokenCorpus:
    """Every token is its own place in the corpus, so that a row shows exactly which tokens it holds."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    n = int(offsets[-1])
    return TokenCorpus.from_documents([np.arange(a, b) for a, b in itertools.pairwise(offsets)], n)

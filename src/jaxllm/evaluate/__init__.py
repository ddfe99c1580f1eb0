"""How good a model is: bits per byte, strided perplexity, and an adapter for lm-evaluation-harness."""

from jaxllm.evaluate.scoring import TokenScores, score_windows
from jaxllm.evaluate.text import TextScore, perplexity, score_documents
from jaxllm.evaluate.windows import Window, strided_windows

__all__ = [
    "TextScore",
    "TokenScores",
    "Window",
    "perplexity",
    "score_documents",
    "score_windows",
    "strided_windows",
]

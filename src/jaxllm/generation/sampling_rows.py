"""How requests ask for their tokens, as rows of the sampling state."""

from typing import Any

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.generation.engine_config import EngineConfig
from jaxllm.generation.request import Running
from jaxllm.generation.sampling import SamplingState
from jaxllm.generation.thinking import thinking_rows


def sampling_rows(
    cfg: ModelConfig, config: EngineConfig, requests: list[Running], rows: int
) -> SamplingState:
    """The sampling state of new requests as host arrays, ``rows`` of them.

    Tokens of a shared prefix, which no step reads for this request, count as prompt here.
    """

    def column(values: list[Any], dtype: Any) -> np.ndarray:
        array = np.zeros((rows,), dtype)
        array[: len(values)] = values
        return array

    params = [request.params for request in requests]
    stop_ids = np.full((rows, config.stop_width), -1, np.int32)
    for row, p in enumerate(params):
        stop_ids[row, : len(p.stop_token_ids)] = p.stop_token_ids
    zeros, vocab = np.zeros((rows,), np.int32), cfg.vocab_size
    thinking, width = None, config.thinking_width
    if width:
        budgets, prompts = [p.thinking for p in params], [request.prompt for request in requests]
        thinking = thinking_rows(budgets, prompts, config.newline_ids, rows, width)
    prompted = None
    if config.penalties:
        prompted = np.zeros((rows, vocab), bool)
        for row, request in enumerate(requests):
            prompted[row, request.prompt[: request.read]] = True
    return SamplingState(
        token=zeros,
        position=zeros,
        live=zeros.astype(bool),
        remaining=column([p.max_new_tokens for p in params], np.int32),
        barred=column([p.min_new_tokens for p in params], np.int32),
        stop_ids=stop_ids,
        seed=column([p.seed for p in params], np.uint32),
        temperature=column([p.temperature for p in params], np.float32),
        top_k=column([p.top_k or 0 for p in params], np.int32),
        top_p=column([1.0 if p.top_p is None else p.top_p for p in params], np.float32),
        min_p=column([p.min_p or 0.0 for p in params], np.float32),
        repetition=column([p.repetition_penalty for p in params], np.float32),
        presence=column([p.presence_penalty for p in params], np.float32),
        frequency=column([p.frequency_penalty for p in params], np.float32),
        prompted=prompted,
        counts=np.zeros((rows, vocab), np.int32) if config.penalties else None,
        thinking=thinking,
    )

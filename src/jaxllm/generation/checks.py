"""What a request must be to fit an engine, checked before it is queued."""

from jaxllm.cache.state import cache_groups
from jaxllm.config import ModelConfig, require
from jaxllm.generation.admission import PoolSizes
from jaxllm.generation.engine_config import EngineConfig
from jaxllm.generation.request import SamplingParams


def check_request(
    cfg: ModelConfig, config: EngineConfig, sizes: PoolSizes | None, prompt: list[int], params: SamplingParams
) -> None:
    """Raise ConfigError where a prompt is empty, holds an id outside the vocabulary, or a request does not fit.

    Args:
        cfg: the model.
        config: of the engine.
        sizes: of the shared pool; None: nothing is shared.
        prompt: token ids.
        params: how its tokens are chosen.
    """
    vocab = cfg.vocab_size
    require(len(prompt) > 0, "prompt", prompt, "must have at least one token")
    outside = [token for token in prompt if not 0 <= token < vocab]
    require(not outside, "prompt", outside[:1], f"token ids must be from 0 to {vocab - 1}")
    need = len(prompt) + params.max_new_tokens
    require(
        need <= config.capacity,
        "prompt",
        f"{len(prompt)} tokens with max_new_tokens={params.max_new_tokens}",
        f"together they must fit the capacity of {config.capacity} positions",
    )
    width = config.stop_width
    require(
        len(params.stop_token_ids) <= width,
        "stop_token_ids",
        params.stop_token_ids,
        f"at most {width} in this engine",
    )
    check_room(cfg, config, sizes, len(prompt), params.max_new_tokens)
    features = params.features
    require(
        config.penalties or not features.penalties,
        "penalties",
        False,
        "the engine was built without penalties, and this request uses one",
    )
    sampled = min(vocab, config.vocab_limit or vocab)
    require(
        (features.logprobs or 0) <= sampled,
        "logprobs",
        features.logprobs,
        f"at most the vocabulary of {sampled}",
    )
    if params.thinking is not None:
        params.thinking.check_fits(len(prompt), sampled, config.thinking_width)


def check_room(
    cfg: ModelConfig, config: EngineConfig, sizes: PoolSizes | None, prompt: int, new: int
) -> None:
    """Raise ConfigError where a request can never fit the shared pool, were it alone.

    Args:
        cfg: the model.
        config: of the engine.
        sizes: of the pool; None: nothing is shared.
        prompt: its tokens.
        new: most tokens that it generates.
    """
    if sizes is None:
        return
    for rule, room in zip(cache_groups(cfg, config.policy)[0], sizes.stored):
        # A prompt is stored whole until it has been read.
        need = prompt + new if rule is None else max(prompt, rule.stored(prompt, new))
        require(
            need <= room,
            "kv.pool_tokens",
            config.kv.pool_tokens,
            f"a prompt of {prompt} tokens with max_new_tokens={new} stores {need}, and there is room for {room} of one",
        )

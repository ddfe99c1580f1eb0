"""Engines kept between calls, so that a second ``generate`` finds its pools and compiled steps ready.

With a shared pool (``KVCache.pool_tokens``) it also finds the prompts of earlier calls, as long as the parameters are the
same arrays.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from jaxllm.config import ModelConfig
from jaxllm.generation import weights
from jaxllm.generation.engine import Engine
from jaxllm.generation.engine_config import EngineConfig
from jaxllm.model.functional import Params

# Pools are as large as what they hold: two shapes alternate well, more would only sit in memory.
_KEPT = 2
_idle: OrderedDict[tuple[ModelConfig, EngineConfig], Engine] = OrderedDict()
_lock = threading.Lock()


@contextmanager
def borrowed(cfg: ModelConfig, params: Params, config: EngineConfig) -> Iterator[Engine]:
    """An engine that nobody else uses meanwhile; it is kept for the next caller only if it is left without requests."""
    with _lock:
        engine = _idle.pop((cfg, config), None)
    if engine is None:
        engine = Engine(cfg, params, config)
    engine.params = params
    yield engine
    # Not reached after an exception, or by an abandoned stream: such an engine is thrown away.
    engine.params = None
    if not engine.busy:
        with _lock:
            _idle[cfg, config] = engine
            while len(_idle) > _KEPT:
                _idle.popitem(last=False)


def clear() -> None:
    """Forget all idle engines and rounded weights, and so free their memory."""
    with _lock:
        _idle.clear()
    weights.clear()

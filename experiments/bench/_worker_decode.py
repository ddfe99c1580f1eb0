"""transformers decoding one row from a filled cache: static, or quantised by one of its backends."""

import time
from typing import Any

from _protocol import serve
from _tasks import tokens_for


class Decode:
    """One model in one dtype; its cache is filled with random keys, not by a prefill."""

    def setup(self, weights: str, dtype: str, threads: int, **_: Any) -> dict[str, Any]:
        import torch
        import transformers
        from transformers import Qwen3ForCausalLM

        torch.set_num_threads(threads)
        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.model = Qwen3ForCausalLM.from_pretrained(weights, dtype=self.dtype).eval()
        return {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}

    def check(self, length: int, file: str) -> dict[str, Any]:
        """Logits of fixed tokens, as a .npy file."""
        import numpy as np

        tokens = self.torch.from_numpy(tokens_for(self.model.config.vocab_size, 1, length))
        with self.torch.inference_mode():
            np.save(file, self.model(tokens, use_cache=False).logits.float().numpy())
        return {}

    def fill(self, cache: str, context: int, room: int) -> dict[str, Any]:
        """A cache of ``context`` random keys: "static", with ``room`` for more, or the name of a quantising backend."""
        from transformers import QuantizedCache, StaticCache

        torch, config = self.torch, self.model.config
        torch.manual_seed(0)
        quantised = cache != "static"
        made = (
            QuantizedCache(cache, config) if quantised else StaticCache(config, max_cache_len=context + room)
        )
        for layer in made.layers:
            shape = (1, config.num_key_value_heads, context, config.head_dim)
            with torch.inference_mode():
                layer.update(torch.randn(shape, dtype=self.dtype), torch.randn(shape, dtype=self.dtype))
        self.cache, self.token = made, torch.zeros((1, 1), dtype=torch.long)
        return {}

    def step(self, steps: int) -> float:
        """Seconds of ``steps`` greedy tokens, each call going on where the last one ended."""
        start = time.perf_counter()
        with self.torch.inference_mode():
            for _ in range(steps):
                logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
                self.token = logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - start

    def length(self) -> int:
        """Tokens that the cache has now."""
        return int(self.cache.get_seq_length())


if __name__ == "__main__":
    serve(Decode())

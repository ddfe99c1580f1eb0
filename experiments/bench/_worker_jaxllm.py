"""jaxllm through its public functions: ``make_train_step``, ``generate`` and a jitted forward."""

import time
from typing import Any

from _protocol import peak_rss_mib, serve
from _tasks import GATE_STEPS, OPTIMIZER, tokens_for


def _precision(name: str) -> Any:
    from jaxllm import Precision

    return {
        "fp32": Precision(),
        "bf16-matmul": Precision(matmul="bfloat16"),
        "bf16": Precision(param="bfloat16", compute="bfloat16"),
    }[name]


class Jaxllm:
    """One model in one precision."""

    def export(self, config: dict[str, Any], folder: str, **_: Any) -> dict[str, Any]:
        """Write freshly initialised weights as a Hugging Face folder, for every contender."""
        from jaxllm import LanguageModel, ModelConfig, hf
        from jaxllm.model.functional import init_params

        cfg = ModelConfig.from_dict(config)
        hf.save(LanguageModel(cfg, init_params(cfg, seed=0)), folder, family="nemotron_h")
        return {}

    def setup(self, weights: str, precision: str, **_: Any) -> dict[str, Any]:
        import jax

        from jaxllm import __version__, hf

        self.jax = jax
        self.model = hf.load(weights, _precision(precision))
        self.cfg = self.model.cfg
        self.trainer: Any = None
        count = sum(leaf.size for leaf in jax.tree.leaves(self.model.params))
        return {"parameters": count, "versions": {"jaxllm": __version__, "jax": jax.__version__}}

    def check(self, rows: int, length: int, file: str) -> dict[str, Any]:
        """Logits of fixed tokens, as a .npy file."""
        import numpy as np

        from jaxllm import PackedBatch
        from jaxllm.model.functional import merge

        batch = PackedBatch.from_rows(tokens_for(self.cfg.vocab_size, rows, length))
        forward = self.jax.jit(lambda p, b: merge(self.cfg, p)(b))
        np.save(file, np.asarray(forward(self.model.params, batch), np.float32))
        return {}

    def prepare(self, task: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Compile and warm up; what the gate compares: losses of the first steps, or tokens."""
        self.task, self.trainer = task, None
        if task["kind"] == "train":
            self._start_training()
            losses = [self._train() for _ in range(GATE_STEPS)]
            return {"losses": losses, "once": self._once()[0]}
        self.prompts = tokens_for(self.cfg.vocab_size, task["batch"], task["length"]).tolist()
        tokens = self._generate(task["new"])
        self._once()
        return {"tokens": tokens, "once": sum(self._once())}

    def measure(self, repeats: int, **_: Any) -> dict[str, Any]:
        peak_rss_mib(reset=True)
        runs = [self._once() for _ in range(repeats)]
        return {
            "seconds": [run[0] for run in runs],
            "first": [run[1] for run in runs],
            "peak_rss_mib": peak_rss_mib(),
        }

    def _once(self) -> tuple[float, float]:
        """Seconds of one run, and of one that ends with the first new token (decode; else 0)."""
        start = time.perf_counter()
        if self.task["kind"] == "train":
            self._train()
            return time.perf_counter() - start, 0.0
        self._generate(self.task["new"])
        whole = time.perf_counter() - start
        if self.task["kind"] == "prefill":
            return whole, 0.0
        start = time.perf_counter()
        self._generate(1)
        return whole, time.perf_counter() - start

    def _generate(self, new: int) -> list[list[int]]:
        import jaxllm

        results = jaxllm.generate(self.model, self.prompts, max_new_tokens=new, ignore_eos=True)
        return [result.token_ids for result in results]

    def _start_training(self) -> None:
        import jax.numpy as jnp

        from jaxllm import PackedBatch
        from jaxllm.train.optim import OptimConfig
        from jaxllm.train.state import state_of
        from jaxllm.train.step import make_train_step

        optim = OptimConfig(schedule="constant", warmup_steps=0, **OPTIMIZER)
        tokens = tokens_for(self.cfg.vocab_size, self.task["batch"], self.task["length"] + 1)
        batch = PackedBatch.from_rows(tokens[:, :-1]).replace(
            targets=jnp.asarray(tokens[:, 1:, None], jnp.int32), loss_mask=jnp.ones(tokens[:, 1:].shape)
        )
        self.trainer = [make_train_step(self.cfg, optim), state_of(self.model.params, optim), batch]

    def _train(self) -> float:
        step, state, batch = self.trainer
        self.trainer[1], metrics = step(state, batch)
        self.jax.block_until_ready(self.trainer[1])
        return float(metrics.loss)


if __name__ == "__main__":
    serve(Jaxllm())

"""jax-linear-attention, in its own Python 3.12 interpreter: the same architecture with its own random weights."""

import time
from typing import Any

from _protocol import peak_rss_mib, serve
from _tasks import GATE_STEPS, OPTIMIZER, tokens_for


def layers_of(pattern: str) -> tuple[list[str], list[str]]:
    """Token and channel mixers of its layers, which are pairs: ``M-`` is one, ``M*`` two of which one has no MLP.

    Raises:
        ValueError: an MLP follows nothing that it could belong to.
    """
    mixers: list[str] = []
    mlps: list[str] = []
    for letter in pattern:
        if letter != "-":
            mixers.append({"M": "mamba2", "*": "attention"}[letter])
            mlps.append("none")
        elif mlps and mlps[-1] == "none":
            mlps[-1] = "relu2"
        else:
            raise ValueError(f"pattern {pattern!r}: an MLP without a mixer before it")
    return mixers, mlps


class Jla:
    """One model in one precision."""

    def setup(self, config: dict[str, Any], precision: str, **_: Any) -> dict[str, Any]:
        from importlib.metadata import version

        import equinox as eqx
        import jax
        from jla.models.config import AttentionConfig, ModelConfig, SSMConfig
        from jla.models.lm import build_model

        self.jax, self.eqx = jax, eqx
        self.dtype = "float32" if precision == "fp32" else "bfloat16"
        mixers, mlps = layers_of(config["pattern"])
        mamba, attention = config["mamba"], config["attention"]
        self.cfg = ModelConfig(
            vocab_size=config["vocab_size"],
            d_model=config["hidden_size"],
            n_layers=len(mixers),
            d_ff=config["mlp"]["intermediate_size"],
            attention=AttentionConfig(
                attention["num_heads"],
                attention["num_kv_heads"],
                attention["head_dim"],
                qk_norm=False,
                use_rope=False,
            ),
            ssm=SSMConfig(
                d_state=mamba["state_size"],
                expand=mamba["num_heads"] * mamba["head_dim"] // config["hidden_size"],
                head_dim=mamba["head_dim"],
                n_groups=mamba["n_groups"],
                conv_size=mamba["conv_kernel"],
                chunk_size=mamba["chunk_size"],
            ),
            layer_types=tuple(mixers),
            mlp_types=tuple(mlps),
            norm_eps=config["norm_eps"],
            tie_embeddings=False,
            compute_dtype=self.dtype,
            # Its fastest at these sizes: nothing recomputed, layers unrolled.
            remat="none",
            scan_layers=False,
        )
        self.build = lambda: build_model(self.cfg, key=jax.random.key(0))
        self.model = self.build()
        count = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(self.model, eqx.is_inexact_array)))
        versions = {"jax-linear-attention": version("jax-linear-attention"), "jla's jax": jax.__version__}
        return {"parameters": count, "versions": versions}

    def prepare(self, task: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Compile and warm up."""
        self.task, self.trainer = task, None
        if task["kind"] == "train":
            self._start_training()
            losses = [self._train() for _ in range(GATE_STEPS)]
            return {"losses": losses, "once": self._once()[0]}
        self.model = self.build()
        self.prompts = tokens_for(self.cfg.vocab_size, task["batch"], task["length"]).tolist()
        self._once()
        return {"once": sum(self._once())}

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

    def _generate(self, new: int) -> None:
        from jla.inference.generate import generate

        generate(self.model, self.prompts, max_new_tokens=new)

    def _start_training(self) -> None:
        import jax.numpy as jnp
        from jla.training.optimizers import create_optimizer
        from jla.training.step import LossConfig, build_train_step, lm_loss

        settings = dict(OPTIMIZER)
        optimizer = create_optimizer(max_grad_norm=settings.pop("clip_norm"), **settings)
        tokens = tokens_for(self.cfg.vocab_size, self.task["batch"], self.task["length"] + 1)
        parts = {"input_ids": tokens[None, :, :-1], "labels": tokens[None, :, 1:]}
        batch = {name: jnp.asarray(part, jnp.int32) for name, part in parts.items()}
        model = self.build()
        state = optimizer.init(self.eqx.filter(model, self.eqx.is_inexact_array))
        step = build_train_step(optimizer, lm_loss(LossConfig(compute_dtype=self.dtype)))
        self.trainer = [step, model, state, batch, self.jax.random.key(0)]

    def _train(self) -> float:
        step, model, state, batch, key = self.trainer
        model, state, metrics, key = step(model, state, batch, key)
        self.trainer[1:3], self.trainer[4] = (model, state), key
        self.jax.block_until_ready(self.eqx.filter(model, self.eqx.is_inexact_array))
        return float(metrics["loss"])


if __name__ == "__main__":
    serve(Jla())

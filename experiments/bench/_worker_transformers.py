"""transformers' NemotronHForCausalLM: eager, torch.compile or static cache, float32 or bfloat16."""

import contextlib
import time
from typing import Any

from _protocol import peak_rss_mib, serve
from _tasks import GATE_STEPS, OPTIMIZER, tokens_for

# Parameters without weight decay, by the last part of their name; as jaxllm.train.optim.decay_mask.
UNDECAYED = ("A_log", "D", "dt_bias", "bias")


def _decays(name: str) -> bool:
    *owners, last = name.split(".")
    is_norm = bool(owners) and (owners[-1].endswith("norm") or owners[-1] == "norm_f")
    return not (is_norm or last in UNDECAYED)


class Transformers:
    """One model in one precision and mode."""

    def setup(self, weights: str, precision: str, mode: str, threads: int, **_: Any) -> dict[str, Any]:
        import torch
        import transformers
        from transformers import NemotronHForCausalLM

        torch.set_num_threads(threads)
        self.torch, self.weights, self.precision, self.mode = torch, weights, precision, mode
        self.kind: str | None = None
        self.model = NemotronHForCausalLM.from_pretrained(weights, dtype=torch.float32)
        self._free_dt(self.model)
        count = sum(p.numel() for p in self.model.parameters())
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        return {"parameters": count, "versions": versions}

    def _free_dt(self, model: Any) -> None:
        """transformers clamps dt from below in prefill, though not in decode: the checkpoints' own code does not."""
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))

    def _load(self, kind: str) -> None:
        """A fresh model for training or for generation, compiled where the mode says so."""
        torch = self.torch
        from transformers import NemotronHForCausalLM

        # Training is mixed precision: float32 masters under autocast.
        bf16 = self.precision == "bf16" and kind != "train"
        dtype = torch.bfloat16 if bf16 else torch.float32
        torch.compiler.reset()
        self.model = NemotronHForCausalLM.from_pretrained(self.weights, dtype=dtype)
        self._free_dt(self.model)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.model.train(kind == "train")
        self.kind = kind
        if self.mode == "compile" and kind != "train":
            self.model.forward = torch.compile(self.model.forward)

    def check(self, rows: int, length: int, file: str) -> dict[str, Any]:
        """Logits of fixed tokens, as a .npy file."""
        import numpy as np

        mode, self.mode = self.mode, "eager"
        self._load("prefill")
        self.mode, self.kind = mode, None
        tokens = self.torch.from_numpy(tokens_for(self.model.config.vocab_size, rows, length))
        with self.torch.inference_mode():
            np.save(file, self.model(tokens, use_cache=False).logits.float().numpy())
        return {}

    def prepare(self, task: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Compile and warm up; what the gate compares: losses of the first steps, or tokens."""
        torch, kind = self.torch, task["kind"]
        # Shapes that a compiled model has met before would make it compile for any shape, which is slower.
        if kind == "train" or self.kind != kind or "compile" in self.mode:
            self._load(kind)
        self.task = task
        vocab = self.model.config.vocab_size
        if kind == "train":
            tokens = torch.from_numpy(tokens_for(vocab, task["batch"], task["length"] + 1))
            self.batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            self._start_training()
            losses = [self._train() for _ in range(GATE_STEPS)]
            return {"losses": losses, "once": self._once()[0]}
        self.prompts = torch.from_numpy(tokens_for(vocab, task["batch"], task["length"]))
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
        if self.kind == "train":
            self._train()
            return time.perf_counter() - start, 0.0
        self._generate(self.task["new"])
        whole = time.perf_counter() - start
        if self.kind == "prefill":
            return whole, 0.0
        start = time.perf_counter()
        self._generate(1)
        return whole, time.perf_counter() - start

    def _generate(self, new: int) -> list[list[int]]:
        torch = self.torch
        with torch.inference_mode():
            if self.kind == "prefill":
                # The bare forward: generate() would add what it costs to set up.
                logits = self.model(self.prompts, use_cache=True, logits_to_keep=1).logits
                return logits[:, -1].argmax(-1, keepdim=True).tolist()
            options: dict[str, Any] = {"use_cache": True}
            if self.mode.startswith("static"):
                options["cache_implementation"] = "static"
            if self.mode == "static-compile":
                from transformers import CompileConfig

                compiling = CompileConfig(fullgraph=False)
                # generate() compiles on accelerators only, unless told.
                compiling._compile_all_devices = True
                options["compile_config"] = compiling
            out = self.model.generate(
                self.prompts,
                attention_mask=torch.ones_like(self.prompts),
                do_sample=False,
                max_new_tokens=new,
                **options,
            )
        return out[:, self.prompts.shape[1] :].tolist()

    def _start_training(self) -> None:
        torch = self.torch
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for n, p in named if _decays(n)], "weight_decay": OPTIMIZER["weight_decay"]},
            {"params": [p for n, p in named if not _decays(n)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=OPTIMIZER["lr"], betas=OPTIMIZER["betas"], eps=OPTIMIZER["eps"], fused=True
        )

        def loss(tokens: Any, targets: Any) -> Any:
            logits = self.model(tokens, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

        self.loss = torch.compile(loss) if self.mode == "compile" else loss

    def _train(self) -> float:
        torch = self.torch
        mixed = (
            torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
        )
        with mixed:
            loss = self.loss(*self.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER["clip_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


if __name__ == "__main__":
    serve(Transformers())

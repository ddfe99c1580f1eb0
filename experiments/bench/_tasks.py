"""What is measured: models, tasks and contenders. Standard library only, so that every worker can import it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """One thing to time.

    Attributes:
        kind: "train" (one AdamW step), "prefill" (a prompt up to its first token) or "decode" (tokens after that).
        batch: rows.
        length: tokens of a row; of the prompt where there is one.
        new: decode: tokens to generate.
    """

    kind: str
    batch: int
    length: int
    new: int = 1

    @property
    def name(self) -> str:
        """Readable and unique."""
        if self.kind == "train":
            return f"train {self.batch}x{self.length}"
        return f"{self.kind} b{self.batch}"

    @property
    def tokens(self) -> int:
        """Tokens that one run counts for; decode starts counting after the first new one."""
        return self.batch * (self.new - 1 if self.kind == "decode" else self.length)


TASKS = (
    Task("train", 8, 256),
    Task("train", 1, 1024),
    Task("prefill", 1, 512),
    Task("prefill", 8, 512),
    Task("decode", 1, 64, 128),
    Task("decode", 8, 64, 128),
)
QUICK_TASKS = (Task("train", 2, 64), Task("prefill", 1, 64), Task("decode", 2, 16, 64))

# AdamW of every trainer: same settings, same parameters decayed, same clipping.
OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
# First steps whose losses are compared before a training figure counts; they are the warm-up as well.
GATE_STEPS = 6


@dataclass(frozen=True)
class Contender:
    """A library in one precision and mode.

    Attributes:
        library: "jaxllm", "transformers", "jla" or "machine" (the bounds).
        precision: "fp32"; "bf16": weights and activations (transformers trains so under autocast, with float32
            masters); "bf16-matmul": float32 with bfloat16 operands of large products.
        mode: "jit", or how transformers runs: eager, compile, static (cache), static-compile.
        kinds: task kinds that it takes part in.
    """

    library: str
    precision: str
    mode: str = "jit"
    kinds: tuple[str, ...] = ("train", "prefill", "decode")

    @property
    def name(self) -> str:
        """Readable and unique."""
        return f"{self.library} {self.precision}" + ("" if self.mode == "jit" else f" {self.mode}")

    @property
    def script(self) -> Path:
        """The worker's file."""
        return HERE / f"_worker_{self.library}.py"


_GENERATION = ("prefill", "decode")
JAXLLM = (
    Contender("jaxllm", "fp32"),
    Contender("jaxllm", "bf16-matmul"),
    Contender("jaxllm", "bf16", kinds=_GENERATION),
)
MACHINE = (Contender("machine", "fp32"), Contender("machine", "bf16"))
JLA = (Contender("jla", "fp32"), Contender("jla", "bf16"))
TRANSFORMERS = tuple(
    Contender("transformers", precision, mode, kinds)
    for precision in ("fp32", "bf16")
    for mode, kinds in (
        ("eager", ("train", *_GENERATION)),
        ("compile", ("train", *_GENERATION)),
        ("static", ("decode",)),
        ("static-compile", ("decode",)),
    )
)
QUICK = (JAXLLM[0], TRANSFORMERS[0], MACHINE[0])


def operands(precision: str) -> str:
    """Dtype of the large products' operands: which matmul bound holds."""
    return "fp32" if precision == "fp32" else "bf16"


def storage(precision: str) -> str:
    """Dtype in which generation keeps the weights: which stream bound holds."""
    return "bf16" if precision == "bf16" else "fp32"


def model_config(name: str) -> Any:
    """The :class:`jaxllm.ModelConfig` of a benchmark model."""
    import jaxllm
    from jaxllm.config import AttentionConfig, MambaConfig, MLPConfig

    quickstart = jaxllm.preset("quickstart")
    if name == "quickstart":
        return quickstart
    if name == "wide":
        return quickstart.replace(
            vocab_size=8192,
            hidden_size=512,
            pattern="M-M-M*M-",
            mamba=MambaConfig(num_heads=16, head_dim=64, state_size=128, chunk_size=64),
            attention=AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=64),
            mlp=MLPConfig(2048, "relu2"),
        )
    if name == "tiny":
        return quickstart.replace(
            vocab_size=512,
            hidden_size=64,
            pattern="M-*-",
            mamba=MambaConfig(num_heads=4, head_dim=32, state_size=32, chunk_size=32),
            attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=32),
            mlp=MLPConfig(128, "relu2"),
        )
    raise ValueError(f"model {name!r}: quickstart, wide or tiny")


def tokens_for(vocab: int, rows: int, length: int) -> Any:
    """i64 numpy [rows, length], the same in every worker."""
    import numpy as np

    return np.random.default_rng([7, rows, length]).integers(3, vocab, (rows, length))

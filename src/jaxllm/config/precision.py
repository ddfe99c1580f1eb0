"""Dtypes."""

from dataclasses import dataclass
from typing import Literal

from jaxllm.config.checks import one_of, require


@dataclass(frozen=True)
class Precision:
    """Dtypes of one run.

    Attributes:
        param: storage of the (master) parameters.
        compute: residual stream and activations.
        accum: accumulation of matrix products, softmax, norms and recurrent states.
        matmul: dtype to which operands and cotangents of the large products are rounded; "compute" leaves them.
    """

    param: Literal["float32", "bfloat16"] = "float32"
    compute: Literal["float32", "bfloat16"] = "float32"
    accum: Literal["float32"] = "float32"
    matmul: Literal["compute", "bfloat16"] = "compute"

    def __post_init__(self) -> None:
        for name in ("param", "compute"):
            one_of(f"precision.{name}", getattr(self, name), "float32", "bfloat16")
        require(
            self.accum == "float32", "precision.accum", self.accum, "float32 is the only accumulation dtype"
        )
        one_of("precision.matmul", self.matmul, "compute", "bfloat16")

    @property
    def operand(self) -> str | None:
        """Operand dtype of large products; None keeps the operands' own."""
        return None if self.matmul == "compute" else self.matmul

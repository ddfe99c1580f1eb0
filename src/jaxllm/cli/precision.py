"""Dtypes that suit the device."""

from jaxllm.cli import machine
from jaxllm.config import Precision


def precision_for(
    matmul: str, backend: str, bfloat16_products: bool, capability: float | None = None
) -> Precision:
    """The dtypes of a run.

    Args:
        matmul: operands of large products: "bfloat16", "compute", or "auto".
        backend: ``jax.default_backend()``.
        bfloat16_products: whether the CPU multiplies bfloat16 in hardware.
        capability: compute capability of an NVIDIA GPU; bfloat16 needs 8.0, which a T4 (7.5) has not.
    """
    fast = bfloat16_products if backend == "cpu" else capability is None or capability >= 8.0
    chosen = matmul if matmul != "auto" else "bfloat16" if fast else "compute"
    return Precision(matmul="bfloat16" if chosen == "bfloat16" else "compute")


def device_precision(matmul: str = "auto") -> Precision:
    """:func:`precision_for` the first device of this machine."""
    import jax

    capability = getattr(jax.devices()[0], "compute_capability", None)
    return precision_for(
        matmul,
        jax.default_backend(),
        machine.has_bfloat16_products(),
        float(capability) if capability else None,
    )

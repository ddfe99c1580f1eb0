"""Compiler options of the decode step."""

import functools

import jax


@functools.cache
def decode_options(operands: str) -> dict[str, str]:
    """Options for programs of one token per row on this backend.

    XLA:CPU hands dots and reductions to YNNPACK, whose set-up per call costs more than a float32 product with one
    token, and whose reduction over the state size is several times slower than the plain loop: without it a step of
    a hidden-256 hybrid takes a fifth of the time. Products of bfloat16 do go there, alone: nothing else in XLA:CPU
    reaches the processor's bfloat16 units. Empty where the backend is another, or does not know the option.

    Args:
        operands: dtype of the large products' operands, the narrowest of them where some differ.
    """
    if jax.default_backend() != "cpu":
        return {}
    fused = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT" if operands == "bfloat16" else ""
    options = {"xla_cpu_experimental_ynn_fusion_type": fused}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except Exception:  # another jaxlib: the option may be gone, and its error type is not public
        return {}
    return options

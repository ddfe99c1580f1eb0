"""Which implementation of an op runs.

Implementations are modules ``pallas_kernels.<op>.<implementation>``, imported at their first use. Each has
``run`` (the op, arguments already checked), ``supports`` (same arguments; None, or the reason why not) and
``REASON`` (why ``auto`` takes it).
"""

from importlib import import_module
from types import ModuleType

# Fastest first: ``auto`` takes the first that supports the call.
IMPLEMENTATIONS = {
    "attention": ("xla", "reference"),
    "causal_conv": ("xla", "reference"),
    "causal_conv.window": ("xla", "reference"),
    "dynamic_conv": ("xla", "reference"),
    "gated_delta": ("xla", "reference"),
    "gated_delta.window": ("xla", "reference"),
    "grouped_matmul": ("xla", "reference"),
    "ssd": ("xla", "reference"),
    "ssd.window": ("xla", "reference"),
}


def _module(op: str, name: str) -> ModuleType:
    return import_module(f"pallas_kernels.{op}.{name}")


def choose(op: str, implementation: str, *args: object, **options: object) -> ModuleType:
    """The module that will run this call of ``op``.

    Args:
        op: name of the op.
        implementation: "auto" or one of ``IMPLEMENTATIONS[op]``.
        args: positional arguments of the call.
        options: keyword arguments of the call.

    Raises:
        ValueError: ``implementation`` is unknown, or does not support the call. Nothing falls back silently.
    """
    names = IMPLEMENTATIONS[op]
    if implementation != "auto" and implementation not in names:
        allowed = ", ".join(repr(name) for name in ("auto", *names))
        raise ValueError(f"implementation={implementation!r}: expected one of {allowed} for {op}")
    refusals = []
    for name in names if implementation == "auto" else (implementation,):
        module = _module(op, name)
        refusal = module.supports(*args, **options)
        if refusal is None:
            return module
        refusals.append(f"{name}: {refusal}")
    raise ValueError(
        f"implementation={implementation!r}: cannot run this call of {op} ({'; '.join(refusals)})"
    )


def explain() -> list[tuple[str, str, str]]:
    """(op, implementation, reason) of what ``auto`` takes here for an ordinary call of each op."""
    return [(op, names[0], _module(op, names[0]).REASON) for op, names in IMPLEMENTATIONS.items()]

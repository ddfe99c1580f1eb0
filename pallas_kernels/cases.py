"""What is proven, tuned and measured of an op: its cases, one list per op in ``pallas_kernels/<op>/cases.py``.

The proofs (interpreter, lowering, ahead-of-time compilation), ``pallas_kernels.verify``, ``pallas_kernels.tune`` and
``experiments/bench/kernels.py`` all draw from the lists that :func:`cases` finds.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray, Shaped

Arrays = dict[str, Shaped[Array, "..."]]


@dataclass(frozen=True)
class Case:
    """One call of an op, at one shape.

    Attributes:
        name: unique within the op, e.g. "8B prefill 16k d128".
        op: the op, as in ``dispatch.IMPLEMENTATIONS``.
        function: the public entry; takes the inputs, the options and ``implementation`` as keyword arguments.
        inputs: named arrays from a PRNG key, in jnp, so that the shapes are known without running it.
        options: static keyword arguments.
        implementations: the kernels that run it.
        gradients: inputs to differentiate by; with any, forward and backward are one program.
        stands_for: the preset and phase whose shape this is, or what a small case exercises.
        small: runs in the interpreter (under about 100 inner steps); others are compiled and run on devices only.
        oracle: what the results are compared with; "xla" where every score at once would not fit.
        oracle_options: options that the oracle takes instead, e.g. float32 operands.
        tolerance: largest error relative to the largest magnitude of each result.
        padding: from the inputs, a boolean array per input that has elements which must not matter (True there).
        poison: what such elements are set to: NaN, or a huge value where the op asks for finite padding.
        unspecified: from the inputs, a pytree like the outputs, True where a value means nothing; None: everything
            counts.
        registers: ceiling of the registers a thread of its kernels takes; a compile above it is a regression.
        spill_bytes: ceiling of the bytes that one of its kernels stores to and loads from local memory.
        flops: multiply-adds counted twice, of one call, backward included where there is one.
        bytes_moved: the least that a call must read and write.
    """

    name: str
    op: str
    function: Callable[..., Any]
    inputs: Callable[[PRNGKeyArray], Arrays]
    options: Mapping[str, Any] = field(default_factory=dict)
    implementations: tuple[str, ...] = ("mosaic_gpu",)
    gradients: tuple[str, ...] = ()
    stands_for: str = ""
    small: bool = False
    oracle: str = "reference"
    oracle_options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 2e-2
    padding: Callable[[Arrays], Arrays] | None = None
    poison: float = float("nan")
    unspecified: Callable[[Arrays], Any] | None = None
    registers: int = 255
    spill_bytes: int = 0
    flops: float | None = None
    bytes_moved: float | None = None

    def avals(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the inputs; nothing is computed."""
        return jax.eval_shape(self.inputs, jax.eval_shape(lambda: jax.random.key(0)))

    def call(self, implementation: str) -> Callable[[Arrays], Any]:
        """From the inputs to the outputs, or with ``gradients`` to (outputs, gradients of the sum of the outputs)."""

        def forward(arrays: Arrays) -> Any:
            return self.function(**arrays, **self.options, implementation=implementation)

        if not self.gradients:
            return forward

        def both(arrays: Arrays) -> Any:
            wanted = {name: arrays[name] for name in self.gradients}
            outputs, pull = jax.vjp(lambda some: forward({**arrays, **some}), wanted)
            ones = jax.tree.map(lambda o: jax.numpy.ones_like(o), outputs)
            return outputs, pull(ones)[0]

        return both


def unread_by_step(names: tuple[str, ...], arrays: Arrays) -> Arrays:
    """What a decode step over slot pools never reads: idle rows of these inputs, what the slots of fresh rows hold."""
    idle = arrays["slots"] < 0
    begun = jax.numpy.where(arrays["fresh"] & ~idle, arrays["slots"], len(arrays["pool"]))
    found = {name: idle.reshape(-1, *[1] * (arrays[name].ndim - 1)) for name in names}
    held = jax.numpy.zeros(len(arrays["pool"]), bool).at[begun].set(True, mode="drop")
    return {**found, "pool": held.reshape(-1, *[1] * (arrays["pool"].ndim - 1))}


def cases(op: str | None = None) -> list[Case]:
    """The cases of one op, or of all ops that have kernels."""
    from pallas_kernels.dispatch import IMPLEMENTATIONS

    found: list[Case] = []
    for name in IMPLEMENTATIONS if op is None else (op,):
        module = f"pallas_kernels.{name}.cases"
        if importlib.util.find_spec(module) is not None:
            found += importlib.import_module(module).CASES
    return found

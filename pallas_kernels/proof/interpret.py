"""L0: kernels on the CPU, in the interpreters of Pallas, with race detection where the version of JAX has it."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import compat

# What an interpreted Mosaic kernel does not show.
UNSEEN = "MMA path not executed"


class RaceError(AssertionError):
    """Two threads, or a thread and a copy, touch the same memory without order between them."""


def run(fn: Callable[..., Any], *arguments: Any, races: bool = False) -> Any:
    """``fn(*arguments)``, jitted, with every kernel in it interpreted.

    Args:
        races: look for races; jax 0.10.2 does not see all of them (``compat.RACES_ARE_SEEN``).

    Raises:
        RaceError: there is one.
    """
    with compat.interpreted(races):
        if races:
            compat.reset_interpreter()
        try:
            out = jax.block_until_ready(jax.jit(lambda *a: fn(*a))(*arguments))
        except Exception as error:
            if races and "race" in str(error).lower():
                raise RaceError(str(error).splitlines()[0]) from error
            raise
        if races and compat.races_found():
            compat.reset_interpreter()
            raise RaceError("the interpreter reports a race; its message is on standard output")
        return out

"""One thing after another, where nothing else would say so."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool


def there(*done: jax.Array) -> Bool[Array, ""]:
    """True, which the compiler does not know and the program not before all of ``done`` is there.

    A barrier would be a hint, which some compilers drop before they schedule; this is a dependence. XLA:CPU needs it
    between a loop with collectives in it and a collective beside that: it runs them at once, each blocks a thread, and
    simulated devices that meet them in different orders wait for each other for ever.

    Args:
        done: arrays of any shape and dtype.
    """
    sure = jnp.bool_(True)
    for x in done:
        bits = lax.bitcast_convert_type(x[(0,) * x.ndim].astype(jnp.float32), jnp.uint32)
        # NaN or not.
        sure &= (bits | 1) != 0
    return sure


def in_turn(reduce: Callable[[jax.Array], jax.Array], tree: Any, *before: jax.Array) -> Any:
    """``reduce``, a collective, of every leaf, each once the one before it is there; it changes no bit.

    Between processes of CPUs, that is (:attr:`parallel.sharding.Placement.in_turn`). XLA:CPU has several under way at once,
    and where a peer dies the first to fail leaves what another peer has sent it unread; the second waits behind that,
    even when this peer has left too, until the bound of collectives.

    Args:
        reduce: of one array.
        tree: arrays.
        before: what has to be there before the first.
    """
    leaves, structure = jax.tree.flatten(tree)
    out, done = [], there(*before) if before else None
    for leaf in leaves:
        out.append(reduce(leaf if done is None else jnp.where(done, leaf, jnp.zeros_like(leaf))))
        done = there(out[-1])
    return jax.tree.unflatten(structure, out)

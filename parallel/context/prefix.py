"""The state before every block of every document, from what each block does to a state, wherever the blocks are.

A block is an affine map of the state (arXiv 2605.08524 leaves recurrent layers in the user's layout; this is the other
way). Two all-to-alls move the elements of all blocks' maps so that each device holds some of every block's, composes them
in the order of the documents, and gives every lane its part of the state that enters it. A device sends S maps and
receives L states, less its own share of one Nth of both, whatever the plan.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.alignment import move
from parallel.context.lanes import Lanes
from parallel.context.rows import Axis
from parallel.context.shares import from_shares, padded, to_shares


def _inverse(index: Int[Array, " m"], size: int) -> Int[Array, " size"]:
    """Where each of 0..size-1 stands in ``index``, -1: nowhere."""
    known = jnp.where(index < 0, size, index)
    return (
        jnp.full(size, -1, index.dtype).at[known].set(jnp.arange(len(index), dtype=index.dtype), mode="drop")
    )


def _pick(values: Float[Array, "R ..."], index: Int[Array, " m"]) -> Float[Array, "m ..."]:
    """Rows of ``values``, none of them twice; zeros where the index is -1."""
    return move(values[None], index[None], _inverse(index, values.shape[0])[None])[0]


def _before(
    maps: tuple[Float[Array, "R ..."], ...],
    lanes: Lanes,
    compose: Callable[..., tuple[Array, Array]],
) -> Float[Array, "N L ..."]:
    """The state before each lane: maps (factor, state) of all places composed in the order of the documents.

    Nothing enters a document's first block, so that its factor is 0 and the composition needs no other boundary.
    """
    factor, state = (_pick(each, jnp.asarray(lanes.order)) for each in maps)
    first = jnp.asarray(lanes.first).reshape(-1, *[1] * (factor.ndim - 1))
    _, reached = jax.lax.associative_scan(compose, (jnp.where(first, 0, factor), state))
    after = jnp.asarray(lanes.after)
    return _pick(reached, after.reshape(-1)).reshape(*after.shape, *reached.shape[1:])


def scaled_states(
    decay: Float[Array, "S H"], state: Float[Array, "S H E"], lanes: Lanes, axis: Axis
) -> Float[Array, "L H E"]:
    """States before each lane where a block scales what enters it: ``out = decay * in + state``.

    Each device composes E / N elements of every head (padded where N does not divide E), so that the decays, gathered as
    one number per head and block, broadcast. Moved per device: (S + L) H E numbers.

    Args:
        decay: of the block in each slot; read only where another one follows it, as is ``state``.
        state: after the slot's block if zeros enter it.
        lanes: of the plan.
        axis: the mesh axis, or axes, of the workers.
    """
    workers = jax.lax.axis_size(axis)
    elements = state.shape[2]
    state = padded(state, 2, workers).reshape(*state.shape[:2], workers, -1)
    everywhere = to_shares(jnp.moveaxis(state, 2, 1), axis)
    decays = jax.lax.all_gather(decay, axis, tiled=True)[..., None]

    def compose(earlier, later):
        return later[0] * earlier[0], later[0] * earlier[1] + later[1]

    before = _before((decays, everywhere), lanes, compose)
    return jnp.moveaxis(from_shares(before, axis), 1, 2).reshape(before.shape[1], state.shape[1], -1)[
        ..., :elements
    ]


def column_groups(workers: int, heads: int, keys: int, values: int) -> int:
    """Into how many groups of columns :func:`transformed_states` cuts each head's state.

    The columns of a state are independent of each other, but each group needs the head's whole matrix; so that as few
    numbers as possible travel, padding of heads and of columns counted.
    """

    def numbers(groups: int) -> int:
        return -(-heads * groups // workers) * keys * (keys + 2 * -(-values // groups))

    return min(range(1, min(workers, values) + 1), key=numbers)


def transformed_states(
    matrix: Float[Array, "S H k k"], state: Float[Array, "S H k v"], lanes: Lanes, axis: Axis
) -> Float[Array, "L H k v"]:
    """States before each lane where a block multiplies what enters it by a matrix: ``out = matrix @ in + state``.

    Each device composes some heads of every block, or where they are fewer than the devices some columns of some heads
    (:func:`column_groups`); heads are padded where the devices do not divide them. Moved per device, of c groups of w
    columns and U = c H units padded to a multiple of N: S U k (k + w) numbers there and L U k w back.

    Args:
        matrix: of the block in each slot; read only where another one follows it, as is ``state``.
        state: after the slot's block if zeros enter it.
        lanes: of the plan.
        axis: the mesh axis, or axes, of the workers.
    """
    workers = jax.lax.axis_size(axis)
    slots, heads, keys, values = state.shape
    groups = column_groups(workers, heads, keys, values)
    columns = jnp.moveaxis(padded(state, 3, groups).reshape(slots, heads, keys, groups, -1), 3, 2)
    width = columns.shape[-1]
    factors = jnp.broadcast_to(matrix[:, :, None], (slots, heads, groups, keys, keys))
    units = jnp.concatenate([factors, columns], axis=-1).reshape(slots, heads * groups, keys, keys + width)
    units = padded(units, 1, workers)
    everywhere = to_shares(units.reshape(slots, workers, -1, keys, keys + width), axis)

    def compose(earlier, later):
        both = jnp.concatenate([earlier[0], earlier[1]], axis=-1)
        both = jnp.einsum("...ij,...jk->...ik", later[0], both, precision="highest")
        return both[..., :keys], both[..., keys:] + later[1]

    before = _before((everywhere[..., :keys], everywhere[..., keys:]), lanes, compose)
    own = from_shares(before, axis).reshape(before.shape[1], -1, keys, width)[:, : heads * groups]
    own = jnp.moveaxis(own.reshape(-1, heads, groups, keys, width), 2, 3)
    return own.reshape(-1, heads, keys, groups * width)[..., :values]

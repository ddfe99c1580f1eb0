"""What layers call where the documents of a step's rows lie on many devices: one object, made anew for every batch.

It is an input of the compiled step. Its arrays differ from batch to batch; what the program is compiled for (shapes, the
capacity, the strategy) is static, so that a step with another capacity is another program.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from parallel.context.arrays import PlanArrays
from parallel.context.attention import context_attention
from parallel.context.exchange import Exchange
from parallel.context.lanes import Lanes
from parallel.context.layout import Layout
from parallel.context.rows import lane_specs
from parallel.context.ulysses import ulysses_attention
from parallel.mesh import ROWS, SLOTS

STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scattered:
    """Plans of a batch: one for each of G groups of devices that share rows, and each of M microbatches.

    Leaves that belong to a device have the leading axis G * N * M, those of a group G * M; a device's part of one
    microbatch has 1 there, which is what the methods take. They are called under ``jax.shard_map``.

    Attributes:
        plan: of attention.
        lanes: of layers with a state; None: the model has none.
        index: i32[G * N * M * S, block], the place of each token among the ``rows * length`` of its group's microbatch;
            -1 = padding.
        ahead: f32[G * N * M * S, block, K], loss weights of the K further tokens that prediction blocks are scored on;
            None: no such blocks.
        exchange: how keys and values travel, and the capacity.
        heads: attention exchanges heads for tokens (Ulysses); ``plan`` is then of a group as if it were one device.
        rows: of a group in one microbatch.
        length: tokens of a row.
    """

    plan: PlanArrays
    lanes: Lanes | None
    index: Any
    ahead: Any
    exchange: Exchange = field(metadata=STATIC)
    heads: bool = field(metadata=STATIC)
    rows: int = field(metadata=STATIC)
    length: int = field(metadata=STATIC)

    def specs(self) -> "Scattered":
        """How ``jax.shard_map`` hands every leaf out: to one device, or to all of a group."""
        own, group = PartitionSpec(SLOTS), PartitionSpec(ROWS)
        whole = set(PlanArrays._fields) if self.heads else {"order"}
        plan = PlanArrays(**{n: group if n in whole else own for n in PlanArrays._fields})
        ahead = None if self.ahead is None else own
        places: list[Any] = [own if each else group for each in of_a_worker()]
        lanes = None if self.lanes is None else Lanes(*places)
        return Scattered(plan, lanes, own, ahead, self.exchange, self.heads, self.rows, self.length)

    def attention(
        self,
        q: Float[Array, "S block H d"],
        k: Float[Array, "S block K d"],
        v: Float[Array, "S block K d"],
        segment_ids: Int[Array, "S block"],
        positions: Int[Array, "S block"],
        **options: Any,
    ) -> Float[Array, "S block H d"]:
        """Causal attention within documents, to the keys of the whole group.

        Args:
            q: of the device's slots.
            k: likewise.
            v: likewise.
            segment_ids: the group's documents from 1 on; 0 = padding. More may be padding than the plan knows, at the
                ends of documents.
            positions: in the document.
            options: as :func:`parallel.context.attention.context_attention` takes them.

        Raises:
            ValueError: as ``context_attention`` or ``ulysses_attention``.
        """
        attend = ulysses_attention if self.heads else context_attention
        places = Layout(self.index, segment_ids, positions)
        plan = PlanArrays(*(x[0] for x in self.plan))
        made = attend(q, k, v, plan, places, self.exchange, **options)
        assert isinstance(made, jax.Array)
        return made

    @property
    def where(self) -> dict[str, Any]:
        """The arguments ``lanes`` and ``axis`` of :mod:`parallel.context.recurrence` and :mod:`parallel.context.halo`.

        Raises:
            ValueError: there are no lanes.
        """
        if self.lanes is None:
            raise ValueError("lanes=None: a layer with a state needs a batch that was scattered with a reach")
        parts = zip(self.lanes, of_a_worker())
        lanes = Lanes(*(x if own else x[0] for x, own in parts))
        return {"lanes": lanes, "axis": self.exchange.axis_name}

    def by_row(self, values: Shaped[Array, "S block ..."]) -> Shaped[Array, "rows ..."]:
        """Sums over this device's tokens of each of the group's rows."""
        row = jnp.where(self.index < 0, self.rows, self.index // self.length).reshape(-1)
        flat = values.reshape(-1, *values.shape[2:])
        return jnp.zeros((self.rows, *flat.shape[1:]), flat.dtype).at[row].add(flat, mode="drop")

    def sum_group(self, x: Any) -> Any:
        """Sums over the devices that share the rows."""
        return jax.lax.psum(x, self.exchange.axis_name)


def of_a_worker() -> tuple[bool, ...]:
    """Of each field of :class:`Lanes`: it is a worker's own, not the group's."""
    return tuple(len(spec) > 0 for spec in lane_specs("context"))

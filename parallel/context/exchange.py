"""Blocks of keys and values moved between workers as a plan's arrays say, by a program that knows only its shapes.

Everything here runs inside ``jax.shard_map`` over the context axis, on a worker's own part of the plan (:func:`own`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from pallas_kernels.target import target
from parallel.context.arrays import Capacity, PlanArrays
from parallel.context.layout import Layout

AxisName = str | tuple[str, ...]
Backend = Literal["rotate", "allgather", "ragged"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def plan_specs(axis_name: AxisName = "context") -> tuple[PlanArrays, Layout]:
    """How ``shard_map`` shares a plan's arrays and its layout out to the workers along an axis, or a product of axes."""
    each = PartitionSpec(axis_name)
    columns = dict.fromkeys(PlanArrays._fields, each) | {"order": PartitionSpec()}
    return PlanArrays(**columns), Layout(each, each, each)


def own(plan: Any) -> Any:
    """What a worker has of the arrays of :func:`plan_specs`, without the axis of workers; ``order`` stays whole."""
    if isinstance(plan, PlanArrays):
        return PlanArrays(**{n: x if n == "order" else x[0] for n, x in plan._asdict().items()})
    return jax.tree.map(lambda x: x[0], plan)


@dataclass(frozen=True)
class Exchange:
    """Fetches what a stage's rounds bring, and carries gradients back; all that differs between back ends.

    Attributes:
        capacity: that of the plans.
        axis_name: mesh axis, or axes, along which the workers stand, in the order of their numbers.
        backend: ``rotate`` permutes by each shift in turn, wherever XLA runs, and sends as many blocks as the capacity has
            rounds, for plans of ``rounds="rotations"``; ``ragged`` sends what the plan says and no more, but not on CPUs;
            ``allgather`` sends everything to everybody, for tests.
    """

    capacity: Capacity
    axis_name: AxisName = "context"
    backend: str = "rotate"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"exchange backend={self.backend!r}: must be one of {', '.join(BACKENDS)}")
        if self.backend == "rotate" and self.capacity.rounds and not self.capacity.shifts:
            raise ValueError(
                "exchange backend='rotate': must have a capacity of plans with rounds='rotations', not 'matchings'"
            )

    def fetch(self, tree: Any, plan: PlanArrays, stage: int) -> Any:
        """What the rounds of a stage bring.

        Args:
            tree: arrays [S, ...], a worker's slots.
            plan: the worker's own arrays.
            stage: counted from 0, known when the program is traced.

        Returns:
            The same tree, arrays [stage_rounds, ...]: the slot that each round brings, zeros where it brings none.

        Raises:
            ValueError: the back end cannot run on the devices that the program is for.
        """
        return jax.tree.map(self._moves(plan, stage).fetch, tree)

    def give_back(self, home: Any, tree: Any, plan: PlanArrays, stage: int) -> Any:
        """The transpose of :func:`fetch`: gradients of what came, added where it is from.

        Args:
            home: arrays [S, ...], to which is added, in their dtype.
            tree: the same tree, arrays [stage_rounds, ...].
            plan: the worker's own arrays.
            stage: as in :func:`fetch`.

        Returns:
            The new ``home``.

        Raises:
            ValueError: as :func:`fetch`.
        """
        return jax.tree.map(self._moves(plan, stage).give_back, home, tree)

    def _moves(self, plan: PlanArrays, stage: int) -> "_Moves":
        """The back end with what the plan says of a stage."""
        if self.backend == "ragged" and target().platform == "cpu":
            raise ValueError(
                "exchange backend='ragged': must be 'rotate' or 'allgather' on CPUs, for which XLA has no ragged "
                "all-to-all"
            )
        group = self.capacity.stage_rounds
        names = [n for n in PlanArrays._fields if n.startswith(("send_", "receive_"))]
        rounds = {n: getattr(plan, n)[stage * group : (stage + 1) * group] for n in names}
        return _BACK_ENDS[self.backend](self, plan._replace(**rounds), stage)


def _masked(x: jax.Array, there: jax.Array) -> jax.Array:
    return jnp.where(there.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def _take(x: jax.Array, slot: jax.Array) -> jax.Array:
    """Slots of x, zeros for those below 0."""
    return _masked(jnp.take(x, jnp.maximum(slot, 0), axis=0), slot >= 0)


def _add(home: jax.Array, slot: jax.Array, x: jax.Array) -> jax.Array:
    """``home`` with ``x[i]`` added at ``slot[i]``, unless that is below 0."""
    at = jnp.where(slot >= 0, slot, home.shape[0])
    return home.at[at].add(x.astype(home.dtype), mode="drop")


@dataclass(frozen=True)
class _Moves(ABC):
    """One stage of an exchange, of one leaf at a time; ``rounds`` are the plan's arrays of its rounds."""

    exchange: Exchange
    rounds: PlanArrays
    stage: int

    @abstractmethod
    def fetch(self, x: jax.Array) -> jax.Array:
        """As :meth:`Exchange.fetch`, of one array."""

    @abstractmethod
    def give_back(self, home: jax.Array, x: jax.Array) -> jax.Array:
        """As :meth:`Exchange.give_back`, of one array."""


class _Rotate(_Moves):
    def _groups(self) -> Iterator[tuple[int, slice]]:
        """Each shift of the stage and its rounds, 0 where none is due."""
        capacity = self.exchange.capacity
        group = capacity.stage_rounds
        first = 0
        for shift, run in groupby(capacity.shift_of_round[self.stage * group : (self.stage + 1) * group]):
            last = first + len(list(run))
            yield shift, slice(first, last)
            first = last

    def _permute(self, x: jax.Array, shift: int) -> jax.Array:
        workers = self.exchange.capacity.workers
        pairs = [(worker, (worker + shift) % workers) for worker in range(workers)]
        return lax.ppermute(x, self.exchange.axis_name, pairs)

    def fetch(self, x: jax.Array) -> jax.Array:
        parts = []
        for shift, rounds in self._groups():
            sent = _take(x, self.rounds.send_slot[rounds])
            parts.append(self._permute(sent, shift) if shift else jnp.zeros_like(sent))
        return jnp.concatenate(parts)

    def give_back(self, home: jax.Array, x: jax.Array) -> jax.Array:
        for shift, rounds in self._groups():
            if shift:
                home = _add(home, self.rounds.send_slot[rounds], self._permute(x[rounds], -shift))
        return home


class _AllGather(_Moves):
    def fetch(self, x: jax.Array) -> jax.Array:
        everything = lax.all_gather(x, self.exchange.axis_name)
        sender, slot = self.rounds.receive_from, self.rounds.receive_slot
        return _masked(everything[jnp.maximum(sender, 0), jnp.maximum(slot, 0)], sender >= 0)

    def give_back(self, home: jax.Array, x: jax.Array) -> jax.Array:
        workers, slots = self.exchange.capacity.workers, home.shape[0]
        everything = jnp.zeros((workers * slots, *home.shape[1:]), home.dtype)
        sender, slot = self.rounds.receive_from, self.rounds.receive_slot
        everything = _add(everything, jnp.where(sender >= 0, sender * slots + slot, -1), x)
        return home + lax.psum_scatter(everything, self.exchange.axis_name, tiled=True)


class _Ragged(_Moves):
    """One ragged all-to-all a stage, its rows blocks, sorted by the worker at the other end, then by round."""

    def _sorted(self, other: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rounds in the order of the other end, those without one last; how many blocks it has, and the first."""
        workers = self.exchange.capacity.workers
        order = jnp.argsort(jnp.where(other < 0, workers, other), stable=True)
        sizes = jnp.bincount(jnp.where(other < 0, workers, other), length=workers + 1)[:workers]
        sizes = sizes.astype(jnp.int32)
        return order, sizes, jnp.cumsum(sizes) - sizes

    def _move(
        self, x: jax.Array, to: jax.Array, row: jax.Array, came: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x[i] to worker to[i], as its row[i]-th; returns what came by rows, and the round of each row."""
        workers = self.exchange.capacity.workers
        order, sizes, first = self._sorted(to)
        back, expected, _ = self._sorted(came)
        # All for one worker stand together there too, so the first says where.
        there = jnp.full(workers + 1, x.shape[0], jnp.int32)
        there = there.at[jnp.where(to < 0, workers, to)].min(row)[:workers]
        there = jnp.where(sizes > 0, there, 0)
        moved = lax.ragged_all_to_all(
            jnp.take(x, order, axis=0),
            jnp.zeros_like(x),
            first,
            sizes,
            there,
            expected,
            axis_name=self.exchange.axis_name,
        )
        return moved, back

    def fetch(self, x: jax.Array) -> jax.Array:
        plan = self.rounds
        moved, back = self._move(_take(x, plan.send_slot), plan.send_to, plan.send_row, plan.receive_from)
        return jnp.zeros_like(moved).at[back].set(moved, unique_indices=True)

    def give_back(self, home: jax.Array, x: jax.Array) -> jax.Array:
        plan = self.rounds
        moved, back = self._move(x, plan.receive_from, plan.receive_row, plan.send_to)
        return _add(home, plan.send_slot[back], moved)


_BACK_ENDS: dict[str, type[_Moves]] = {"rotate": _Rotate, "allgather": _AllGather, "ragged": _Ragged}

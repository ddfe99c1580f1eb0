"""Where every parameter and activation lies: one table from logical axis names to mesh axes.

Parameters rest in shares (`Placement.spec`). A step runs under ``shard_map`` over the whole mesh: a layer turns the
shares of its parameters into what this device computes with (`Placement.share`) just before it uses them, and sums what
devices computed in part (`sum_tensor`, `sum_rows`). Collectives are therefore those that stand in the code, and kernels
see plain local arrays (docs/decisions/0015-explicit-shares.md).

An axis of an array is described by plain tuples: segments one after the other (a fused projection has several), each a
product of factors ``(name, size)``, the first outermost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from parallel.mesh import SLOTS
from parallel.order import in_turn

Factor = tuple[str, int]
Segment = tuple[Factor, ...]
Described = tuple[Segment, ...]

# Mesh axes that share a logical axis. A name that is not here is whole on every device.
TABLE: Mapping[str, tuple[str, ...]] = {
    # Activations.
    "rows": SLOTS,
    # A matrix of each expert.
    "experts": ("expert",),
    # Layers that repeat, stacked.
    "layers": ("stage",),
    # What one layer's matrices are cut along, whole heads or groups at a time.
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "kv_heads": ("tensor",),
    "q_heads_per_kv_head": ("tensor",),
    "ssm_groups": ("tensor",),
    "ssm_heads_per_group": ("tensor",),
    "key_heads": ("tensor",),
    "value_heads_per_key_head": ("tensor",),
    # What is cut for storage only, and gathered for use; also over `tensor` where nothing else of the array is.
    "embed": ("fsdp", "expert"),
    "latent": ("fsdp", "expert"),
    "generator": ("fsdp", "expert"),
}
STORED = frozenset(name for name, axes in TABLE.items() if "fsdp" in axes and name != "rows")
# Of these a device may have a copy of what it shares with others: several query heads read one key head.
SHARED = frozenset({"kv_heads", "ssm_groups", "key_heads"})
# The name under which gathered parameters are known to `jax.checkpoint` policies.
GATHERED = "gathered parameter"


def everything_but_gathered(primitive: Any, *operands: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: parameters are gathered again in backward, and rounded again; all else is kept."""
    if primitive.name == "name":
        return params["name"] != GATHERED
    # What the name is given to; nothing but parameters is gathered.
    if primitive.name == "all_gather":
        return False
    # Rounded copies of matrices; activations have rows and tokens.
    return not (primitive.name == "convert_element_type" and operands[0].ndim == 2)


class ShardingError(ValueError):
    """Sizes of an array and of the mesh that do not go together; the message has the numbers."""


@dataclass(frozen=True)
class _Run:
    """The neighbouring factors of a segment that `tensor` shares: sizes before, of, and after them."""

    names: tuple[str, ...]
    before: int
    size: int
    after: int

    def local(self, shares: int) -> int:
        """Size of the run on one of ``shares`` devices."""
        if self.size % shares == 0:
            return self.size // shares
        if set(self.names) <= SHARED and shares % self.size == 0:
            return 1
        copies = " or one of its divisors" if set(self.names) <= SHARED else ""
        raise ShardingError(
            f"{' * '.join(self.names)} = {self.size}: must be a multiple of tensor={shares}{copies}"
        )


def _run(segment: Segment) -> _Run | None:
    places = [i for i, (name, _) in enumerate(segment) if TABLE.get(name) == ("tensor",)]
    if not places:
        return None
    first, last = places[0], places[-1] + 1
    sizes = [size for _, size in segment]
    return _Run(
        tuple(name for name, _ in segment[first:last]),
        prod(sizes[:first]),
        prod(sizes[first:last]),
        prod(sizes[last:]),
    )


@dataclass(frozen=True)
class _Cut:
    """How one array lies: mesh axes of each of its axes, and which axis `tensor` deals out at use."""

    spec: tuple[tuple[str, ...], ...]
    dealt: int | None


@dataclass(frozen=True)
class Placement:
    """Shares of one mesh.

    Attributes:
        mesh: a Mesh with every axis of `parallel.mesh.AXES`; an AbstractMesh will do to count shares.
        capacity: rows that one exchange with experts elsewhere has room for, over an even share (`parallel.experts`).
    """

    mesh: Any
    capacity: float = 2.0

    @property
    def in_turn(self) -> bool:
        """Whether collectives are better not under way together: between processes of CPUs (:mod:`parallel.order`)."""
        devices = [] if isinstance(self.mesh, AbstractMesh) else list(self.mesh.devices.flat)
        return len({device.process_index for device in devices}) > 1 and devices[0].platform == "cpu"

    def size(self, *axes: str) -> int:
        """Devices along ``axes`` together."""
        return prod(self.mesh.shape[axis] for axis in axes)

    def _wide(self, axes: Sequence[str]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    @property
    def rows(self) -> tuple[str, ...]:
        """Mesh axes over which devices see other tokens: other rows, or other blocks of the same rows' documents."""
        return self._wide(TABLE["rows"])

    def _cut(self, axes: Sequence[Described]) -> _Cut:
        spec: list[tuple[str, ...]] = [()] * len(axes)
        used: set[str] = set()

        def take(place: int, names: Sequence[str]) -> None:
            new = tuple(n for n in self._wide(names) if n not in used)
            spec[place] = (*spec[place], *new)
            used.update(new)

        outer = [axis[0][0][0] if len(axis) == 1 else "" for axis in axes]
        skip = outer[:1] == ["layers"]
        if skip:
            take(0, TABLE["layers"])
        # Only a stack of matrices belongs to its experts; the router's scores are everybody's.
        if len(axes) >= skip + 3 and outer[skip] == "experts":
            take(skip, TABLE["experts"])
        runs = [[_run(segment) for segment in axis] for axis in axes]
        cut = [place for place, axis in enumerate(runs) if any(axis)]
        for axis in axes:
            self.local_sizes(axis)
        stored = [place for place, name in enumerate(outer) if name in STORED]
        matrix = len(axes) >= skip + 2
        tensor = self.mesh.shape["tensor"]
        dealt = cut[0] if cut and tensor > 1 else None
        if dealt is not None and matrix and len(runs[dealt]) == 1:
            (run,) = runs[dealt]
            if run is not None and run.before == 1 and run.size % tensor == 0:
                take(dealt, ("tensor",))
                dealt = None
        if matrix and stored:
            take(stored[0], (*TABLE[outer[stored[0]]], "tensor"))
        for place, names in enumerate(spec):
            whole = prod(size for _, size in axes[place][0]) if len(axes[place]) == 1 else 1
            if whole % self.size(*names):
                product = " * ".join(f"{name}={self.mesh.shape[name]}" for name in names)
                raise ShardingError(f"{outer[place]} = {whole}: must be a multiple of {product}")
        return _Cut(tuple(spec), dealt)

    def spec(self, axes: Sequence[Described]) -> PartitionSpec:
        """Where a parameter rests.

        Args:
            axes: of the array. One with a single axis is whole everywhere: it is smaller than a message is worth.

        Raises:
            ShardingError: an axis is not a multiple of the devices that share it.
        """
        return PartitionSpec(*(names if names else None for names in self._cut(axes).spec))

    def sharding(self, axes: Sequence[Described]) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes))

    def shares(self, axes: Sequence[Described]) -> int:
        """Into how many parts an array is cut at rest."""
        return prod(self.size(*names) for names in self._cut(axes).spec)

    def shares_at_hand(self, axes: Sequence[Described]) -> int:
        """Into how many parts it is cut where it is used; what neighbours of `tensor` have copies of counts as cut."""
        tensor = self.mesh.shape["tensor"] if any(_run(s) for axis in axes for s in axis) else 1
        return tensor * (1 if _experts(axes, 0) is None else self.size("expert"))

    def share(self, x: Array, axes: Sequence[Described]) -> Array:
        """What this device computes with, of a parameter at rest; call it under ``shard_map``.

        Axes that are cut for storage are gathered; those of `tensor` keep this device's share of every segment; a stack
        of experts keeps the device's own.

        Args:
            x: this device's share at rest, without a leading axis of layers where ``axes`` have one.
            axes: of the whole array.
        """
        cut, drop = self._cut(axes), len(axes) - x.ndim
        spec, dealt = list(cut.spec[drop:]), None if cut.dealt is None else cut.dealt - drop
        tensor = self.mesh.shape["tensor"]
        if dealt is not None:
            x = _deal(x, axes[dealt + drop], dealt, tensor)
            holder = next((i for i, names in enumerate(spec) if "tensor" in names), None)
            if holder is None:
                own = x.shape[dealt] // tensor
                x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("tensor") * own, own, dealt)
            else:
                # The other axis is cut over `tensor` at rest: columns travel to their device, rows come from all.
                x = jax.lax.all_to_all(x, "tensor", dealt, holder, tiled=True)
                spec[holder] = tuple(name for name in spec[holder] if name != "tensor")
        for place, names in enumerate(spec):
            kept = any(_run(segment) for segment in axes[place + drop])
            gathered = tuple(
                n for n in names if not (kept and n == "tensor") and place != _experts(axes, drop)
            )
            if gathered:
                x = jax.lax.all_gather(x, gathered, axis=place, tiled=True)
        return checkpoint_name(x, GATHERED)

    def partial(self, axis: Described) -> bool:
        """Whether a product over ``axis`` is a part of the sum on each device of `tensor`."""
        return self.mesh.shape["tensor"] > 1 and any(_run(segment) for segment in axis)

    def local_sizes(self, axis: Described) -> list[int]:
        """Sizes of the segments of ``axis`` on one device of `tensor`."""
        tensor, sizes = self.mesh.shape["tensor"], []
        for segment in axis:
            run = _run(segment)
            whole = prod(size for _, size in segment)
            sizes.append(whole if run is None else run.before * run.local(tensor) * run.after)
        return sizes

    def sum_rows(self, x: Any) -> Any:
        """Sums over the devices that see other tokens."""
        return jax.lax.psum(x, self.rows) if self.rows else x

    def sum_tokens(self, x: Any, *before: Array) -> Any:
        """Sums over the devices that see other tokens, or score other tokens of the same rows: those along ``stage``.

        Not before ``before`` is there, where that matters (`in_turn`).
        """
        axes = (*self.rows, *self._wide(("stage",)))
        if not axes:
            return x
        total = partial(jax.lax.psum, axis_name=axes)
        return in_turn(total, x, *before) if self.in_turn else total(x)

    def sum_tensor(self, x: Any) -> Any:
        """Sums over the devices that share a layer's matrices."""
        return jax.lax.psum(x, "tensor") if self.mesh.shape["tensor"] > 1 else x

    def sum_gradients(self, grads: Any, specs: Any) -> Any:
        """Gradients of the sum of all devices' objectives, of parameters at rest.

        Where a parameter is cut, differentiating `share` has already summed; over every other mesh axis it has copies.
        """

        def total(grad: Array, spec: PartitionSpec) -> Array:
            cut = {name for names in spec for name in ((names,) if isinstance(names, str) else names or ())}
            copies = tuple(name for name in self._wide(self.mesh.axis_names) if name not in cut)
            return jax.lax.psum(grad, copies) if copies else grad

        if not self.in_turn:
            return jax.tree.map(total, grads, specs)
        order = iter(jax.tree.leaves(specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec)))
        return in_turn(lambda grad: total(grad, next(order)), grads)


def _experts(axes: Sequence[Described], drop: int) -> int | None:
    """Place of the experts in a stack of matrices without its layers, else None."""
    skip = axes[0][0][0][0] == "layers"
    if len(axes) >= skip + 3 and axes[skip][0][0][0] == "experts":
        return skip - drop
    return None


def _deal(x: Array, axis: Described, place: int, shares: int) -> Array:
    """``x`` with ``axis`` reordered so that each of ``shares`` devices' part of every segment stands together."""
    bounds = [sum(prod(size for _, size in s) for s in axis[:i]) for i in range(1, len(axis))]
    parts = []
    for part, segment in zip(jnp.split(x, bounds, axis=place), axis, strict=True):
        run = _run(segment)
        lead, rest = part.shape[:place], part.shape[place + 1 :]
        if run is None:
            part = jnp.broadcast_to(jnp.expand_dims(part, place), (*lead, shares, part.shape[place], *rest))
        else:
            own = run.local(shares)
            part = part.reshape(*lead, run.before, run.size, run.after, *rest)
            part = jnp.repeat(part, own * shares // run.size, axis=place + 1)
            part = part.reshape(*lead, run.before, shares, own * run.after, *rest)
            part = jnp.moveaxis(part, place + 1, place).reshape(*lead, shares, -1, *rest)
        parts.append(part)
    joined = jnp.concatenate(parts, axis=place + 1)
    return joined.reshape(*x.shape[:place], -1, *x.shape[place + 1 :])

"""Context parallelism in training: the rows of a step scattered over devices along ``context``, planned ahead."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jax.sharding import PartitionSpec as P

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig, one_of, positive_fields, require
from jaxllm.data.unread import UnreadBatch
from parallel.context import SCATTER_STRATEGIES, Capacity, Placed, Room, ScatterConfig, Scattered, scatter
from parallel.mesh import ROWS, SLOTS, MeshShape, held, place_whole

# Batches that a run begins with room for.
FORESEEN = 16


@dataclass(frozen=True)
class ContextSettings:
    """How the documents of a step are shared by the devices along ``context``.

    Attributes:
        strategy: fcp, fcp-pairs, ring, zigzag, document or ulysses.
        block: tokens of a block.
        exchange: how keys and values travel: "rotate" runs everywhere, "ragged" sends no more than needed, on GPUs and TPUs.
        stage_rounds: rounds of communication that travel at once.
    """

    strategy: str = "fcp"
    block: int = 4096
    exchange: str = "rotate"
    stage_rounds: int = 16

    def __post_init__(self) -> None:
        one_of("context.strategy", self.strategy, *SCATTER_STRATEGIES)
        one_of("context.exchange", self.exchange, "rotate", "ragged")
        positive_fields(self, "context", "block", "stage_rounds")


@runtime_checkable
class Batches(Protocol):
    """What training needs of :class:`jaxllm.data.loader.Loader`: batches without end, and a place to go on from."""

    def __next__(self) -> PackedBatch: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Unreading(Protocol):
    """What of :class:`jaxllm.data.loader.Loader` lets a process plan batches of which it reads a part."""

    def next_unread(self) -> UnreadBatch: ...


class Slots(NamedTuple):
    """A scattered batch: what the step takes as its batch, and beside it."""

    batch: PackedBatch
    scattered: Scattered


class Scatterer:
    """Makes slots of whole batches; its room grows with what it has seen, so that most batches need no other program."""

    def __init__(self, cfg: ModelConfig, settings: ContextSettings, mesh: Any, parts: int = 1):
        """See :func:`parallel.context.scatter`.

        Args:
            cfg: the model.
            settings: strategy and blocks.
            mesh: of all devices.
            parts: microbatches of a step.
        """
        self.mesh = mesh
        self.room: Room | None = None
        self.config = ScatterConfig(
            workers=mesh.shape["context"],
            groups=int(np.prod([mesh.shape[axis] for axis in ROWS])),
            parts=parts,
            block=settings.block,
            strategy=settings.strategy,
            backend=settings.exchange,
            stage_rounds=settings.stage_rounds,
            reach=reach(cfg),
            window=sight(cfg),
        )

    def grow(self, batch: PackedBatch | UnreadBatch) -> None:
        """Makes room for a batch, for what comes later.

        Raises:
            ConfigError: as calling this does.
        """
        # Without the margin of what is outgrown in training: several batches are foreseen, and none is compiled for yet.
        alone = self._scattered(batch, None).room
        self.room = alone if self.room is None else alone.enlarged(self.room)

    def _scattered(self, batch: PackedBatch | UnreadBatch, room: Room | None) -> Placed:
        config, (rows, length) = self.config, batch.shape
        check_share(config.block, rows, length, config.groups, config.parts, config.workers)
        return scatter(np.asarray(batch.segment_ids), config, room)

    def __call__(self, batch: PackedBatch | UnreadBatch) -> Slots:
        """Slots of a whole batch, NumPy leaves; tokens, targets and weights are there where devices of this process hold them.

        Args:
            batch: every process plans all of it, and reads the tokens of its own slots only where they are still unread.

        Raises:
            ConfigError: as :func:`check_share`.
            ValueError: positions do not count from each segment's first token.
        """
        placed = self._scattered(batch, self.room)
        self.room = placed.room
        here = placed.source >= 0
        if (np.asarray(batch.positions).reshape(-1)[placed.source[here]] != placed.positions[here]).any():
            raise ValueError("batch.positions: must count from each segment's first token")
        own = here & held(self.mesh, P(SLOTS), len(placed.source))[:, None]
        places = placed.source[own]

        def filled(values: np.ndarray, fill: int) -> np.ndarray:
            out = np.full((*own.shape, *values.shape[1:]), fill, values.dtype)
            out[own] = values
            return out

        def taken(x: Any, fill: int = 0) -> np.ndarray | None:
            if x is None:
                return None
            x = np.asarray(x)
            return filled(x.reshape(-1, *x.shape[2:])[places], fill)

        if isinstance(batch, PackedBatch):
            tokens, targets = taken(batch.tokens), taken(batch.targets, -1)
            depths = 1 if batch.targets is None else batch.targets.shape[-1]
        else:
            tokens, targets = (filled(x, fill) for x, fill in zip(batch.read(places), (0, -1)))
            depths = batch.depths
        slots = PackedBatch(
            tokens=tokens,
            segment_ids=placed.segment_ids,
            positions=placed.positions,
            targets=targets,
            loss_mask=taken(batch.loss_mask),
        )
        further = taken(_further_weights(batch.segment_ids, batch.loss_mask, depths - 1))
        return Slots(slots, replace(placed.scattered, ahead=further))

    def room_of(self, found: dict[str, Any] | None) -> Room | None:
        """A room as plain values, if it is one for these devices and blocks."""
        if found is None:
            return None
        capacity = found["capacity"] | {"shifts": tuple(found["capacity"]["shifts"])}
        made = Room(Capacity(**capacity), found["extra"])
        config = self.config
        heads = config.strategy == "ulysses"
        workers, stage_rounds = (1, 16) if heads else (config.workers, config.stage_rounds)
        own = workers, config.block, stage_rounds, config.window
        of = made.capacity
        fits = own == (of.workers, of.block, of.stage_rounds, of.window)
        shifts = 0 if heads or config.backend != "rotate" else config.workers - 1
        whole = not heads or made.capacity.slots % config.workers == 0
        return made if fits and whole and len(made.capacity.shifts) == shifts else None

    def place(self, slots: Slots) -> Slots:
        """The same on the devices."""
        batch = place_whole(self.mesh, slots.batch, P(SLOTS))
        return Slots(batch, place_whole(self.mesh, slots.scattered, slots.scattered.specs()))


def check_context(cfg: ModelConfig, shape: MeshShape, settings: ContextSettings) -> None:
    """Raise ConfigError unless the devices along ``context`` can share the model's documents so."""
    if shape.context == 1 or settings.strategy != "ulysses" or not set("*W") & set(cfg.letters):
        return
    assert cfg.attention is not None
    shares = shape.context * shape.tensor
    for name in ("num_heads", "num_kv_heads"):
        size = getattr(cfg.attention, name)
        require(
            size % shares == 0,
            "context.strategy",
            settings.strategy,
            f"needs attention.{name}={size} to be a multiple of mesh.context * mesh.tensor = {shape.context} * "
            f"{shape.tensor}; other strategies do not",
        )


def check_share(block: int, rows: int, length: int, groups: int, parts: int, workers: int) -> None:
    """Raise ConfigError unless the rows of a step cut into equal parts, in which every device has a block of tokens.

    Args:
        block: tokens of a block.
        rows: of a step.
        length: tokens of a row.
        groups: of devices that share rows.
        parts: microbatches.
        workers: devices of a group.
    """
    product = f"{' * '.join(ROWS)} * accum_steps = {groups} * {parts}"
    require(rows % (groups * parts) == 0, "batch_size", rows, f"must be a multiple of {product}")
    own = rows * length // (groups * parts * workers)
    require(
        block <= own, "context.block", block, f"must be at most the {own} tokens of a device in a microbatch"
    )


def _further_weights(segment_ids: Any, loss_mask: Any, depths: int) -> np.ndarray | None:
    """f32[B, T, K]; what :func:`jaxllm.train.mtp.ahead` gives for the K further tokens; None: nothing to weigh."""
    if not depths or loss_mask is None:
        return None
    ids, weights = np.asarray(segment_ids), np.asarray(loss_mask)
    found = np.repeat(weights[..., None], depths, axis=-1)
    for steps in range(1, min(depths, ids.shape[1] - 1) + 1):
        inside = ids[:, steps:] == ids[:, :-steps]
        found[:, :-steps, steps - 1] = np.where(inside, weights[:, steps:], weights[:, :-steps])
    return found


def reach(cfg: ModelConfig) -> int | None:
    """Most inputs that a convolution of the model looks back; None: no layer has a state."""
    mixers = {"M": cfg.mamba, "G": cfg.delta, "J": cfg.jet}
    widths = [mixer.conv_kernel for letter, mixer in mixers.items() if mixer and letter in cfg.letters]
    return max(widths) - 1 if widths else None


def sight(cfg: ModelConfig) -> int | None:
    """Keys that a query of the model's widest attention sees, itself included; None: all before it in its document.

    A model without attention sees no key but its own, so that only its tokens are balanced and none is planned to travel.
    """
    if "*" in cfg.letters:
        return None
    if "W" not in cfg.letters:
        return 1
    assert cfg.attention is not None
    return cfg.attention.window


class Ahead:
    """Whole batches of a loader as slots, each planned by a thread while the one before it is trained on."""

    def __init__(self, loader: Batches, scatterer: Scatterer):
        """Reads nothing yet.

        Args:
            loader: of whole batches, in every process; of one that is :class:`Unreading` a process reads only its own tokens.
            scatterer: plans them.
        """
        self.loader, self.scatterer = loader, scatterer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="context plans")
        self._coming: Future[tuple[Slots, dict[str, Any], Room]] | None = None
        self._state: dict[str, Any] | None = None

    def _next(self) -> PackedBatch | UnreadBatch:
        """The loader's next batch, its tokens still unread if it can."""
        return self.loader.next_unread() if isinstance(self.loader, Unreading) else next(self.loader)

    def _made(self) -> tuple[Slots, dict[str, Any], Room]:
        if self.scatterer.room is None:
            # Room for the next batches at once: with what each alone asks for the first of them would all be compiled.
            begin = self.loader.state()
            for _ in range(FORESEEN):
                self.scatterer.grow(self._next())
            self.loader.restore(begin)
        slots = self.scatterer(self._next())
        assert self.scatterer.room is not None
        return slots, self.loader.state(), self.scatterer.room

    def __next__(self) -> Slots:
        """The next batch; the one after it is begun."""
        coming = self._coming or self._thread.submit(self._made)
        slots, loader, room = coming.result()
        self._state = loader | {"context": asdict(room)}
        self._coming = self._thread.submit(self._made)
        return slots

    def state(self) -> dict[str, Any]:
        """Of the loader before the batch that comes next, and the room, so that a resumed run is the same to the bit."""
        return self.loader.state() if self._state is None else self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where ``state`` was taken; what another mesh or strategy had room for is left.

        Raises:
            LoaderStateError: as the loader.
        """
        if self._coming is not None:
            self._coming.result()
            self._coming = None
        loader = {name: value for name, value in state.items() if name != "context"}
        self.loader.restore(loader)
        self._state = state
        self.scatterer.room = self.scatterer.room_of(state.get("context"))

    def close(self) -> None:
        """Ends the thread."""
        self._coming = None
        self._thread.shutdown(cancel_futures=True)

"""One saved step on disk: its names, its metadata, its arrays."""

import asyncio
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.config import ConfigError, ModelConfig
from jaxllm.hf.deferred import Deferred

# Where arrays are written alone: what is encoded and compressed at once, and the size of the files.
CHUNK_BYTES = 2**24


class CheckpointError(RuntimeError):
    """No checkpoint can be used, or one cannot be written."""


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _leaves(item, f"{path}{key}.").items()}
    return {path.removesuffix("."): value}


def check_model(saved: dict[str, Any], cfg: ModelConfig) -> None:
    """Raise ConfigError, naming every differing field, unless ``saved`` is the configuration ``cfg``.

    Compute precision may differ: it changes rounding, not what the parameters mean.
    """
    before, now = _leaves(saved), _leaves(cfg.to_dict())
    names = [n for n in {**before, **now} if not n.startswith("precision.")]
    missing = object()
    differing = [n for n in names if before.get(n, missing) != now.get(n, missing)]
    if differing:
        listed = "; ".join(
            f"{n} was {before.get(n, 'not there')!r}, is {now.get(n, 'not there')!r}" for n in differing
        )
        raise ConfigError(
            f"the checkpoint is of another model: {listed}. Resume with the configuration of the first run, "
            "or train in a new folder."
        )


def flatten_named(tree: Any) -> dict[str, Any]:
    """As :func:`jaxllm.model.functional.flatten`, also through dataclasses and named tuples."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(_key(k) for k in path): leaf for path, leaf in flat}


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs, as warnings, that a part of a checkpoint was opened by itself; here that is intended."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def regions(shape: Sequence[int], piece: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The pieces that an array of ``shape`` is stored in, as indices; the last one of an axis may be smaller."""
    axes = [
        [slice(start, min(start + step, size)) for start in range(0, size, step)]
        for size, step in zip(shape, piece, strict=True)
    ]
    return itertools.product(*axes)


def one_by_one() -> Any:
    """An Orbax handler of states with :class:`Deferred` leaves: each is read, written and let go before the next.

    Of each, one stored piece at a time, so that what lies beside an array, copied or encoded, does not grow with it: in
    general none of the pieces lies in one run of the array's memory.
    """
    import orbax.checkpoint as ocp
    import tensorstore as ts
    from orbax.checkpoint import future

    class Arrays(ocp.type_handlers.NumpyHandler):
        async def _open_and_write(self, value: np.ndarray, tspec: dict[str, Any], ts_context: Any) -> None:
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            # Known of every array that is open, which its type does not say.
            piece: Any = store.chunk_layout.write_chunk.shape
            for region in regions(value.shape, piece):
                await store[region].write(value[region], can_reference_source_data_indefinitely=True)

    arrays = Arrays(deepcopy_host_arrays=False)
    pieces = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)

    class Handler(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            async def write() -> None:
                for value, info in zip(values, infos):
                    for written in await arrays.serialize([value.value()], [info], [pieces]):
                        await asyncio.to_thread(written.result)

            return [future.CommitFutureAwaitingContractedSignals(write(), name="deferred")]

    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (Deferred, Handler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def read_arrays(folder: Path, target: dict[str, Any]) -> dict[str, Any]:
    """The leaves that ``target`` names, of one saved step; others are not read."""
    import orbax.checkpoint as ocp

    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or single
        )

    item = {name: placed(leaf) for name, leaf in target.items()}
    args = ocp.checkpoint_utils.construct_restore_args(item)
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True),
        )


def read_array(folder: Path, name: str, dtype: np.dtype) -> np.ndarray:
    """One leaf of one saved step in ``dtype``, in the memory of the host."""
    import orbax.checkpoint as ocp

    args = ocp.args.PyTreeRestore(
        item={name: 0}, restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
    )
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder / "state", args=args)[name].astype(dtype, copy=False)


def read_meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta" / "metadata").read_text())


def check_names(folder: Path, target: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        metadata = reader.metadata(folder / "state").item_metadata
    saved = {name: tuple(leaf.shape) for name, leaf in metadata.tree.items()}
    wanted = {name: tuple(leaf.shape) for name, leaf in target.items()}
    wrong = [n for n in {**saved, **wanted} if saved.get(n) != wanted.get(n)]
    if wrong:
        listed = "; ".join(f"{n}: saved {saved.get(n)}, expected {wanted.get(n)}" for n in wrong[:5])
        raise CheckpointError(
            f"{folder} does not fit this run ({len(wrong)} arrays differ: {listed}). Use the model and optimiser "
            "settings of the first run (weight_decay=0 and >0 keep different state)."
        )

"""Checkpoints of a run: saved in the background, verified when read, exact when resumed.

<folder>/steps/<step>/         Orbax: ``state`` (arrays) and ``meta`` (JSON)
<folder>/manifests/<step>.json checksums, written when the save has completed
<folder>/damaged/              what a resumed run found broken and set aside
"""

import importlib.metadata
import shutil
import threading
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.config import ModelConfig, require
from jaxllm.hf.deferred import Deferred
from jaxllm.model.functional import Params, abstract_params, flatten, map_named, unstack
from jaxllm.train.seal import damage, seal
from jaxllm.train.state import TrainState, master_config
from jaxllm.train.stored import (
    CHUNK_BYTES,
    CheckpointError,
    check_model,
    check_names,
    flatten_named,
    one_by_one,
    read_array,
    read_arrays,
    read_meta,
)
from parallel.distributed import agreed

PARAMS = "params."


@dataclass(frozen=True)
class Restored:
    """A checkpoint in memory: ``step`` batches have been trained on."""

    step: int
    state: TrainState
    meta: dict[str, Any]


def versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint; missing packages are left out."""
    found = {}
    for name in ("jaxllm", "jax", "flax", "optax", "orbax-checkpoint"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _steps_under(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


class Checkpoints:
    """The checkpoints in one folder.

    A save goes on in the background: device arrays are copied out before ``save`` returns, so the state may be
    donated to the next step at once. Killed at any moment, the folder holds at least the last sealed checkpoint.
    """

    def __init__(
        self, folder: Path | str, *, max_to_keep: int = 3, background: bool = True, alone: bool = False
    ):
        """Reads nothing and writes nothing yet.

        Args:
            folder: created by the first save.
            max_to_keep: newest checkpoints that stay; at least 2, or a kill during a save could leave none.
            background: False makes ``save`` return when the checkpoint is complete.
            alone: this process writes the whole state, NumPy leaves, without the other processes of the run.

        Raises:
            ValueError: ``max_to_keep`` is below 2, or the path has a bracket (ConfigError).
        """
        if max_to_keep < 2:
            raise ValueError(
                f"max_to_keep={max_to_keep}: must be at least 2, so that a save never replaces the only one"
            )
        self.folder = Path(folder).absolute()
        # Orbax looks for its parts with a glob over the whole path: below such a folder it finds none, and a checkpoint
        # that cannot be read comes out without an error.
        require("[" not in str(self.folder), "folder", str(self.folder), "must be a path without '['")
        self.max_to_keep = max_to_keep
        self.background = background
        self.alone = alone
        self._manager: Any = None
        self._sealer: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def _steps(self) -> Path:
        return self.folder / "steps"

    def _manifest(self, step: int) -> Path:
        return self.folder / "manifests" / f"{step}.json"

    def steps(self) -> list[int]:
        """Steps of the sealed checkpoints, oldest first; their contents are not verified."""
        return [step for step in _steps_under(self._steps) if self._manifest(step).is_file()]

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Start saving; waits for the save before.

        Args:
            step: batches trained on.
            state: any placement; it may be donated after the call. Leaves may be :class:`jaxllm.hf.deferred.Deferred`
                if those of the first save are: each is read when it is its turn.
            meta: JSON values; versions are added.

        Raises:
            CheckpointError: the save before this one failed (disk full, no permission).
        """
        self.wait()
        import orbax.checkpoint as ocp

        deferred = any(isinstance(leaf, Deferred) for leaf in jax.tree.leaves(state))
        if self._manager is None:
            several = ocp.options.MultiprocessingOptions()
            if self.alone:
                rank = jax.process_index()
                several = ocp.options.MultiprocessingOptions(
                    primary_host=rank, active_processes={rank}, barrier_sync_key_prefix=f"alone{rank}"
                )
            # With a list of processes Orbax leaves the folder to its caller.
            self._steps.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.max_to_keep, multiprocessing_options=several, create=not self.alone
            )
            handlers: dict[str, Any] = {"item_names": ("state", "meta")}
            if deferred:
                handlers = {"item_handlers": {"state": one_by_one(), "meta": ocp.JsonCheckpointHandler()}}
            self._manager = ocp.CheckpointManager(self._steps, options=options, **handlers)
        args = ocp.args.Composite(
            # Encoded bytes wait in memory until a file of them is full.
            state=ocp.args.PyTreeSave(
                flatten_named(state), ocdbt_target_data_file_size=CHUNK_BYTES if deferred else None
            ),
            meta=ocp.args.JsonSave({**meta, "versions": versions()}),
        )
        self._manager.save(step, args=args, force=True)
        self._sealer = threading.Thread(target=self._finish, args=(step,), name=f"seal-{step}")
        self._sealer.start()
        if not self.background:
            self.wait()

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if self.alone or jax.process_index() == 0:
                seal(self._steps / str(step), self._manifest(step))
                kept = set(_steps_under(self._steps))
                for manifest in self._manifest(step).parent.glob("*.json"):
                    if int(manifest.stem) not in kept:
                        manifest.unlink()
        except BaseException as error:  # handed to the training thread by wait()
            self._failure = error

    def wait(self) -> None:
        """Return when the last save is complete and sealed.

        Raises:
            CheckpointError: it failed.
        """
        if self._sealer is not None:
            self._sealer.join()
            self._sealer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise CheckpointError(
                f"saving to {self.folder} failed: {failure}. Free space or fix the permissions there, then resume: "
                f"the newest complete checkpoint is step {max(self.steps(), default=None)}."
            ) from failure

    def close(self) -> None:
        """Wait, then let go of Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _newest_sound(self, repair: bool) -> int | None:
        """The newest step whose files are as they were sealed; warns of the damaged ones that it passes over."""
        for step in reversed(_steps_under(self._steps)):
            folder = self._steps / str(step)
            fault = damage(folder, self._manifest(step))
            if fault is None:
                return step
            warnings.warn(f"checkpoint {folder} is not usable: {fault}; trying the one before", stacklevel=3)
            if repair:
                self._clear(step)
        return None

    def _clear(self, step: int) -> None:
        """Make way for the resumed run, which will reach ``step`` again; what was complete once is kept aside."""
        folder = self._steps / str(step)
        if self._manifest(step).is_file():
            target = self.folder / "damaged" / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
            self._manifest(step).unlink()
        else:
            shutil.rmtree(folder)

    def restore_latest(
        self, target: TrainState, cfg: ModelConfig | None = None, *, repair: bool = True
    ) -> Restored | None:
        """The newest sound checkpoint, bit-exact; None where no save was ever completed.

        Args:
            target: arrays or ShapeDtypeStructs; their shardings say where to put the state.
            cfg: refuse a checkpoint of another model.
            repair: delete unfinished saves and move damaged checkpoints to ``damaged``, so that their steps can be
                saved again; False when only looking.

        Raises:
            ConfigError: the checkpoint is of another model; the message names the fields.
            CheckpointError: there are checkpoints, and every one is damaged, or it has other parameters or optimiser
                state than ``target``.
        """
        self.wait()
        # One process looks and repairs; the others follow it.
        leads = jax.process_index() == 0
        sealed = len(self.steps()) if leads else 0
        found = self._newest_sound(repair) if leads else None
        step, sealed = agreed(-1 if found is None else found, sealed)
        if step < 0:
            if sealed:
                raise CheckpointError(
                    f"every checkpoint in {self._steps} is damaged (see the warnings); restore the folder from a "
                    "copy, or train in a new one"
                )
            return None
        folder = self._steps / str(step)
        meta = read_meta(folder)
        if cfg is not None:
            check_model(meta["model"], cfg)
        names = flatten_named(target)
        check_names(folder, names)
        leaves = read_arrays(folder, names)
        treedef = jax.tree_util.tree_structure(target)
        return Restored(step, jax.tree_util.tree_unflatten(treedef, [leaves[name] for name in names]), meta)

    def _sound_meta(self) -> tuple[Path, dict[str, Any]]:
        step = self._newest_sound(repair=False)
        if step is None:
            raise CheckpointError(
                f"no usable checkpoint in {self._steps}; train first, or give the folder of a run"
            )
        return self._steps / str(step), read_meta(self._steps / str(step))

    def load_config(self) -> ModelConfig:
        """The model of the newest sound checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        return ModelConfig.from_dict(self._sound_meta()[1]["model"])

    def load_params(self, *, deferred: bool = False) -> tuple[ModelConfig, Params, dict[str, Any]]:
        """(configuration, parameters, meta) of the newest sound checkpoint; reads no optimiser state.

        Parameters have one entry per layer, however the run held them.

        Args:
            deferred: leave them on disk, as :class:`jaxllm.hf.deferred.Deferred`. Those of a run with scan_layers lie
                there stacked, so they are read all the same.

        Raises:
            CheckpointError: there is none.
        """
        folder, meta = self._sound_meta()
        cfg = ModelConfig.from_dict(meta["model"])
        target = abstract_params(master_config(cfg))
        if deferred and not cfg.scan_layers:

            def later(name: str, leaf: Any, like: Any) -> Deferred:
                return Deferred(leaf.shape, np.dtype(like.dtype), partial(read_array, folder, PARAMS + name))

            return cfg, map_named(later, target, abstract_params(cfg)), meta
        leaves = read_arrays(folder, {PARAMS + name: leaf for name, leaf in flatten(target).items()})
        treedef = jax.tree_util.tree_structure(target)
        params = jax.tree_util.tree_unflatten(treedef, [leaves[PARAMS + name] for name in flatten(target)])
        # Masters are float32; some parameters stay so whatever the precision.
        params = jax.tree.map(lambda p, like: p.astype(like.dtype), params, abstract_params(cfg))
        return *unstack(cfg, params), meta

"""Checkpoints of a run: saved in the background, verified when read, exact when resumed.

<folder>/steps/<step>/         Orbax: ``state`` (arrays) and ``meta`` (JSON)
<folder>/manifests/<step>.json checksums, written when the save has completed
<folder>/damaged/              what a resumed run found broken and set aside
"""

import importlib.metadata
import json
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxllm.config import ConfigError, ModelConfig
from jaxllm.model.functional import Params, abstract_params, flatten
from jaxllm.train.seal import damage, seal
from jaxllm.train.state import TrainState, master_config

PARAMS = "params."


class CheckpointError(RuntimeError):
    """No checkpoint can be used, or one cannot be written."""


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


def _steps_under(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


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


def _read(folder: Path, target: dict[str, Any]) -> dict[str, Any]:
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


def _read_meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta" / "metadata").read_text())


class Checkpoints:
    """The checkpoints in one folder.

    A save goes on in the background: device arrays are copied out before ``save`` returns, so the state may be
    donated to the next step at once. Killed at any moment, the folder holds at least the last sealed checkpoint.
    """

    def __init__(self, folder: Path | str, *, max_to_keep: int = 3, background: bool = True):
        """Reads nothing and writes nothing yet.

        Args:
            folder: created by the first save.
            max_to_keep: newest checkpoints that stay; at least 2, or a kill during a save could leave none.
            background: False makes ``save`` return when the checkpoint is complete.

        Raises:
            ValueError: ``max_to_keep`` is below 2.
        """
        if max_to_keep < 2:
            raise ValueError(
                f"max_to_keep={max_to_keep}: must be at least 2, so that a save never replaces the only one"
            )
        self.folder = Path(folder).absolute()
        self.max_to_keep = max_to_keep
        self.background = background
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
            state: any placement; it may be donated after the call.
            meta: JSON values; versions are added.

        Raises:
            CheckpointError: the save before this one failed (disk full, no permission).
        """
        self.wait()
        import orbax.checkpoint as ocp

        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=self.max_to_keep)
            self._manager = ocp.CheckpointManager(self._steps, options=options, item_names=("state", "meta"))
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(flatten_named(state)),
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
            if jax.process_index() == 0:
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
        sealed = self.steps()
        step = self._newest_sound(repair)
        if step is None:
            if sealed:
                raise CheckpointError(
                    f"every checkpoint in {self._steps} is damaged (see the warnings); restore the folder from a "
                    "copy, or train in a new one"
                )
            return None
        folder = self._steps / str(step)
        meta = _read_meta(folder)
        if cfg is not None:
            check_model(meta["model"], cfg)
        names = flatten_named(target)
        _check_names(folder, names)
        leaves = _read(folder, names)
        treedef = jax.tree_util.tree_structure(target)
        return Restored(step, jax.tree_util.tree_unflatten(treedef, [leaves[name] for name in names]), meta)

    def load_params(self) -> tuple[ModelConfig, Params, dict[str, Any]]:
        """(configuration, parameters, meta) of the newest sound checkpoint; reads no optimiser state.

        Raises:
            CheckpointError: there is none.
        """
        step = self._newest_sound(repair=False)
        if step is None:
            raise CheckpointError(
                f"no usable checkpoint in {self._steps}; train first, or give the folder of a run"
            )
        meta = _read_meta(self._steps / str(step))
        cfg = ModelConfig.from_dict(meta["model"])
        target = abstract_params(master_config(cfg))
        leaves = _read(
            self._steps / str(step), {PARAMS + name: leaf for name, leaf in flatten(target).items()}
        )
        treedef = jax.tree_util.tree_structure(target)
        params = jax.tree_util.tree_unflatten(treedef, [leaves[PARAMS + name] for name in flatten(target)])
        # Masters are float32; some parameters stay so whatever the precision.
        params = jax.tree.map(lambda p, like: p.astype(like.dtype), params, abstract_params(cfg))
        return cfg, params, meta


def _check_names(folder: Path, target: dict[str, Any]) -> None:
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

"""``jaxllm.load``: a model from whatever folder holds one."""

from pathlib import Path

from jaxllm.config import ConfigError, ModelConfig, require
from jaxllm.model.functional import LanguageModel


def checkpoints_in(folder: Path) -> Path | None:
    """The folder of checkpoints that ``folder`` is or has."""
    return next((place for place in (folder, folder / "checkpoints") if (place / "steps").is_dir()), None)


def load_checkpoint(folder: Path, *, deferred: bool = False) -> LanguageModel:
    """The newest sound checkpoint of a run folder, or of its ``checkpoints``, with the tokenizer that lies beside it.

    Args:
        folder: of a run.
        deferred: as in :meth:`jaxllm.train.checkpoint.Checkpoints.load_params`.

    Raises:
        CheckpointError: none is sound.
    """
    from jaxllm.data.tokenizer import Tokenizer
    from jaxllm.train.checkpoint import Checkpoints

    place = checkpoints_in(folder)
    require(place is not None, "folder", str(folder), "holds no checkpoints")
    assert place is not None
    cfg, params, _ = Checkpoints(place).load_params(deferred=deferred)
    model = LanguageModel(cfg, params)
    run = place.parent if place.name == "checkpoints" else place
    for beside in (run, run / "hf"):
        if (beside / "tokenizer.json").is_file():
            model.tokenizer = Tokenizer.load(beside)
            model.chat_template = model.tokenizer.chat_template
            break
    return model


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration of the model that :func:`load` would give; no weights are read.

    Raises:
        ConfigError, CheckpointError: as :func:`load`.
    """
    from jaxllm import hf

    place = _place(Path(folder))
    if (place / "steps").is_dir():
        from jaxllm.train.checkpoint import Checkpoints

        return Checkpoints(place).load_config()
    return hf.config_from_hf(hf.read_config(place))


def load(folder: str | Path) -> LanguageModel:
    """A model from a Hugging Face folder, or from a run folder of ``jaxllm train``, ``quickstart`` or ``convert``.

    Of a run it is the exported one (``hf/``), or else the newest sound checkpoint.

    Raises:
        ConfigError: ``folder`` holds no model.
        CheckpointError: what it holds is damaged.
    """
    from jaxllm import hf

    place = _place(Path(folder))
    return load_checkpoint(place) if (place / "steps").is_dir() else hf.load(place)


def _place(folder: Path) -> Path:
    """The Hugging Face folder or the folder of checkpoints that ``folder`` is or has, in the order of :func:`load`."""
    require(folder.is_dir(), "folder", str(folder), "there is no such folder")
    if (folder / "hf" / "config.json").is_file():
        return folder / "hf"
    # A run has a config.json of jaxllm's own beside its checkpoints.
    checkpoints = checkpoints_in(folder)
    if checkpoints is not None:
        return checkpoints
    if (folder / "config.json").is_file():
        return folder
    raise ConfigError(
        f"folder={str(folder)!r}: holds neither config.json (Hugging Face) nor hf/ or checkpoints/ (a run of jaxllm); "
        "give the folder that has one of them"
    )

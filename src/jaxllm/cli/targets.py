"""A preset's name or a model's folder, as people write it, to its configuration."""

import json
from pathlib import Path

from jaxllm.cli.errors import UserError
from jaxllm.config import ModelConfig

NO_PRESET = "a preset's name or the folder of a checkpoint"


def config_of(target: str) -> ModelConfig:
    """The configuration behind a preset's name, a Hugging Face folder, or a run's or checkpoint's folder.

    Raises:
        UserError: a folder without config.json.
        ConfigError: no such preset, or a config.json that jaxllm does not understand.
    """
    folder = Path(target)
    if not folder.exists():
        if "/" in target or target.startswith("."):
            raise UserError("target", target, NO_PRESET, "There is no such folder.")
        from jaxllm.presets import preset

        return preset(target)
    for file in (folder / "config.json", folder / "hf" / "config.json"):
        if file.is_file():
            return _read(file)
    raise UserError(
        "target",
        target,
        NO_PRESET,
        "The folder has no config.json; name a Hugging Face folder or a run's folder.",
    )


def _read(file: Path) -> ModelConfig:
    from jaxllm.hf.config import config_from_hf

    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("target", str(file), f"a JSON file ({error})") from None
    return config_from_hf(data) if "model_type" in data else ModelConfig.from_dict(data)

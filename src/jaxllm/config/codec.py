"""Configurations as JSON and back."""

import math
import types
import typing
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

from jaxllm.config.checks import require


def encode(config: Any) -> dict[str, Any]:
    """JSON-able form of a dataclass; infinities are the string "inf"."""
    return _encode(asdict(config))


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return "inf" if value == math.inf else value


def _dataclass_of(annotation: Any) -> type | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and is_dataclass(o)), None)


def decode(cls: type, data: Any, path: str = "") -> Any:
    """Build the dataclass ``cls`` from nested dictionaries, with errors that name the field's path.

    Raises:
        ConfigError: a field that ``cls`` does not have, or one without a default that is missing.
    """
    require(isinstance(data, dict), path or cls.__name__, data, "must be a mapping of fields")
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(data) - set(known))
    require(
        not unknown,
        path + (unknown[0] if unknown else ""),
        "unknown field",
        f"{cls.__name__} has {', '.join(known)}",
    )
    missing = [
        n for n, f in known.items() if n not in data and f.default is MISSING and f.default_factory is MISSING
    ]
    require(not missing, path + (missing[0] if missing else ""), "missing", f"{cls.__name__} needs it")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in data.items():
        inner = _dataclass_of(hints[name])
        if inner is not None and value is not None:
            value = decode(inner, value, f"{path}{name}.")
        elif isinstance(value, list):
            value = tuple(math.inf if item == "inf" else item for item in value)
        elif value == "inf":
            value = math.inf
        values[name] = value
    return cls(**values)

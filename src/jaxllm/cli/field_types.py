"""Types of plain values checked against a dataclass before it is built, so that a message can name the field's path."""

import types
import typing
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jaxllm.config import ConfigError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def checked(cls: type, data: Any, path: str = "") -> dict[str, Any]:
    """``data``, which has only fields of ``cls``, each with a value of its type; whole numbers become floats where needed.

    Args:
        cls: a dataclass.
        data: nested dictionaries, lists and scalars, as YAML gives them.
        path: of ``data``, with a dot at its end.

    Raises:
        ConfigError: names the field's path, what was given and what is allowed.
    """
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path.rstrip('.') or cls.__name__}={data!r}: must be fields and values, one per line"
        )
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    values = {}
    for name, value in data.items():
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"{path}{name}: there is no such field; {hint}allowed are {', '.join(known)}")
        values[name] = _checked_value(hints[name], value, f"{path}{name}")
    return values


def _options(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _checked_value(hint: Any, value: Any, path: str) -> Any:
    options = _options(hint)
    nested = next((o for o in options if isinstance(o, type) and is_dataclass(o)), None)
    if nested is not None and isinstance(value, dict):
        return checked(nested, value, f"{path}.")
    for option in options:
        if _fits(option, value):
            return _as(option, value)
    raise ConfigError(f"{path}={value!r}: must be {' or '.join(_describe(option) for option in options)}")


def _as(option: Any, value: Any) -> Any:
    if option is float and isinstance(value, int):
        return float(value)
    if typing.get_origin(option) is tuple:
        inner = typing.get_args(option)
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return [_as(kind, item) for kind, item in zip(kinds, value)]
    return value


def _fits(option: Any, value: Any) -> bool:
    if option is Any:
        return True
    if option is None or option is type(None):
        return value is None
    origin = typing.get_origin(option)
    if origin is typing.Literal:
        return value in typing.get_args(option)
    if origin is tuple:
        inner = typing.get_args(option)
        same = len(inner) == 2 and inner[1] is Ellipsis
        return (
            isinstance(value, list | tuple)
            and (same or len(value) == len(inner))
            and all(_fits(inner[0] if same else inner[i], item) for i, item in enumerate(value))
        )
    if option is float:
        return (isinstance(value, int | float) and not isinstance(value, bool)) or value == "inf"
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if option is Path:
        return isinstance(value, str | Path)
    return isinstance(option, type) and isinstance(value, option)


def _describe(option: Any) -> str:
    if option is None or option is type(None):
        return "null"
    if typing.get_origin(option) is typing.Literal:
        return " or ".join(map(str, typing.get_args(option)))
    if typing.get_origin(option) is tuple:
        inner = [a for a in typing.get_args(option) if a is not Ellipsis]
        return f"a list such as [{', '.join(_describe(a) for a in inner)}]"
    if isinstance(option, type) and is_dataclass(option):
        return f"fields of {option.__name__} ({', '.join(f.name for f in fields(option))})"
    return _WORDS.get(option, getattr(option, "__name__", str(option)))

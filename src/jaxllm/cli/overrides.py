"""``name.field=value`` on the command line, applied to nested dictionaries of plain values."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import yaml

from jaxllm.cli.errors import UserError


def apply(data: dict[str, Any], changes: Sequence[str], argument: str = "--set") -> dict[str, Any]:
    """A copy of ``data`` with values replaced; what the names may be is for the dataclass to check.

    Args:
        data: nested dictionaries.
        changes: ``path.to.field=value`` each; the value is read as YAML, so 1e-3, true, null and [1, 2] work.
        argument: the flag that the changes came with, for messages.

    Raises:
        UserError: not of that form, a value that is no YAML, or a path through something that has no fields.
    """
    data = deepcopy(data)
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path or "" in path.split("."):
            raise UserError(
                argument, change, "NAME=VALUE, with dots for nested names", f"For example: {argument} seed=1"
            )
        *owners, name = path.split(".")
        place = data
        for depth, owner in enumerate(owners):
            inner = place.get(owner)
            if inner is None:
                inner = place[owner] = {}
            if not isinstance(inner, dict):
                raise UserError(
                    argument, change, f"{'.'.join(owners[: depth + 1])} is {inner!r} and has no fields"
                )
            place = inner
        place[name] = parse_value(text, argument, change)
    return data


def parse_value(text: str, argument: str, change: str) -> Any:
    """A YAML scalar or list; unlike YAML 1.1, 1e-3 is a number."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(argument, change, f"a YAML value ({type(error).__name__})") from None
    return _as_number(value) if isinstance(value, str) else value


def _as_number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def numbers(value: Any) -> Any:
    """``value`` with every string that spells a float, such as YAML 1.1's 1e-3, as that float; "inf" stays text."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    if isinstance(value, str) and any(character.isdigit() for character in value):
        return _as_number(value)
    return value

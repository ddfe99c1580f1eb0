"""How a configuration is refused."""

from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the field, what was given and what is allowed."""


def require(condition: bool, name: str, given: Any, allowed: str) -> None:
    """Raise ConfigError unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{name}={given!r}: {allowed}")


def positive(**values: int) -> None:
    """Raise ConfigError unless every value is an integer of at least 1."""
    for name, value in values.items():
        require(isinstance(value, int) and value >= 1, name, value, "must be an integer of at least 1")


def positive_fields(config: Any, prefix: str, *names: str, optional: tuple[str, ...] = ()) -> None:
    """:func:`positive` for fields of ``config``, called ``prefix.name``; the ``optional`` ones may be None."""
    given = (name for name in optional if getattr(config, name) is not None)
    positive(**{f"{prefix}.{name}": getattr(config, name) for name in (*names, *given)})


def one_of(name: str, given: str, *allowed: str) -> None:
    """Raise ConfigError unless ``given`` is one of ``allowed``."""
    *first, last = allowed
    require(given in allowed, name, given, f"{', '.join(first)} or {last}")

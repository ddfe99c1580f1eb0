"""``--kv-dtype``, ``--page-size``, ``--policy`` and ``--policy-set``: how the cache is kept and read, by name."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from jaxllm.cli.errors import UserError
from jaxllm.cli.field_types import checked
from jaxllm.cli.overrides import apply

if TYPE_CHECKING:
    from jaxllm.cache.policies import Policy


def policies() -> "dict[str, type[Policy]]":
    """Name on the command line to class."""
    from jaxllm.cache import policies as known

    named = {name.lower(): getattr(known, name) for name in known.__all__ if name != "Policy"}
    return {"dense": known.Policy, **named}


def policy_of(name: str | None, changes: Sequence[str]) -> "Policy | None":
    """The policy of that name, with settings changed.

    Args:
        name: of :func:`policies`, in any case; None: none is asked for.
        changes: ``setting=value`` each.

    Raises:
        UserError: no such policy, settings without a policy, or a setting that only Python can give.
        ConfigError: no such setting, or a value that it may not have.
    """
    if name is None:
        if changes:
            raise UserError("--policy-set", changes[0], "only with --policy", _listed())
        return None
    cls = policies().get(name.lower())
    if cls is None:
        raise UserError("--policy", name, " or ".join(policies()))
    data = apply({}, changes, "--policy-set")
    if "overrides" in data:
        raise UserError(
            "--policy-set", "overrides", "one policy for all layers, and dense_layers", "Use Python."
        )
    values = checked(cls, data, "policy.")
    # A tuple comes as a list.
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _listed() -> str:
    return f"Policies are {', '.join(policies())}"


def settings_of(policy: "Policy | None") -> dict[str, Any] | None:
    """Name and settings as plain values; None where there is none."""
    if policy is None:
        return None
    named = {field.name: getattr(policy, field.name) for field in fields(policy) if field.name != "overrides"}
    return {"name": type(policy).__name__, **named}

"""Conversations as text: a checkpoint's own Jinja chat template, rendered as transformers renders it.

Templates come with downloaded checkpoints and are not trusted: they run in jinja2's sandbox and see plain data only.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jaxllm.config import ConfigError, require

# Names under which reasoning is passed; templates read the first, some the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    template: str,
    messages: Sequence[Any],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """A conversation as the text that the model was trained on.

    Args:
        template: Jinja source.
        messages: dictionaries with "role" and "content"; whatever else the template reads ("tool_calls",
            "reasoning_content"). Values None are left out.
        add_generation_prompt: end with the beginning of an answer.
        variables: what else the template knows: special tokens, ``tools``, ``documents``, ``enable_thinking``,
            ``truncate_history_thinking``, ``reasoning_budget``.

    Raises:
        ConfigError: no messages, something that is no JSON value, or what the template says or does wrong.
    """
    from jinja2.exceptions import TemplateError

    require(
        isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0,
        "messages",
        messages,
        "must hold at least one message",
    )
    turns = [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]
    given = {"tools": None, "documents": None}
    given |= {name: _plain(name, value) for name, value in variables.items()}
    compiled = _compiled(template)
    try:
        return compiled.render(messages=turns, add_generation_prompt=add_generation_prompt, **given)
    except TemplateError as error:
        raise ConfigError(f"chat template: {error.message or type(error).__name__}") from error
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        # Python's own errors inside the template: messages of a form that it does not expect.
        raise ConfigError(
            f"chat template: {type(error).__name__}: {error}; the messages or variables are not what it expects"
        ) from error


def _message(name: str, message: Any) -> dict[str, Any]:
    require(isinstance(message, Mapping), name, message, 'must be a dictionary with "role" and "content"')
    require("role" in message, name, dict(message), 'must have a "role"')
    plain = {key: value for key, value in _plain(name, message).items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(name: str, value: Any) -> Any:
    """A copy of JSON values: a template shall not meet methods of richer objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(name, key): _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{index}]", item) for index, item in enumerate(value)]
    raise ConfigError(f"{name}={value!r}: must be a JSON value, not {type(value).__name__}")


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    from jinja2.exceptions import TemplateSyntaxError

    try:
        return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat template (line {error.lineno}): {error.message}") from error


@functools.cache
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant wrote; it is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PublicNamespace(Namespace):
        """A namespace whose names give no way into Python's own attributes, as in transformers."""

        def __init__(*args: Any, **values: Any) -> None:
            # The variadic self leaves the name "self" to templates.
            self, *rest = args
            names = dict(*rest, **values)
            for name in names:
                _public(name)
            Namespace.__init__(self, names)

        def __setitem__(self, name: str, value: Any) -> None:
            _public(name)
            Namespace.__setitem__(self, name, value)

    def _public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")

    class Dictionaries:
        """``dict`` without its type."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dictionaries(),
        "namespace": PublicNamespace,
    }
    return environment

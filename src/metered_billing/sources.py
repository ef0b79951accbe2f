"""Where settings come from: the environment, `.env`, AWS SSM. A name that is no setting is refused, wherever it stands.

What stands there may be a secret, or have one in it, so that errors name the setting and its source, never its value.
"""

import io
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from dotenv.parser import parse_stream

from metered_billing.ssm import Parameters, ParametersUnreadable

PREFIX = "METERED_BILLING_"

CODE = "code"
ENVIRONMENT = "environment"
SSM = "SSM"
DEFAULT = "default"

ELSEWHERE = frozenset({"TOKENS", "ADMIN_TOKEN", "FOREIGN_TOKEN"})
"""Variables of the command line and of the credits service."""

_DEMO = "DEMO_"

_WORD = re.compile(r"\w*", re.ASCII)

# What Kubernetes puts there for each service whose name begins with ours.
_OF_A_SERVICE = re.compile(
    r"([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


class InvalidSettings(ValueError):
    """A setting cannot be right, cannot be read, or is none. Names it and its source, never its value."""


@dataclass(frozen=True, slots=True)
class Found:
    """A setting's value.

    Attributes:
        source: `code`, `environment`, the file's name, `SSM` or `default`.
        name: What it is called there, for errors.
    """

    value: Any
    source: str
    name: str


def from_environment(settings: Collection[str], environ: Mapping[str, str]) -> dict[str, Found]:
    """Variables that begin with `METERED_BILLING_`, in whatever case."""
    # Capitals come last, and win over other spellings.
    ours = {name: environ[name] for name in sorted(environ, reverse=True) if not _OF_A_SERVICE.fullmatch(_bare(name))}
    return _variables(settings, ours, ENVIRONMENT, "in the environment")


def from_file(settings: Collection[str], file: Path) -> dict[str, Found]:
    """The same out of a `.env`; other names in it are somebody else's."""
    if not (file.is_file() or file.is_fifo()):
        return {}
    try:
        # A pipe can be read only once; and some editors begin a file with a mark that would become part of a name.
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidSettings(f"{file} cannot be read: {why}") from None
    for binding in parse_stream(io.StringIO(text)):
        # Without its =, a value is taken for a part of the name.
        bare = _bare(binding.key or "") if binding.value is None else ""
        if binding.error or (bare and bare.lower() not in settings):
            whole = binding.original.string
            line = binding.original.line + whole[: len(whole) - len(whole.lstrip())].count("\n")
            raise InvalidSettings(f"{file} cannot be read: line {line} is no NAME=VALUE")
    found = dotenv_values(stream=io.StringIO(text))
    return _variables(settings, found, str(file), f"in {file}")


def from_ssm(settings: Collection[str], parameters: Parameters, asked_by: str) -> dict[str, Found]:
    """The parameters under the prefix that `asked_by` names. Their names are the settings', in small letters."""
    try:
        values = parameters.read()
    except ParametersUnreadable as error:
        raise InvalidSettings(f"{asked_by}: {error}") from None
    found: dict[str, Found] = {}
    for name, value in values.items():
        path = f"{parameters.prefix}/{name} in AWS SSM"
        if name not in settings:
            raise InvalidSettings(f"{path} is no setting{_meant(name.lower(), settings, '')}")
        found[name] = _filled(Found(value, SSM, path))
    return found


def _variables(
    settings: Collection[str], variables: Mapping[str, str | None], source: str, where: str
) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for name, value in variables.items():
        bare = _bare(name)
        if not bare or bare in ELSEWHERE or bare.startswith(_DEMO):
            continue
        if bare.lower() not in settings:
            word = _WORD.match(name)[0]  # type: ignore[index] # behind another sign there may be a value
            shown = word if word == name else f"{word}…"
            raise InvalidSettings(f"{shown} {where} is no setting{_meant(_bare(word).lower(), settings, PREFIX)}")
        found[bare.lower()] = _filled(Found(value, source, f"{name} {where}"))
    return found


def _bare(name: str) -> str:
    """The name in capitals, without the prefix; nothing, where it has another."""
    capitals = name.upper()
    return capitals.removeprefix(PREFIX) if capitals.startswith(PREFIX) else ""


def _filled(found: Found) -> Found:
    if not found.value:
        raise InvalidSettings(f"{found.name} is empty: give it a value, or remove it")
    return found


def _meant(name: str, settings: Collection[str], prefix: str) -> str:
    close = get_close_matches(name, settings, n=1)
    if not close:
        return f"; there are {', '.join(_as_there(each, prefix) for each in settings)}"
    return f"; did you mean {_as_there(close[0], prefix)}?"


def _as_there(setting: str, prefix: str) -> str:
    return prefix + setting.upper() if prefix else setting

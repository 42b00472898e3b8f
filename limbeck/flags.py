"""Command-line flags made from configurations: names, types, ranges and descriptions come from the fields."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from limbeck.core.config import FieldInfo, fields_of
from limbeck.core.errors import InputError, nearest

_ABSENT = object()
NONE_WORDS = ("none", "null")


def add_flags(
    parser: argparse.ArgumentParser, title: str, model: type[BaseModel], paper: Mapping[str, Any] | None = None
) -> None:
    """One flag for every field. Values stay text; validation is pydantic's, so that the errors are too."""
    group = parser.add_argument_group(title)
    for info in fields_of(model):
        if info.is_bool:
            group.add_argument(
                info.flag,
                dest=info.name,
                action=argparse.BooleanOptionalAction,
                default=_ABSENT,
                help=_help(info, paper),
            )
        elif info.is_sequence:
            group.add_argument(
                info.flag, dest=info.name, nargs="*", default=_ABSENT, metavar=_metavar(info), help=_help(info, paper)
            )
        else:
            group.add_argument(
                info.flag, dest=info.name, default=_ABSENT, metavar=_metavar(info), help=_help(info, paper)
            )


def parse_strictly(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; an unknown flag is an error that proposes the nearest ones.

    Raises:
        InputError: an unknown flag or a stray word.
    """
    options, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        near = nearest(unknown[0], flags) if unknown[0].startswith("-") else []
        tail = f"; did you mean {' or '.join(near)}?" if near else f" (see: {parser.prog} --help)"
        raise InputError(f"unknown {'flag' if unknown[0].startswith('-') else 'argument'} {unknown[0]}{tail}")
    return options


def given(options: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    """The fields of ``model`` that were given on the command line."""
    found = {}
    for name in model.model_fields:
        value = getattr(options, name, _ABSENT)
        if value is not _ABSENT:
            absent = isinstance(value, str) and value.lower() in NONE_WORDS and value not in _words(model, name)
            found[name] = None if absent else value
    return found


def _words(model: type[BaseModel], name: str) -> tuple[Any, ...]:
    """The words that a field takes literally, "none" perhaps among them."""
    annotation = model.model_fields[name].annotation
    members = (annotation, *typing.get_args(annotation))
    return tuple(word for m in members if typing.get_origin(m) is Literal for word in typing.get_args(m))


def _metavar(info: FieldInfo) -> str:
    kind = info.type.split(" or ")[0]
    if kind.startswith("one of "):
        return "{" + kind.removeprefix("one of ").replace(", ", ",") + "}"
    return {"a list of strs": "NAME", "a list of floats": "X"}.get(
        kind, {"str": "TEXT", "int": "N", "float": "X"}.get(kind, "VALUE")
    )


def _help(info: FieldInfo, paper: Mapping[str, Any] | None) -> str:
    parts = [p for p in (info.range, f"default {_text(info.default)}") if p]
    if paper and info.name in paper:
        parts.append(f"paper {_text(paper[info.name])}")
    return f"{info.description} ({'; '.join(parts)})".replace("%", "%%").strip()


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) or "none"
    return str(value)

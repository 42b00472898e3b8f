"""Validated hyper-parameters.

A configuration is a frozen pydantic model. Field descriptions are the command line's ``--help``, bounds are checked at
construction, and named presets carry a paper's published values.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticUndefined

from limbeck.core.errors import InputError, UnknownNameError, nearest

T = TypeVar("T", bound=BaseModel)


class Config(BaseModel):
    """Base of every configuration: frozen, strict about unknown names, with named presets.

    ``presets`` maps a preset's name to the values that differ from the defaults. ``small`` (the defaults) always exists.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def make(cls, preset: str = "small", /, **overrides: Any) -> Self:
        """The preset's values with ``overrides`` on top.

        Raises:
            UnknownNameError: no such preset.
            InputError: a value out of range or an unknown field; one line that names it and its range.
        """
        return validate(cls, {**cls.preset_values(preset), **overrides})

    @classmethod
    def preset_values(cls, preset: str) -> dict[str, Any]:
        known = {"small": {}, **cls.presets}
        if preset not in known:
            raise UnknownNameError("preset", preset, known, hint=f"Known: {', '.join(known)}.")
        return dict(known[preset])

    def replace(self, **overrides: Any) -> Self:
        """A copy with some values changed, validated again."""
        return validate(type(self), {**self.model_dump(), **overrides})


@dataclass(frozen=True)
class FieldInfo:
    """One hyper-parameter as people see it."""

    name: str
    type: str
    default: Any
    range: str
    description: str
    is_bool: bool
    is_sequence: bool
    required: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def fields_of(cls: type[BaseModel]) -> Iterator[FieldInfo]:
    """The fields of a configuration, in order of definition, with readable types and ranges."""
    for name, field in cls.model_fields.items():
        annotation = field.annotation
        default = None if field.default is PydanticUndefined else field.default
        if field.default_factory is not None:
            default = field.get_default(call_default_factory=True)
        members = _members(annotation)
        yield FieldInfo(
            name=name,
            type=_type_name(annotation),
            default=default,
            range=_range(field.metadata),
            description=field.description or "",
            is_bool=bool in members and not any(m in (str, int, float) for m in members),
            is_sequence=any(typing.get_origin(m) in (tuple, list) for m in members),
            required=field.is_required(),
        )


def validate(cls: type[T], values: Mapping[str, Any], *, flags: bool = False) -> T:
    """``cls(**values)``, with pydantic's error turned into one line.

    With ``flags`` the line speaks of command-line flags (``--label-noise``) instead of fields (``label_noise``).
    """
    try:
        return cls(**values)
    except ValidationError as error:
        raise InputError(_explain(cls, error, flags)) from None


def _explain(cls: type[BaseModel], error: ValidationError, flags: bool) -> str:
    infos = {f.name: f for f in fields_of(cls)}
    parts = []
    for item in error.errors():
        where = str(item["loc"][0]) if item["loc"] else ""
        name = "--" + where.replace("_", "-") if flags else where
        if item["type"] == "extra_forbidden":
            near = nearest(where, infos)
            tail = (
                f"; did you mean {' or '.join('--' + n.replace('_', '-') if flags else n for n in near)}?"
                if near
                else ""
            )
            parts.append(f"unknown {'flag' if flags else 'setting'} {name}{tail}")
            continue
        if not where:
            parts.append(item["msg"].removeprefix("Value error, "))
            continue
        info = infos[where]
        if item["type"] == "value_error":
            parts.append(f"{name}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})")
        else:
            wanted = " ".join(w for w in (info.type, info.range) if w)
            parts.append(f"{name} must be {wanted} (got {item['input']!r})")
    return "; ".join(dict.fromkeys(parts))


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _type_name(annotation: Any) -> str:
    names = []
    for member in _members(annotation):
        origin = typing.get_origin(member)
        if member is type(None):
            names.append("none")
        elif origin is Literal:
            names.append("one of " + ", ".join(map(str, typing.get_args(member))))
        elif origin in (tuple, list):
            names.append("a list of " + _type_name(typing.get_args(member)[0]) + "s")
        else:
            names.append(getattr(member, "__name__", str(member)))
    return " or ".join(names)


def _range(metadata: list[Any]) -> str:
    words = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}
    bounds = [
        text.format(getattr(m, key))
        for m in metadata
        for key, text in words.items()
        if getattr(m, key, None) is not None
    ]
    return " and ".join(bounds)

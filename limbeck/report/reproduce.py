"""How to make a run again, from its config: the settings that differ from the defaults, and the command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from limbeck import catalogue
from limbeck.core.errors import UnknownNameError

_DISPLAY_ONLY = ("progress",)


@dataclass(frozen=True)
class Setting:
    """One setting of a run.

    Attributes:
        name: the field.
        value: as run, in JSON's types.
        default: under the run's preset.
        known: False where the defaults could not be found out.
        description: what it does.
    """

    name: str
    value: Any
    default: Any = None
    known: bool = False
    description: str = ""

    @property
    def differs(self) -> bool:
        return self.known and self.value != self.default


@dataclass(frozen=True)
class Settings:
    """All settings of a run, by part, and whether the catalogue knows the method."""

    setup: list[Setting] | None
    config: list[Setting]
    engine: list[Setting]
    in_catalogue: bool
    preset: str = "small"
    seed: int = 0
    method: str = ""
    sequences: frozenset[str] = field(default_factory=frozenset)


def settings_of(config: Mapping[str, Any]) -> Settings:
    """A run's settings beside their defaults.

    Defaults come from the method's class. Where it cannot be had (not in the catalogue, an optional library absent, or an
    unknown preset) they are unknown, and nothing is said to differ.
    """
    name = str(config.get("method") or "")
    card = catalogue.cards().get(name)
    preset = str(config.get("preset", "small"))
    hyper: dict[str, tuple[Any, str]] = {}
    around: dict[str, tuple[Any, str]] = {}
    sequences: set[str] = set()
    if card is not None:
        try:
            cls: Any = card.load()
            changed = cls.Config.preset_values(preset)
        except (ImportError, UnknownNameError):
            cls = None
        if cls is not None:
            hyper, first = _defaults(cls.Config, changed)
            around, second = _defaults(cls.Setup, {})
            sequences = first | second
    from limbeck.core.engine import EngineConfig  # imports torch, so only when a report is written

    execution, third = _defaults(EngineConfig, {})
    setup = config.get("setup")
    return Settings(
        setup=None if setup is None else _beside(setup, around),
        config=_beside(config.get("config") or {}, hyper),
        engine=_beside(config.get("engine") or {}, execution),
        in_catalogue=card is not None,
        preset=preset,
        seed=int(config.get("seed", 0)),
        method=name,
        sequences=frozenset(sequences | third),
    )


def command(settings: Settings) -> str | None:
    """The ``limbeck run`` command with only what differs from the defaults, or None if no command can make the run."""
    if settings.setup is None or not settings.in_catalogue:
        return None
    words = ["limbeck", "run", settings.method]
    if settings.preset != "small":
        words += ["--preset", settings.preset]
    if settings.seed != 0:
        words += ["--seed", str(settings.seed)]
    for setting in (*settings.setup, *settings.config, *settings.engine):
        if (setting.differs or not setting.known) and setting.name not in _DISPLAY_ONLY:
            words += _flag(setting, setting.name in settings.sequences)
    return " ".join(shlex.quote(word) for word in words)


def call(settings: Settings) -> str:
    """The ``limbeck.fit`` call of a run on a program's own objects; ``…`` stands for what only that program has."""
    own = repr(settings.method) if settings.in_catalogue else "YourMethod"
    words = [own, "data", "student=…", "teacher=…", "val=…", "test=…"]
    if settings.preset != "small":
        words.append(f"preset={settings.preset!r}")
    if settings.seed != 0:
        words.append(f"seed={settings.seed}")
    words += [f"{s.name}={s.value!r}" for s in settings.config if s.differs or not s.known]
    engine = {s.name: s.value for s in settings.engine if s.differs and s.name not in _DISPLAY_ONLY}
    if engine:
        words.append(f"engine={engine!r}")
    return f"limbeck.fit({', '.join(words)})"


def _defaults(cls: Any, changed: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, str]], set[str]]:
    from limbeck.core.config import fields_of

    infos = list(fields_of(cls))
    found = {info.name: (_plain(changed.get(info.name, info.default)), info.description) for info in infos}
    return found, {info.name for info in infos if info.is_sequence}


def _beside(values: Mapping[str, Any], defaults: Mapping[str, tuple[Any, str]]) -> list[Setting]:
    return [
        Setting(name, value, *((defaults[name][0], True, defaults[name][1]) if name in defaults else ()))
        for name, value in values.items()
    ]


def _plain(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value, default=str))


def _flag(setting: Setting, sequence: bool) -> list[str]:
    flag = "--" + setting.name.replace("_", "-")
    value = setting.value
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if sequence and isinstance(value, list):
        return [flag, *map(_word, value)]
    word = "none" if value is None else _word(value)
    return [f"{flag}={word}"] if word.startswith("-") else [flag, word]


def _word(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)

"""Configurations: one-line errors that name field, value and range; presets; readable fields."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from limbeck.core.config import Config, fields_of, validate
from limbeck.core.errors import InputError, UnknownNameError


class Example(Config):
    temperature: float = Field(4.0, gt=0, le=20, description="softens")
    kind: Literal["a", "b"] = Field("a", description="which")
    widths: tuple[int, ...] = Field((1, 2), description="sizes")
    flag: bool = Field(False, description="on or off")
    steps: int | None = Field(None, ge=1, description="how many")

    presets = {"paper": {"temperature": 1.0}}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"temperature": -1}, "temperature must be float > 0 and <= 20 (got -1)"),
        ({"kind": "c"}, "kind must be one of a, b (got 'c')"),
        ({"steps": "x"}, "steps must be int or none >= 1 (got 'x')"),
        ({"temprature": 1}, "unknown setting temprature; did you mean temperature?"),
        ({"widths": ["q"]}, "widths must be a list of ints (got 'q')"),
    ],
)
def test_errors_are_one_line_with_name_range_and_value(values, line):
    with pytest.raises(InputError) as error:
        validate(Example, values)
    assert str(error.value) == line


def test_errors_speak_of_flags_on_the_command_line():
    with pytest.raises(InputError, match=r"^--temperature must be float > 0 and <= 20 \(got '0'\)$"):
        validate(Example, {"temperature": "0"}, flags=True)


def test_presets_and_overrides():
    assert Example.make().temperature == 4.0
    assert Example.make("paper").temperature == 1.0
    assert Example.make("paper", temperature=2.0).temperature == 2.0
    with pytest.raises(UnknownNameError, match="unknown preset 'papers'; did you mean paper"):
        Example.make("papers")
    with pytest.raises(InputError):
        Example.make().replace(temperature=99)


def test_fields_read_well():
    infos = {f.name: f for f in fields_of(Example)}
    assert infos["temperature"].flag == "--temperature" and infos["temperature"].range == "> 0 and <= 20"
    assert infos["flag"].is_bool and infos["widths"].is_sequence and not infos["steps"].is_bool


def test_every_method_describes_every_setting():
    from limbeck import catalogue

    for card in catalogue.cards().values():
        cls = card.load()
        for model in (cls.Config, cls.Setup):
            for info in fields_of(model):
                assert info.description, f"{card.name}: {info.name} has no description"
        for preset in cls.Config.presets:
            cls.Config.make(preset)


def test_none_is_a_word_where_a_flag_takes_it_and_nothing_elsewhere() -> None:
    import argparse

    from limbeck.core.config import Config
    from limbeck.flags import add_flags, given

    class Own(Config):
        kind: Literal["none", "some"] = "some"
        size: int | None = 3

    parser = argparse.ArgumentParser()
    add_flags(parser, "own", Own)
    assert given(parser.parse_args(["--kind", "none", "--size", "none"]), Own) == {"kind": "none", "size": None}

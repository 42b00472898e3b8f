"""Self-contained HTML pages: one base template, one style sheet, everything inline."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import limbeck
from limbeck.core.files import write_text

TEMPLATES = Path(__file__).with_name("templates")


@functools.cache
def environment() -> Environment:
    """The templates, with autoescape on for everything."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["minus"] = lambda text: str(text).replace("-", "\N{MINUS SIGN}")
    made.filters["capitalize_first"] = lambda text: str(text)[:1].upper() + str(text)[1:]
    made.globals["asset"] = _asset
    made.globals["version"] = limbeck.__version__
    return made


def write_page(target: Path, template: str, **context: Any) -> Path:
    """Render a template and write it atomically; returns where.

    Raises:
        RunError: the file cannot be written.
    """
    write_text(target, environment().get_template(template).render(**context))
    return target


def _asset(name: str) -> Markup:
    """A style sheet or script of ours, put into the page as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))

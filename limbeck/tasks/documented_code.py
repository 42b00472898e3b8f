"""Docstrings and the bodies under them, from Python's own standard library: texts and code that belong together, in every installation.

:mod:`limbeck.tasks.code` makes a harder task of the same source: there a query is a docstring's first sentence, and names are masked.
"""

from __future__ import annotations

import ast
import json
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

from filelock import FileLock

from limbeck.core.errors import InputError
from limbeck.core.files import write_text
from limbeck.tasks.base import cache_folder
from limbeck.tasks.code import Function, distinct, library_files
from limbeck.tasks.tokens import MARK, HashTokenizer, pieces, words_of

RECIPE = 1  # part of the cache's name: raise it when pairs are read differently
LEAST_DOCSTRING, LEAST_WORDS = 40, 5
_DOCUMENTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def documented_pairs() -> list[Function]:
    """Functions and classes of the standard library with their whole docstring as query and their body as code.

    Docstrings have more than 40 characters, bodies at least five words. Bodies that nearly repeat an earlier one are left out
    (:func:`limbeck.tasks.code.distinct`), and docstrings that repeat one. From the cache folder where they are there.

    Raises:
        InputError: the sources of the library are not there.
    """
    path = cache_folder() / "code" / f"docstrings-{platform.python_version()}-{RECIPE}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            root = Path(sysconfig.get_paths()["stdlib"])
            found = distinct_pairs([pair for file in library_files(root) for pair in _pairs_in_file(file, root)])
            if not found:
                raise InputError(f"no documented code under {root}: this Python has no standard library in source form")
            write_text(path, json.dumps([astuple(pair) for pair in found]))
        return [Function(*entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def pairs_of(source: str, module: str) -> Iterator[Function]:
    """Every function and class of a source with a long enough docstring and body, in the order of the source.

    Raises:
        SyntaxError: ``source`` is no Python.
    """
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, _DOCUMENTED)]
    for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset)):
        docstring = ast.get_docstring(node)
        if docstring is None or len(docstring) <= LEAST_DOCSTRING or not word_pieces(docstring):
            continue
        body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
        if len(word_pieces(body)) >= LEAST_WORDS:
            yield Function(module, node.lineno, docstring, body)


def distinct_pairs(pairs: list[Function]) -> list[Function]:
    """The pairs whose code resembles none before it, and whose text equals none before it."""
    if not pairs:
        return []
    tokenizer = HashTokenizer()
    kept = [pairs[n] for n in distinct([tokenizer.tokens(pair.code)[0] for pair in pairs])]
    first = {tuple(word_pieces(pair.query)): pair for pair in reversed(kept)}
    return [pair for pair in kept if first[tuple(word_pieces(pair.query))] is pair]


def word_pieces(text: str) -> list[str]:
    """The words of a text or code, split on case, underscores and digits, in lower case; masked names are left out."""
    return [piece for word in words_of(text) if word != MARK for piece in pieces(word.rstrip(MARK))]


def _pairs_in_file(file: Path, root: Path) -> list[Function]:
    parts = file.relative_to(root).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
    try:
        with tokenize.open(file) as opened:
            return list(pairs_of(opened.read(), module))
    except (SyntaxError, UnicodeDecodeError):  # templates and deliberately broken files
        return []

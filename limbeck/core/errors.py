"""Errors that a user can act on.

Every error that is the user's to mend derives from :class:`LimbeckError` and carries one line that names the thing and
the remedy. The command line prints that line and exits with 2; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LimbeckError(Exception):
    """Something the user can mend. ``str(error)`` is one line."""


class InputError(LimbeckError, ValueError):
    """A wrong value: shape, range, path, file content, class count."""


class UnknownNameError(LimbeckError, LookupError):
    """A name that is not in a catalogue; the message proposes the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name = kind, name
        self.near = nearest(name, known)
        tail = f"; did you mean {' or '.join(self.near)}?" if self.near else "."
        super().__init__(f"unknown {kind} '{name}'{tail}{' ' + hint if hint else ''}")


class MissingDependencyError(LimbeckError, ImportError):
    """An optional library is needed for what was asked."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {library}: pip install 'limbeck[{extra}]'")


class TrainingDiverged(LimbeckError):
    """A loss term became NaN or infinite."""


class RunError(LimbeckError):
    """A run directory cannot be written, read or resumed."""


class Interrupted(LimbeckError):
    """The user stopped the run; its last step is on disk."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Up to ``n`` known names that look like ``name``, best first."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    if not close and len(name) >= 3:  # a part of a longer path is near too: 'conv' for 'stem.conv'
        close = [k for k in known if name in k][:n]
    return close

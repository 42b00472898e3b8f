"""What a run by name distils between fields: a saved field or a task's reference field, and a student of another family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from limbeck.core.artifacts import load
from limbeck.core.errors import InputError
from limbeck.rendering.fields import FAMILIES, VolumeField
from limbeck.tasks.reference_fields import reference_field
from limbeck.tasks.scenes import SceneSetup, SceneTask


class FieldPairSetup(SceneSetup):
    """A scene, a teacher of it and a student."""

    student: str = Field("mlp", description=f"family of the student: {', '.join(FAMILIES)}")
    student_options: tuple[str, ...] = Field((), description="its sizes, such as depth=8 width=128")
    teacher: tuple[str, ...] = Field((), description="folder of a saved field; none: a reference field of the task")
    teacher_family: str = Field("hash", description="family of the reference field")
    teacher_options: tuple[str, ...] = Field((), description="its sizes, such as levels=8")
    teacher_steps: int = Field(1000, ge=1, description="updates of its training on the views; it is cached")


def field_teacher(setup: FieldPairSetup, task: SceneTask, progress: bool = True) -> VolumeField:
    """The saved field that a setup names, or the task's reference field.

    Raises:
        InputError: several teachers, or something that is no field. RunError: nothing there.
    """
    if len(setup.teacher) > 1:
        raise InputError(f"one teacher is distilled, not {len(setup.teacher)}: {', '.join(setup.teacher)}")
    if not setup.teacher:
        options = read_options(setup.teacher_options)
        return reference_field(task, setup.teacher_family, options, steps=setup.teacher_steps, progress=progress)
    found = load(Path(setup.teacher[0]).expanduser()).content
    if not isinstance(found, VolumeField):
        raise InputError(f"{setup.teacher[0]} holds no field, but {type(found).__name__}")
    return found


def read_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``("depth=8", "combine=sum")`` as keyword arguments; values are read as JSON where they are that.

    Raises:
        InputError: an entry without a name and a value.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (name and sign and value):
            raise InputError(f"a field's size is given as name=value, such as depth=8 (got '{pair}')")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found

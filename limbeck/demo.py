"""``limbeck demo``: a teacher on real digits, the small student alone, and the same student distilled, side by side."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from limbeck.core.engine import EngineConfig
from limbeck.core.files import write_json
from limbeck.fitting import fit
from limbeck.report.run import write_run_report
from limbeck.report.tables import result_table
from limbeck.tasks.base import TaskConfig, load_task
from limbeck.tasks.judging import judge_classifiers

SETTINGS: dict[str, Any] = {
    "task": "digits",
    "student": "cnn-w4-s3",
    "train_size": 400,
    "epochs": 150.0,
    "lr": 5e-3,
    "temperature": 4.0,
}


def demo(out: Path) -> int:
    """Run it, print the table and write the report; returns the exit code.

    Both students start from the same weights and get the same updates; only 400 of the digits have labels to learn from.
    """
    if out.exists():
        shutil.rmtree(out)
    quiet = EngineConfig(log_every=10)
    print("A teacher learns 400 handwritten digits; two equal small students follow, one with its help.\n", flush=True)
    alone = fit("supervised", engine=quiet, **{k: v for k, v in SETTINGS.items() if k != "temperature"})
    run = fit("kd", engine=quiet, out=out, **SETTINGS)
    method: Any = run.method
    teacher = method.teachers.models[0]
    task = load_task(TaskConfig.make(**{k: SETTINGS[k] for k in ("task", "train_size")}))
    student: Any = alone.method
    contestants = {"student": method.student, "student alone": student.student, "teacher": teacher}
    result = {**run.result, **judge_classifiers(contestants, task.test, task.class_names)}
    write_json(out / "result.json", result)
    print(result_table(result))
    rows = {row["who"]: row for row in result["rows"]}
    gain = rows["student"]["accuracy"] - rows["student alone"]["accuracy"]
    smaller = rows["teacher"]["parameters"] / rows["student"]["parameters"]
    print(
        f"\nThe distilled student is {smaller:.0f} times smaller than its teacher and {gain:+.1%} more accurate than alone."
    )
    print(f"Look at it: {write_run_report(out)}")
    return 0

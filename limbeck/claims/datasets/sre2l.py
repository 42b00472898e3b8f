"""Do images recovered from a classifier carry more than the classifier's labels alone, and do the feature statistics matter?

A student learns something from any images with a teacher's labels, even from noise; so noise is the baseline: the very noise that
recovery starts from, with labels of the same teacher. The other comparison leaves the feature statistics out of the loss, all
else equal. Data, teachers and students: :mod:`limbeck.claims.datasets.recovered`.

The paper compares on ImageNet with methods that cannot be run there; that comparison is not repeated. Whole images instead of
crops are reported (as published for small images), and so are as many random real images with the same kinds of labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.claims.base import Arm, Check, Claim
from limbeck.claims.datasets import recovered
from limbeck.methods.datasets.sre2l import SRe2L


def claim(data_root: str | None = None) -> Claim:
    """On the bundled digits."""

    def reported(statement: str, method: str, baseline: str, metric: str) -> Check:
        return Check(statement, method, baseline, metric, headline=False)

    return Claim(
        name="sre2l",
        arms={
            "sre2l": Arm("method", "recovered from crops", recovered.recovered(SRe2L)),
            "noise": Arm(
                "baseline", "the noise that recovery starts from, labelled by the same teacher", recovered.noise
            ),
            "no-statistics": Arm(
                "baseline", "recovered without feature statistics", recovered.recovered(SRe2L, r_bn=0.0)
            ),
            "whole": Arm("control", "recovered from whole images", recovered.recovered(SRe2L, crops=False)),
            "whole-no-statistics": Arm(
                "control",
                "recovered from whole images without feature statistics",
                recovered.recovered(SRe2L, crops=False, r_bn=0.0),
            ),
            "random": recovered.random_arm(),
        },
        checks=[
            Check(
                "recovered images train better students than noise with the same labels",
                "sre2l",
                "noise",
                "static_3",
                0.05,
            ),
            Check("so they do with the teacher's label of every view", "sre2l", "noise", "online_3"),
            Check("feature statistics matter", "sre2l", "no-statistics", "static_3"),
            reported("so they do with 1 image per class", "sre2l", "no-statistics", "static_1"),
            reported("with hard labels", "sre2l", "no-statistics", "hard_3"),
            reported("with labels of views", "sre2l", "no-statistics", "online_3"),
            reported("when recovering from whole images", "whole", "whole-no-statistics", "static_3"),
            reported("whole images are better than crops throughout", "whole", "sre2l", "static_3"),
            reported("random real images with the same labels are better", "random", "sre2l", "static_3"),
        ],
        data=recovered.task().describe(),
        seeds=3,
        select="static_3",
        note=note,
        settings=recovered.described(),
    )


def note(result: Mapping[str, Any]) -> str:
    """All arms side by side."""
    return (
        f"3 images per class, static labels: {recovered.side_by_side(result, 'static_3')}; hard labels: "
        f"{recovered.side_by_side(result, 'hard_3')}; labels of views: {recovered.side_by_side(result, 'online_3')}. "
        "The arm 'random' is as many real images with the same teacher's labels. "
        "Digits at 16x16 pixels; the paper's data and networks were not run."
    )

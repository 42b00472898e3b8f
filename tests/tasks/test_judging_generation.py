"""Judging generated objects: what the truth, an object that is the same all around, and several particles get."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.renderers import VolumeRenderer
from limbeck.rendering.scenes import scene
from limbeck.tasks import teachers
from limbeck.tasks.judging_generation import judge_generation, judging_cameras, view_classifier
from limbeck.tasks.scenes import SceneSetup
from limbeck.tasks.view_priors import PriorSetup, ViewPrior, load_prior
from limbeck.tasks.view_renders import render_orbit

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def prior() -> ViewPrior:
    return load_prior(PriorSetup(prior="closed-form", prior_views=128), SceneSetup(task="faced_sphere"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path_factory.getbasetemp() / "judging"
    monkeypatch.setenv("LIMBECK_CACHE", str(shared))
    monkeypatch.setattr(teachers, "MIN_STEPS", 1)


class Same:
    """Draws the front, from wherever it is looked at."""

    def __init__(self, front: Tensor) -> None:
        self.module: nn.Module = nn.Identity()
        self.front = front

    def __call__(self, cameras: Cameras, ids: object = None) -> dict[str, Tensor]:
        count = len(cameras) if ids is None else len(ids)  # type: ignore[arg-type]
        return {"rgb": self.front.expand(count, -1, -1, -1)}


def test_the_truth_beats_an_object_with_one_face_all_around(prior: ViewPrior) -> None:
    truth = VolumeRenderer(scene("faced_sphere"), samples=48)
    janus = Same(prior.references.images[1])  # type: ignore[union-attr]
    good, bad = judge_generation([truth], prior, 16), judge_generation([janus], prior, 16)
    assert set(good) == {
        "view_distance", "view_entropy", "nearest_distance", "inception_quality", "inception_variety", "inception_gain"
    }  # fmt: skip
    assert good["view_distance"] > 6 and bad["view_distance"] == 0
    assert good["view_entropy"] == pytest.approx(math.log(8), abs=0.05) and bad["view_entropy"] == 0
    assert good["inception_variety"] > bad["inception_variety"] + 1
    assert bad["inception_gain"] == pytest.approx(0, abs=1e-6) and good["inception_gain"] > 2
    assert bad["nearest_distance"] < 4  # it looks like something that the prior knows


def test_particles(prior: ViewPrior) -> None:
    renderers = [VolumeRenderer(scene(name), samples=32) for name in ("faced_sphere", "split_sphere")]
    both = judge_generation(renderers, prior, 6)
    each = [judge_generation([r], prior, 6) for r in renderers]
    assert both["view_distance"] == pytest.approx(sum(row["view_distance"] for row in each) / 2)
    assert both["particle_distance"] > 5
    assert judge_generation([renderers[0]] * 3, prior, 6)["particle_distance"] == 0
    wanted = (both["inception_variety"] - both["inception_quality"]) / both["inception_quality"]
    assert both["inception_gain"] == pytest.approx(wanted)


def test_without_truth_only_the_views_themselves_are_measured(prior: ViewPrior) -> None:
    bare = replace(prior, references=None, support=None)
    found = judge_generation([VolumeRenderer(scene("split_sphere"), samples=16)], bare, 4)
    assert set(found) == {"view_distance"}


def test_the_classifier_knows_the_sides_and_is_kept(prior: ViewPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    references = prior.references
    assert references is not None
    state = torch.get_rng_state()
    judge = view_classifier(references, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        found = judge(2 * references.images.movedim(-1, 1) - 1).argmax(1)
    azimuth = references.cameras.azimuth
    assert azimuth is not None
    assert float((found == ((azimuth + 22.5) % 360 // 45).long()).float().mean()) > 0.9
    monkeypatch.setattr(teachers.ReferenceTraining, "stage", lambda *_: pytest.fail("it was trained again"))
    view_classifier(references, progress=False)


def test_cameras() -> None:
    cameras = judging_cameras(render_orbit(16), 24)
    assert len(cameras) == 24 and cameras.height == 16 and float(cameras.elevation.unique()) == 15  # type: ignore[union-attr]
    with pytest.raises(InputError, match="2 views or more"):
        judging_cameras(render_orbit(16), 1)


def test_mistakes(prior: ViewPrior, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no generated object"):
        judge_generation([], prior)
    broken = Same(torch.full((1, 16, 16, 3), float("nan")))
    with pytest.raises(InputError, match="NaN"):
        judge_generation([broken], prior)

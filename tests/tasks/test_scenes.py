"""Scenes in posed pictures, fields trained on them, and how renders are judged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import orbit
from limbeck.rendering.fields import build_field
from limbeck.rendering.renderers import VolumeRenderer
from limbeck.rendering.transforms_io import write_transforms
from limbeck.tasks import scenes
from limbeck.tasks.judging_fields import judge_views, orbit_frames, spread, turntable_cameras, view_pictures
from limbeck.tasks.reference_fields import RATES, FieldTraining, field_groups, reference_field
from limbeck.tasks.scenes import PosedImages, SceneSetup, load_scene, reduction
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scenes, "TRUE_SAMPLES", 24)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def small(task: str = "spheres_box", **settings: object) -> scenes.SceneTask:
    return load_scene(SceneSetup.make(**{"task": task, "views": 5, "test_views": 4, "view_size": 12, **settings}))


@pytest.mark.parametrize("name", ["spheres_box", "terrain"])
def test_an_analytic_scene_has_three_disjoint_parts(name: str):
    task = small(name)
    assert [len(task.train), len(task.val), len(task.test)] == [5, 2, 4]
    assert task.truth is not None and task.train.images.shape == (5, 12, 12, 3)
    places = torch.cat([p.cameras.positions for p in (task.train, task.val, task.test)])
    gaps = torch.cdist(places, places) + torch.eye(len(places))
    assert gaps.min() > 1e-3
    assert torch.equal(task.aabb, task.truth.aabb)
    assert task.describe()["picture"] == [12, 12] and task.fingerprint != small(name, scene_seed=1).fingerprint
    assert task.train.images.std() > 0.02


def test_batches_hold_pictures_and_numbers():
    data = small().train
    batch = data.fetch(torch.tensor([3, 1]), 0)
    assert torch.equal(batch.inputs["image"], data.images[[3, 1]]) and batch.inputs["number"].tolist() == [3, 1]
    part = data.subset(torch.tensor([4]))
    assert len(part) == 1 and torch.equal(part.cameras.c2w[0], data.cameras.c2w[4])
    bare = PosedImages(data.cameras)
    assert "image" not in bare.fetch(torch.tensor([0]), 0).inputs and not bare.has_images
    with pytest.raises(InputError, match="no pictures"):
        _ = bare.images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 8, 8, 3), "pictures for these cameras are"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "divide by 255"),
        (torch.full((1, 8, 8, 3), 2.0), "rescale or clamp"),
        (torch.full((1, 8, 8, 3), float("nan")), "finite"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(images: torch.Tensor, message: str):
    with pytest.raises(InputError, match=message):
        PosedImages(orbit([0.0], width=8, height=8), images)


def test_photographs_are_recentred_reduced_and_split(tmp_path: Path):
    cameras = orbit(torch.arange(12) * 30.0, 20.0, 5.0, width=24, height=16)
    cameras.c2w[:, :3, 3] += torch.tensor([1.0, 2.0, 3.0])
    write_transforms(tmp_path, cameras, torch.rand(12, 16, 24, 3))
    task = load_scene(SceneSetup.make(data=str(tmp_path), test_views=2, view_size=12))
    assert (task.train.cameras.width, task.train.cameras.height) == (12, 8)
    assert [len(task.train), len(task.val), len(task.test)] == [8, 2, 2]
    assert task.transform is not None
    centre = task.transform @ torch.tensor([1.0, 2.0, 3.0, 1.0])
    torch.testing.assert_close(centre[:3], torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(task.train.cameras.positions.norm(dim=1).max(), torch.tensor(2.0), atol=1e-3, rtol=0)


def test_factors_divide_both_sides():
    assert reduction(270, 480, 5.2) == 5 and reduction(270, 480, 15.0) == 15 and reduction(7, 11, 3.0) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "castle"}, "unknown scene 'castle'"),
        ({"data": "/no/such/folder"}, "no scene at /no/such/folder"),
        ({"task": "fox"}, "fox photographs are not bundled"),
    ],
)
def test_a_scene_that_is_not_there_is_named(settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    with pytest.raises(InputError, match=message):
        load_scene(SceneSetup.make(**settings))


def test_a_field_learns_pictures_and_resumes(tmp_path: Path):
    task = small()

    def made() -> FieldTraining:
        torch.manual_seed(0)
        return FieldTraining(build_field("voxels", {"resolution": 8}), 1.0, steps=25, rays=32, samples=8)

    before = judge_views({"it": VolumeRenderer(made().field, 16)}, task.test)[0]
    method = resumed_equals_uninterrupted(made, task.train, tmp_path)
    after = judge_views({"it": VolumeRenderer(method.eval().field, 16)}, task.test)[0]  # type: ignore[attr-defined]
    assert after["psnr"] > before["psnr"] + 1 and after["parameters"] == 8**3 * 13 and after["ssim"] <= 1


def test_a_reference_field_comes_from_the_cache_the_second_time():
    task = small()
    state = torch.get_rng_state()
    first = reference_field(
        task, "vm", {"resolution": 6, "rank": 2, "colour_rank": 2}, steps=5, rays=16, progress=False
    )
    assert torch.equal(state, torch.get_rng_state()) and not any(p.requires_grad for p in first.parameters())
    began = [
        f.stat().st_mtime_ns
        for f in (scenes.Path(scenes.os.environ["LIMBECK_CACHE"]) / "fields").rglob("model.safetensors")
    ]
    second = reference_field(
        task, "vm", {"resolution": 6, "rank": 2, "colour_rank": 2}, steps=5, rays=16, progress=False
    )
    again = [
        f.stat().st_mtime_ns
        for f in (scenes.Path(scenes.os.environ["LIMBECK_CACHE"]) / "fields").rglob("model.safetensors")
    ]
    assert began == again and len(began) == 1
    torch.testing.assert_close(first.planes, second.planes)


@pytest.mark.parametrize("family", sorted(RATES))
def test_rates_are_the_families_usual_ones(family: str):
    field = build_field(family)
    groups = {g["name"]: g["lr"] for g in field_groups(field)}
    assert groups.get("encoding", RATES[family]) == RATES[family] and groups.get("decoder", 0) <= 2e-3 + 1e-9
    doubled = {g["name"]: g["lr"] for g in field_groups(field, 2 * RATES[family])}
    assert all(abs(doubled[k] - 2 * v) < 1e-9 for k, v in groups.items())


def test_pictures_and_turntables():
    task = small()
    field = build_field("voxels", {"resolution": 4})
    pictures = view_pictures({"student": VolumeRenderer(field, 8)}, task.test, 3)
    assert pictures[0]["png"] and "real" in pictures[0]["caption"]
    cameras = turntable_cameras(task.test.cameras, 6)
    assert len(cameras) == 6 and cameras.width == 12
    radius = task.test.cameras.positions.norm(dim=1).median()
    torch.testing.assert_close(cameras.positions.norm(dim=1), radius.expand(6), atol=1e-3, rtol=0)
    assert orbit_frames(VolumeRenderer(field, 8), None, 2, 8).shape == (2, 8, 8, 3)
    assert spread(10, 3).tolist() == [0, 4, 9] and spread(2, 5).tolist() == [0, 1]
    with pytest.raises(InputError, match="no renderer"):
        judge_views({}, task.test)

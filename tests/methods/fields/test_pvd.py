from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import limbeck
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.methods.fields.pvd import PVD
from limbeck.rendering.cameras import orbit
from limbeck.rendering.contraction import FOLDED, ContractedField
from limbeck.rendering.fields import HashField, MLPField, VMField, VolumeField, VoxelField
from limbeck.rendering.fields.editing import erased
from limbeck.rendering.fields.occupied import OccupiedField
from limbeck.rendering.inheritance import core
from limbeck.rendering.scenes import scene
from limbeck.tasks.field_teachers import read_options
from limbeck.tasks.scenes import PosedImages
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
CAMERAS = orbit(torch.arange(0, 360, 45.0), 20.0, 3.0, 45.0, 12, 12)
HASH = {"levels": 3, "finest": 16, "log2_size": 9, "hidden": 16}
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"levels": 2, "depth": 3, "width": 16, "features": 6, "hidden": 16},
    "hash": HASH,
    "vm": {"resolution": 8, "rank": 2, "colour_rank": 3, "hidden": 16},
    "voxels": {"resolution": 8},
}
FAMILIES: dict[str, type[VolumeField]] = {"mlp": MLPField, "hash": HashField, "vm": VMField, "voxels": VoxelField}


def field(family: str, seed: int = 0, **options: Any) -> VolumeField:
    """A field with something in it: random, but neither empty nor the same everywhere."""
    torch.manual_seed(seed)
    made = FAMILIES[family](**{**SMALL[family], **options})
    with torch.no_grad():
        if isinstance(made, HashField):
            made.encoding.table.normal_(0, 1.5)
        elif isinstance(made, VoxelField):
            made.data.normal_(0, 2)
    return made


def make(student: str = "mlp", teacher: str = "hash", **settings: Any) -> PVD:
    first, second = field(teacher, 1), field(student, 2)
    usual = {"rays": 24, "samples": 8, "steps": 30, "epoch_poses": 4, "occupancy": 8}
    return PVD(first, second, CAMERAS, seed=3, **{**usual, **settings})


def run(method: PVD) -> None:
    Engine(None, EngineConfig(progress=False), seed=0).run(method, method.stages())


def points_of(method: PVD, step: int, seed: int = 5) -> tuple[Any, Any, Tensor]:
    """The points, rays and background that ``losses_at(step)`` will draw after ``manual_seed(seed)``."""
    torch.manual_seed(seed)
    rays = method.rays_at(step)
    points = method.march(rays)
    return points, rays, torch.rand(len(rays.origins), 3)


def norm(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).double().square().sum().sqrt())


def blended(found: dict[str, Tensor], points: Any, background: Tensor) -> Tensor:
    """Ray after ray, sample after sample."""
    rows, k = [], 0
    for ray in range(len(points.t)):
        left, colour = 1.0, torch.zeros(3)
        for s in range(points.t.shape[1]):
            if not points.asked[ray, s]:
                continue
            alpha = 1 - torch.exp(-found["sigma"][k] * points.delta[ray, s])
            colour, left = colour + left * alpha * found["rgb"][k], left * (1 - alpha)
            k += 1
        rows.append(colour + left * background[ray])
    return torch.stack(rows)


@pytest.mark.parametrize("student", ["mlp", "vm"])
def test_the_losses_are_the_papers(student: str):
    method = make(student, sparsity_weight=1e-4)
    step = 25
    method.grid.occupied[:4] = False  # type: ignore[union-attr]
    points, _, background = points_of(method, step)
    assert 0 < len(points.x) < points.t.numel()
    mine, other = method.student(points.x, points.d), method.teacher(points.x, points.d)
    torch.manual_seed(5)
    losses = method.losses_at(step)
    wanted = {
        "pixels": norm(blended(mine, points, background), blended(other, points, background)),
        "colour": norm(mine["rgb"], other["rgb"]),
        "density": norm(mine["log_sigma"].clamp(-2, 7), other["log_sigma"].clamp(-2, 7)),
    }
    features = [torch.cat([f["log_sigma"].clamp(-2, 7)[:, None], f["feature"][:, 1:]], 1) for f in (mine, other)]
    if student == "vm":
        features[0] = features[0].clamp(-2, 7)
        planes, lines = method.student.planes[:, :2], method.student.lines[:, :2]
        wanted["sparsity"] = float((planes.abs().mean() + lines.abs().mean()).detach())
    wanted["feature"] = norm(*features)
    assert set(losses) == set(wanted)
    for name, value in wanted.items():
        assert float(losses[name].detach()) == pytest.approx(value, rel=1e-4), name
    weights = {"pixels": 1, "colour": 2e-3, "density": 2e-3, "feature": 2e-3 * 0.995**25, "sparsity": 1e-4}
    total = sum(weights[name] * value for name, value in wanted.items())
    assert float(losses.total.detach()) == pytest.approx(total, rel=1e-4)


def test_stages_by_step():
    method = make(steps=100)
    assert [method.phase(k) for k in (0, 11, 12, 34, 35, 99)] == [1, 1, 2, 2, 3, 3]
    terms = [set(method.losses_at(k)) for k in (0, 12, 35)]
    assert terms == [{"feature"}, {"feature", "colour", "density"}, {"feature", "colour", "density", "pixels"}]
    direct = make(steps=100, feature_until=0.0, volume_until=0.0)
    assert direct.phase(0) == 3
    assert method.losses_at(7).weights["feature"] == pytest.approx(2e-3 * 0.995**7)


@pytest.mark.parametrize(("student", "teacher"), [("voxels", "hash"), ("mlp", "voxels")])
def test_without_features_the_first_stage_belongs_to_the_second(student: str, teacher: str):
    method = make(student, teacher)
    assert not method.inherited and method.phase(0) == 2
    assert set(method.losses_at(0)) == {"colour", "density"}
    assert set(method.losses_at(29)) == {"colour", "density", "pixels"}


def test_gradients_go_where_a_stage_lets_them():
    method = make()

    def reached(step: int) -> set[str]:
        method.zero_grad()
        method.losses_at(step).total.backward()
        return {n.split(".")[0] for n, p in method.student.named_parameters() if p.grad is not None}

    assert reached(0) == {"trunk", "out", "geometry_head"}
    assert reached(29) == {"trunk", "out", "geometry_head", "colour_head"}
    assert all(p.grad is None for p in method.teacher.parameters())


def test_both_fields_are_asked_once_at_the_same_points_and_the_grid_stays():
    method = make(steps=6)
    asked: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name in asked:
        module = getattr(method, name)
        module.register_forward_pre_hook(lambda _, args, name=name: asked[name].append(args[0].clone()))
    before = method.grid.occupied.clone()  # type: ignore[union-attr]
    run(method)
    assert len(asked["student"]) == len(asked["teacher"]) == 5  # one step matched features alone
    assert all(torch.equal(a, b) for a, b in zip(asked["student"], asked["teacher"], strict=True))
    assert torch.equal(method.grid.occupied, before)  # type: ignore[union-attr]
    assert all(bool(method.grid(x).all()) for x in asked["student"])  # type: ignore[misc]
    assert method.counters["teacher_points"] > sum(len(x) for x in asked["teacher"])


def test_an_exact_copy_has_no_loss_and_a_finite_gradient():
    method = make("hash", "hash")
    assert "encoding.table" in method.inherited
    losses = method.losses_at(29)
    assert all(float(losses[name].detach()) == 0 for name in losses)
    losses.total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in method.student.parameters() if p.grad is not None)


def test_beyond_the_clamp_densities_do_not_matter():
    student, teacher = field("voxels", 1), field("voxels", 2)
    with torch.no_grad():
        for made, level in ((student, -3.0), (teacher, -30.0)):
            made.data[:, 0] = level
            made.density_law = type(made.density_law)(low=-50.0)
    method = PVD(teacher, student, CAMERAS, inherit="none", occupancy=0, rays=8, samples=4, random_background=False)
    losses = method.losses_at(0)
    assert float(losses["density"].detach()) == 0
    wide = PVD(teacher, student, CAMERAS, inherit="none", occupancy=0, rays=8, samples=4, clamp_low=-50.0)
    x = wide.losses_at(0)["density"]
    assert float(x.detach()) == pytest.approx(27 * wide.counters["teacher_points"] ** 0.5, rel=1e-4)


@pytest.mark.parametrize(("distance", "value"), [("normL2", 5.0), ("L2", 12.5), ("normL1", 7.0), ("smoothL1", 3.0)])
def test_distances(distance: str, value: float):
    method = make(distance=distance)
    assert float(method.gap(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 5.0]))) == pytest.approx(value)
    assert float(method.gap(torch.zeros(0, 3), torch.zeros(0, 3))) == 0


def test_heads_are_kept():
    method = make(keep_heads=True, steps=5)
    before = {n: p.clone() for n, p in method.student.named_parameters()}
    run(method)
    for name, parameter in method.student.named_parameters():
        assert torch.equal(parameter, before[name]) == (name.split(".")[0] in ("geometry_head", "colour_head")), name
    with pytest.raises(InputError, match="no head of the voxels student"):
        make("voxels", keep_heads=True)


def test_every_step_has_its_pose_and_every_epoch_new_ones():
    method = make()
    places = [method.rays_at(k).origins for k in range(9)]
    assert all(bool((p == p[0]).all()) for p in places)
    assert len({tuple(p[0].tolist()) for p in places}) == 9
    torch.testing.assert_close(places[4][0], method.pool.epoch(1, 3).positions[0])


def test_one_course_of_the_rate():
    method = make(steps=20, lr=1e-2, decoder_lr=1e-3, lr_end=0.007)
    made = method.optimised()["student"]
    rates = []
    for _ in range(21):
        rates.append(made.optimizer.param_groups[0]["lr"])
        made.optimizer.step()
        made.scheduler.step()
    assert rates[0] == pytest.approx(1e-3) and rates[20] == pytest.approx(7e-6)  # an mlp is all network
    assert rates[10] == pytest.approx(1e-3 * (0.007 + 0.993 * 0.5))
    groups = make("vm", lr=1e-2, decoder_lr=1e-3).optimised()["student"].optimizer.param_groups
    assert [g["lr"] for g in groups] == [1e-2, 1e-3]


def test_the_published_settings():
    config = PVD.Config.make("paper")
    assert (config.steps, config.rays, config.lr, config.lr * config.lr_end) == (
        30_000,
        4096,
        1e-2,
        pytest.approx(7e-5),
    )
    assert (round(config.steps * config.feature_until), round(config.steps * config.volume_until)) == (2000, 5000)
    assert config.optimizer == "adamw" and config.adam_eps == 1e-15 and config.distance == "normL2"


@pytest.mark.parametrize(("student", "lr", "steps"), [("hash", 5e-2, 120), ("vm", 5e-2, 60), ("voxels", 0.3, 60)])
def test_the_student_comes_to_look_like_the_teacher(student: str, lr: float, steps: int):
    options: dict[str, Any] = {"steps": steps, "rays": 64, "samples": 16, "epoch_poses": 4, "occupancy": 8}
    torch.manual_seed(2)
    method = PVD(scene("split_sphere"), FAMILIES[student](**SMALL[student]), CAMERAS, lr=lr, **options)

    def error() -> float:
        with torch.no_grad():
            mine, other = (r(CAMERAS, [1, 4])["rgb"] for r in method.renderers().values())
        return float((mine - other).square().mean())

    before = error()
    run(method)
    assert error() < 0.35 * before


def test_a_hole_cut_into_voxels_is_carried_over():
    teacher = VoxelField(9, 0)
    with torch.no_grad():
        teacher.data[:, 0] = 3.0
    with_hole = erased(teacher, [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]])
    x = torch.tensor([[0.1, 0.2, -0.1], [0.8, 0.8, 0.8]])
    torch.testing.assert_close(with_hole.density(x)["log_sigma"], torch.tensor([-100.0, 3.0]))
    torch.testing.assert_close(teacher.density(x)["log_sigma"], torch.tensor([3.0, 3.0]))
    student = MLPField(**SMALL["mlp"], density=with_hole.density_law)
    method = PVD(with_hole, student, CAMERAS, clamp_low=-100.0, occupancy=0, steps=150, rays=32, samples=16, lr=2e-2)
    run(method)
    low, high = method.student.eval().density(x)["sigma"].tolist()
    assert low < 0.01 and high > 5
    with pytest.raises(InputError, match="within the clamp"):
        PVD(with_hole, MLPField(), CAMERAS, clamp_low=-100.0)
    assert PVD(with_hole, "mlp", CAMERAS, clamp_low=-100.0, occupancy=0).student.density_law.low == -100
    with pytest.raises(InputError, match="holds no vertex"):
        erased(teacher, lambda p: p[:, 0] > 5)
    with pytest.raises(InputError, match="not of HashField"):
        erased(HashField(), [[0, 0, 0], [1, 1, 1]])  # type: ignore[arg-type]


def test_any_callable_can_teach():
    ball = scene("split_sphere")

    def source(x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        found = ball(x, d)
        return found["sigma"][:, None], found["rgb"]

    method = PVD(source, "voxels", CAMERAS, poses="orbit", steps=4, rays=16, epoch_poses=None)
    assert not method.with_features and method.epoch_length == 311
    assert isinstance(method.result, OccupiedField) and core(method.result) is method.student
    run(method)


def test_all_of_space_is_distilled_contracted():
    torch.manual_seed(0)
    teacher = ContractedField(HashField(**HASH, aabb=FOLDED), radius=1.0)
    method = PVD(teacher, "mlp", CAMERAS, poses="orbit", spacing="disparity", steps=3, rays=8, samples=8, epoch_poses=4)
    assert isinstance(method.student, ContractedField) and method.grid is None
    assert method.with_features and float(method.pool.epoch(0).radius.max()) == pytest.approx(3.2)
    run(method)
    method.check(_batch(torch.zeros(1)))


def test_in_a_loop_of_ones_own():
    method = make(steps=10, feature_until=0.2, volume_until=0.4).train()
    rays = CAMERAS.rays(0)
    batch = {"origins": rays.origins, "directions": 2 * rays.directions}
    assert float(method(batch).detach()) > 0 and method.counters["steps"] == 1
    for _ in range(4):
        method(batch).backward()
    assert set(method.losses(_batch(batch))) == {"pixels", "colour", "density", "feature"}
    method.eval()(batch)
    assert method.counters["steps"] == 6
    with pytest.raises(InputError, match="PVD takes rays"):
        method(torch.zeros(3, 3))


def _batch(value: Any) -> Any:
    from limbeck.core.batch import Batch

    return Batch.of(value)


def test_resume_is_exact(tmp_path: Path):
    resumed_equals_uninterrupted(lambda: make("hash", "vm"), None, tmp_path)


def test_by_name_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    settings = {"views": 3, "test_views": 2, "view_size": 12, "teacher_steps": 3, "steps": 4, "rays": 16, "samples": 8}
    settings |= {"student": "vm", "student_options": ("resolution=8", "rank=2"), "turntable_frames": 2}
    made = limbeck.fit("pvd", out=tmp_path / "a", engine={"progress": False}, **settings)
    assert [row["who"] for row in made.result["rows"]] == ["student", "teacher"] and made.result["pictures"]
    saved = limbeck.load(tmp_path / "a")
    assert isinstance(saved.content, OccupiedField) and saved.content.field.rank == 2
    assert "colour_head.net.0.weight" in saved.description["inherited"]
    assert (tmp_path / "a" / "artifact" / "turntable.gif").exists()
    again = {**settings, "student": "hash", "student_options": (), "teacher": str(tmp_path / "a")}
    second = limbeck.fit("pvd", engine={"progress": False}, **again)
    assert second.method.inherited == [n for n in saved.description["inherited"] if n.startswith("colour_head")]


def test_on_cameras_without_pictures():
    method = PVD.from_data(PosedImages(CAMERAS), None, field("hash"), PVD.Config.make(steps=3, rays=8, samples=4))
    assert method.student.family == "mlp"
    limbeck.fit(method, PosedImages(CAMERAS), engine={"progress": False})


def test_options_are_read():
    assert read_options(("depth=8", "combine=sum", "skip=null")) == {"depth": 8, "combine": "sum", "skip": None}
    with pytest.raises(InputError, match="name=value"):
        read_options(("depth",))


def test_bad_input_is_named():
    teacher = field("hash")
    for student, settings, told in (
        (HashField(aabb=[[0, 0, 0], [1, 1, 1]]), {}, "the student fills the box"),
        (nn.Linear(3, 3), {}, "a student is a field"),
        (teacher, {}, "one field"),
        ("mlp", {"clamp_low": 8.0}, "clamp_low < clamp_high"),
        ("nerf", {}, "unknown family of fields 'nerf'"),
    ):
        with pytest.raises((InputError, LookupError), match=told):
            PVD(teacher, student, CAMERAS, **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="poses 'fitted' need cameras"):
        PVD(teacher)
    with pytest.raises(InputError, match="callable"):
        PVD(3)
    with pytest.raises(InputError, match="pvd needs teacher"):
        PVD.from_data(PosedImages(CAMERAS), None, None, PVD.Config())

"""OFA-KD: the enhanced target against numpy, every term of the loss, every pair of families, stages, gradients, resume."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck.blocks.exits import ConvExit, TokenExit
from limbeck.blocks.taps import Tap
from limbeck.blocks.teachers import Teachers
from limbeck.core.artifacts import WEIGHTS
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.methods.models.ofa_kd import OFAKD, ofa_loss, ofa_weights
from limbeck.networks import build
from tests.helpers import resumed_equals_uninterrupted

SHAPE, CLASSES = (1, 8, 8), 5
CNN, VIT, MIXER = "cnn-w4-s3", "vit-d8-l4-h2-p2", "mixer-d8-l4-p2"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def network(name: str) -> nn.Module:
    return build(name, in_shape=SHAPE, num_classes=CLASSES)


def data(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, *SHAPE), torch.randint(0, CLASSES, (n,))


def pair(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher = (2 * torch.randn(rows, CLASSES, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_(), torch.randint(0, CLASSES, (rows,))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- the loss function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eps", "temperature"), [(1.0, 1.0), (1.5, 1.0), (1.3, 4.0), (3.0, 0.5)])
def test_the_loss_is_the_equation(eps: float, temperature: float):
    student, teacher, labels = pair()
    p, q = (softmax(z.detach().numpy() / temperature) for z in (teacher, student))
    total = 0.0
    for row, label in enumerate(labels.tolist()):
        for c in range(CLASSES):
            weight = (1 + p[row, c]) ** eps - 1 if c == label else p[row, c] ** eps
            total -= weight * np.log(q[row, c])
    assert ofa_loss(student, teacher, labels, eps, temperature).item() == pytest.approx(total / len(labels), rel=1e-12)


def test_two_classes_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2); eps = 2: (7/4)² - 1 = 33/16 on the target, 1/16 on the other
    teacher = torch.tensor([[np.log(3.0), 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64)
    assert ofa_weights(teacher, torch.tensor([0]), 2.0).tolist() == [pytest.approx([33 / 16, 1 / 16])]
    assert ofa_weights(teacher, torch.tensor([1]), 2.0).tolist() == [pytest.approx([9 / 16, 9 / 16])]
    assert ofa_loss(student, teacher, torch.tensor([0]), 2.0).item() == pytest.approx(34 / 16 * np.log(2))


def test_with_eps_1_it_is_the_soft_cross_entropy():
    student, teacher, labels = pair()
    for tau in (1.0, 3.0):
        expected = F.cross_entropy(student / tau, torch.softmax(teacher / tau, -1))
        assert abs(ofa_loss(student, teacher, labels, 1.0, tau).item() - expected.item()) < 1e-12


def test_the_enhancement_raises_the_target_with_the_teachers_confidence_and_lowers_the_rest():
    _, teacher, labels = pair(200)
    p = torch.softmax(teacher.detach(), -1)
    mark = F.one_hot(labels, CLASSES).bool()
    gain = ofa_weights(teacher, labels, 1.5) - p
    assert (gain[mark] > 0).all() and (gain[~mark] < 0).all()
    confidence, order = p[mark].sort()
    assert (gain[mark][order].diff() > 0).all()
    assert confidence[0] < 0.1 and confidence[-1] > 0.9
    sums = ofa_weights(teacher, labels, 1.5).sum(-1)
    assert ((sums > 0) & (sums <= 2**1.5 - 1 + 1e-12)).all()


def test_the_gradient_is_weight_times_error_and_pulls_the_target_harder():
    student, teacher, labels = pair()
    gradients = []
    for eps in (1.0, 1.5):
        (gradient,) = torch.autograd.grad(ofa_loss(student, teacher, labels, eps), student)
        w, q = ofa_weights(teacher, labels, eps), torch.softmax(student.detach(), -1)
        torch.testing.assert_close(gradient, (w.sum(-1, keepdim=True) * q - w) / len(labels))
        gradients.append(gradient)
    teacher_surest = torch.softmax(teacher.detach(), -1).argmax(-1)
    (plain,) = torch.autograd.grad(ofa_loss(student, teacher, teacher_surest, 1.0), student)
    (enhanced,) = torch.autograd.grad(ofa_loss(student, teacher, teacher_surest, 1.5), student)
    rows = torch.arange(len(labels))
    assert (enhanced[rows, teacher_surest] < plain[rows, teacher_surest]).all()


def test_no_gradient_reaches_the_teacher_even_where_its_probability_is_0():
    student, _, labels = pair()
    teacher = torch.zeros(6, CLASSES, dtype=torch.float64)
    teacher[:, 0] = 2000.0
    teacher.requires_grad_()
    loss = ofa_loss(student, teacher, labels, 1.5)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    assert teacher.grad is None


def test_half_precision_does_not_underflow():
    student = torch.tensor([[60.0, 0.0, -60.0]], dtype=torch.float16)
    teacher = torch.tensor([[-20.0, 0.0, 20.0]], dtype=torch.float16)
    assert ofa_loss(student, teacher, torch.tensor([2]), 1.5).item() == pytest.approx((2**1.5 - 1) * 120, rel=1e-3)


def test_soft_labels_name_the_target_by_their_largest_entry():
    student, teacher, labels = pair()
    soft = 0.6 * F.one_hot(labels, CLASSES).double() + 0.4 / CLASSES
    assert torch.equal(ofa_loss(student, teacher, soft, 1.5), ofa_loss(student, teacher, labels, 1.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.9}, "eps must be at least 1"),
        ({"eps": float("inf")}, "eps must be at least 1 and finite"),
        ({"eps": float("nan")}, "eps must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"labels": torch.full((6,), CLASSES)}, "5 classes"),
        ({"teacher_logits": torch.zeros(6, CLASSES + 1)}, "same label space"),
    ],
)
def test_wrong_arguments_of_the_loss(change: dict, message: str):
    student, teacher, labels = pair()
    arguments = {"logits": student, "teacher_logits": teacher, "labels": labels, **change}
    with pytest.raises(InputError, match=message):
        ofa_loss(**arguments)


# ---- the method's loss ------------------------------------------------------------------------------------------------


def test_the_terms_are_those_of_the_equation():
    student, teacher = network(CNN).double(), network(VIT).double()
    x, y = data()
    x = x.double()
    method = OFAKD(
        student, teacher, eps=(1.0, 1.2, 1.4, 1.6), ce_weight=0.5, ofa_weight=2, exit_weight=3, temperature=2, sample=x
    )
    method.train()
    losses = method.losses(Batch(x, y))

    with torch.no_grad():
        said = teacher(x)
    maps = [student.stages[0](x)]
    maps += [student.stages[1](maps[0])]
    maps += [student.stages[2](maps[1])]
    logits = student.head(maps[2].mean((2, 3)))
    expected = 0.5 * F.cross_entropy(logits, y) + 2 * ofa_loss(logits, said, y, 1.6, 2)
    for branch, feature, eps in zip(method.exits, maps, (1.0, 1.2, 1.4), strict=True):
        expected = expected + 3 * ofa_loss(branch(feature), said, y, eps, 2)
    assert list(losses) == ["ce", "ofa", "exit_1", "exit_2", "exit_3"]
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-12)

    scaled = OFAKD(student, teacher, eps=1.5, ce_weight=0, temperature=2, official_scale=False, exit_weight=0, sample=x)
    assert scaled.losses(Batch(x, y)).total.item() == pytest.approx(4 * ofa_loss(logits, said, y, 1.5, 2).item())


def test_soft_labels_and_smoothing_go_into_the_cross_entropy():
    student, teacher = network(CNN).eval(), network(VIT)
    x, y = data()
    method = OFAKD(student, teacher, eps=1.5, label_smoothing=0.1, sample=x).eval()
    soft = 0.7 * F.one_hot(y, CLASSES) + 0.3 * F.one_hot(y.flip(0), CLASSES)
    losses = method.losses(Batch(x, soft))
    smooth = 0.9 * soft + 0.1 / CLASSES
    expected = -(smooth * student(x).log_softmax(-1)).sum(-1).mean()
    assert losses["ce"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses["ofa"].item() == pytest.approx(ofa_loss(student(x), teacher(x), y, 1.5).item(), rel=1e-5)


def test_gradients_reach_student_and_branches_and_nothing_else():
    student, teacher = network(CNN), network(MIXER)
    x, y = data()
    method = OFAKD(student, teacher, sample=x).train()
    method((x, y)).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is not None for p in method.exits.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    trained = {id(p) for p in method.trainable_parameters()}
    assert trained == {id(p) for p in (*student.parameters(), *method.exits.parameters())}


def test_a_branch_reaches_only_its_stage_and_what_lies_before():
    student = network(CNN)
    x, y = data()
    method = OFAKD(student, network(VIT), ce_weight=0, ofa_weight=0, sample=x).train()
    losses = method.losses(Batch(x, y))
    losses["exit_2"].backward()
    assert all(p.grad is not None for p in (*student.stages[0].parameters(), *student.stages[1].parameters()))
    assert all(p.grad is None for p in (*student.stages[2].parameters(), *student.head.parameters()))
    assert [any(p.grad is not None for p in b.parameters()) for b in method.exits] == [False, True, False]


def test_several_teachers_are_joined_by_their_probabilities():
    student, teachers = network(CNN).eval(), [network(VIT), network(MIXER)]
    x, y = data()
    method = OFAKD(student, teachers, eps=1, temperature=2, exit_weight=0, sample=x).eval()
    mean = torch.stack([torch.softmax(t(x) / 2, -1) for t in teachers]).mean(0)
    expected = F.cross_entropy(student(x) / 2, mean)
    assert method.losses(Batch(x, y))["ofa"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_teacher_may_see_other_inputs():
    student, teacher = network(CNN).eval(), network(VIT)
    x, y = data()
    method = OFAKD(student, teacher, eps=1, exit_weight=0, sample=x).eval()
    found = method.losses(Batch(x, y, teacher_inputs=-x))["ofa"]
    assert found.item() == pytest.approx(ofa_loss(student(x), teacher(-x), y).item(), rel=1e-5)


# ---- families, stages and shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "student", "kind"),
    [
        (VIT, CNN, ConvExit),
        (CNN, VIT, TokenExit),
        (CNN, MIXER, TokenExit),
        (MIXER, "convnet-w4-d3", ConvExit),
        ("mlp-16-16", CNN, ConvExit),
        (MIXER, "resnet8", ConvExit),
        (VIT, MIXER, TokenExit),
        (CNN, CNN, ConvExit),
    ],
)
def test_pairs_of_families_learn(teacher: str, student: str, kind: type):
    own, (x, y) = network(student), data()
    method = OFAKD(own, network(teacher), sample=x[:2])
    assert len(method.exits) == len(own.stage_paths) and all(isinstance(b, kind) for b in method.exits)
    if isinstance(method.exits[0], TokenExit):
        assert {b.prefix_tokens for b in method.exits} == {1 if student == VIT else 0}
        assert {b.head.in_features for b in method.exits} == {own.feature_dim}
    else:
        assert {b.head.in_features for b in method.exits} == {
            max(own.feature_dim, method.teachers.models[0].feature_dim)
        }
    method.check(Batch(x, y))
    optimizer = torch.optim.AdamW(method.trainable_parameters(), lr=1e-2)
    w = ofa_weights(method.teachers(Batch(x, y)).logits, y, method.config.eps[0])
    least = (1 + len(method.exits)) * -(w * (w / w.sum(-1, keepdim=True)).log()).sum(-1).mean().item()
    before = method((x, y)).item() - least
    for _ in range(25):
        optimizer.zero_grad()
        method((x, y)).backward()
        optimizer.step()
    assert 0 < method((x, y)).item() - least < 0.8 * before


class Plain(nn.Module):
    """A module that says nothing about itself; its last stage gives tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.two = nn.Linear(6, 12)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.two(self.one(x).flatten(2).transpose(1, 2))
        return {"logits": self.head(self.drop(tokens.mean(1)))}


def test_any_module_works_with_its_stages_given():
    x, y = data()
    with pytest.raises(InputError, match=r"stages=\[…\]; limbeck.list_taps"):
        OFAKD(Plain(), network(CNN), sample=x)
    with pytest.raises(InputError, match="give sample="):
        OFAKD(Plain(), network(CNN), stages=["one", "two"])
    with pytest.raises(UnknownNameError, match="three"):
        OFAKD(Plain(), network(CNN), stages=["one", "three"], sample=x)
    method = OFAKD(Plain(), network(CNN), stages=["one", "two"], sample=(x, y))
    assert [type(b) for b in method.exits] == [ConvExit, TokenExit]
    # maps: the larger width of the two networks (the CNN has 16); tokens: the student's own
    assert [b.head.in_features for b in method.exits] == [16, 12]
    method.check(Batch(x, y))
    assert set(method.losses(Batch(x, y))) == {"ce", "ofa", "exit_1", "exit_2"}
    wide = OFAKD(Plain(), network(CNN), stages=[Tap("one"), "two"], feature_dim=20, sample=x)
    assert [b.head.in_features for b in wide.exits] == [20, 20]
    by_config = OFAKD(Plain(), network(CNN), OFAKD.Config.make(stages=("one",)), sample=x)
    assert len(by_config.exits) == 1


def test_looking_at_the_sample_changes_nothing():
    student, x = network(CNN), data()[0]
    student.stages[1].eval()
    before, modes = copy.deepcopy(student.state_dict()), [m.training for m in student.modules()]
    method = OFAKD(student, network(VIT), sample=x)
    state = torch.get_rng_state()
    method._look(Batch(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert [m.training for m in student.modules()] == modes


class Vectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 6), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x.flatten(1)))


class Sequence5(nn.Module):
    """Five dimensions, as video features have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(2)


def test_stages_that_are_neither_maps_nor_tokens_are_refused():
    x, _ = data()
    with pytest.raises(InputError, match=r"'layers\.0' gives features of shape \(B, 16\).*MLP-Mixer"):
        OFAKD(network("mlp-16-16"), network(CNN), sample=x)
    with pytest.raises(InputError, match=r"'layer' gives features of shape \(B, 6\)"):
        OFAKD(Vectors(), network(CNN), stages=["layer"], sample=x)
    five = nn.Sequential(Sequence5(), nn.Flatten(), nn.Linear(64, CLASSES))
    with pytest.raises(InputError, match=r"'0' gives features of shape \(B, 1, 1, 8, 8\)"):
        OFAKD(five, network(CNN), stages=["0"], sample=x)
    with pytest.raises(InputError, match="gives 1 tensors; tap a single call"):
        OFAKD(network(CNN), network(VIT), stages=[Tap("stages.0", call="all")], sample=x)


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Linear(1, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage(x.permute(0, 2, 3, 1)).mean((1, 2)))


def test_maps_with_their_channels_last_are_noticed():
    x, y = data()
    with pytest.raises(InputError, match=r"look like \(B, H, W, C\)"):
        OFAKD(ChannelsLast(), network(CNN), stages=["stage"], sample=x)
    turned = Tap("stage", pick=lambda y: y.permute(0, 3, 1, 2))
    method = OFAKD(ChannelsLast(), network(CNN), stages=[turned], sample=x)
    assert method.exits[0].body[0].in_channels == 12
    method.check(Batch(x, y))


class Tokens(nn.Module):
    """2 x 8 patches of 4 x 1 pixels after ``prefix`` zero tokens."""

    def __init__(self, prefix: int = 0) -> None:
        super().__init__()
        self.prefix = prefix
        self.patches, self.merge, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x[:, 0].unflatten(1, (2, 4)).transpose(2, 3).flatten(1, 2))
        tokens = F.pad(tokens, (0, 0, self.prefix, 0))
        return self.head(self.merge(tokens).mean(1))


def test_prefix_tokens_and_grids_that_are_no_squares():
    x, y = data()
    method = OFAKD(Tokens(), network(CNN), stages=["merge"], sample=x)  # 16 tokens pass for a square of 4 x 4
    assert method.exits[0].tokens == 16 and len(method.exits[0].merging) == 0
    method = OFAKD(Tokens(), network(CNN), stages=["merge"], grid=(2, 8), target_grid=1, sample=x)
    assert method.exits[0].merging[0].grid == (2, 8)
    method.check(Batch(x, y))
    with pytest.raises(InputError, match=r"stage 'merge'.*18 patch tokens after 0 prefix.*prefix_tokens"):
        OFAKD(Tokens(prefix=2), network(CNN), stages=["merge"], sample=x)
    method = OFAKD(Tokens(prefix=2), network(CNN), stages=["merge"], prefix_tokens=2, sample=x)
    assert method.exits[0].prefix_tokens == 2
    with pytest.raises(InputError, match="stage 'merge'"):
        OFAKD(Tokens(), network(CNN), stages=["merge"], grid=(3, 4), sample=x)


class Pyramid(nn.Module):
    """8 x 2, then 4 x 1 tokens."""

    grid = (8, 2)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(24, 10), nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.first(x[:, 0].unflatten(2, (2, 4)).flatten(1, 2))
        quads = tokens.unflatten(1, (4, 2, 1, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.head(self.second(quads).mean(1))


def test_the_grids_of_a_pyramid_keep_the_proportions_and_merge_to_the_smallest():
    x, y = data()
    method = OFAKD(Pyramid(), network(CNN), stages=["first", "second"], target_grid=None, sample=x)
    assert [b.tokens for b in method.exits] == [16, 4]
    assert [len(b.merging) for b in method.exits] == [1, 0]
    assert method.exits[0].merging[0].grid == (8, 2)
    method.check(Batch(x, y))


def test_number_of_eps():
    x, _ = data()
    with pytest.raises(InputError, match="eps has 2 values, but the student has 3 stages: give one value, or 4"):
        OFAKD(network(CNN), network(VIT), eps=(1, 1.5), sample=x)
    assert OFAKD(network(CNN), network(VIT), eps=1.2, sample=x)._eps == (1.2,) * 4
    assert OFAKD.Config.make(eps=["1", "1.5"]).eps == (1.0, 1.5)
    for wrong in (0.9, (1.0, 0.5), (), float("inf")):
        with pytest.raises(InputError, match="eps"):
            OFAKD.Config.make(eps=wrong)


def test_the_branches_weights_start_by_width_or_as_in_the_paper():
    x = data()[0]
    wide = OFAKD(network("vit-d64-l4-h2-p4"), network(CNN), sample=x).exits[0]
    layers = [m for m in wide.modules() if isinstance(m, nn.Linear)]
    assert len(layers) > 4
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.15)
    paper = OFAKD(network("vit-d64-l4-h2-p4"), network(CNN), sample=x, exit_std=0.02).exits[0]
    for weight in (paper.head.weight, paper.blocks[0].self_attn.in_proj_weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_presets_are_valid():
    assert OFAKD.Config.make("paper").lr == 0.05
    assert OFAKD.Config.make("paper-tokens").optimizer == "adamw"
    assert OFAKD.Config.make("paper-imagenet").eps == (1.5,)


# ---- runs -------------------------------------------------------------------------------------------------------------


def test_it_resumes_exactly(tmp_path: Path):
    x, y = data(24)
    student, teacher = network(CNN), network(VIT)
    exits = OFAKD(student, teacher, sample=x).exits.state_dict()

    def make() -> OFAKD:
        method = OFAKD(copy.deepcopy(student), copy.deepcopy(teacher), sample=x, epochs=6, batch_size=4)
        method.exits.load_state_dict(exits)
        return method

    method = resumed_equals_uninterrupted(make, TensorData(x, y), tmp_path)
    assert not torch.equal(method.exits[0].head.weight, exits["0.head.weight"])


@pytest.mark.parametrize("name", [CNN, VIT])
def test_fit_on_own_modules_exports_the_plain_student(tmp_path: Path, name: str):
    from safetensors.torch import load_file

    x, y = data(16)
    student, teacher = network(name), network(MIXER)
    run = limbeck.fit(
        "ofa-kd",
        (x, y),
        student=student,
        teacher=teacher,
        test=(x, y),
        stages=student.stage_paths[1:],
        steps=3,
        batch_size=8,
        out=tmp_path / "run",
        engine={"progress": False},
    )
    assert len(run.method.exits) == len(student.stage_paths) - 1
    assert load_file(tmp_path / "run" / "artifact" / WEIGHTS).keys() == student.state_dict().keys()
    assert [row["who"] for row in run.result["rows"]] == ["student", "teacher"]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(None, None, "vit-d48-l4-h4-p2"), ("mixer-d8-l2-p4", None, "cnn-w32-s3"), (None, ("mlp-8",), "mlp-8")],
)
def test_by_name_the_default_teacher_is_of_another_family(
    monkeypatch: pytest.MonkeyPatch, student: str | None, teacher: tuple[str, ...] | None, expected: str
):
    from limbeck.methods.models import base
    from limbeck.tasks.base import TaskConfig, load_task

    asked = []

    def untrained(task: object, name: str, **_: object) -> nn.Module:
        asked.append(name)
        return build(name, in_shape=SHAPE, num_classes=10)

    monkeypatch.setattr(base, "reference_teacher", untrained)
    task = load_task(TaskConfig(train_size=40))
    setup = OFAKD.Setup.make(**({"student": student} if student else {}), **({"teacher": teacher} if teacher else {}))
    made = [OFAKD.on_task(task, setup, OFAKD.Config.make(), seed=4, progress=False) for _ in range(2)]
    assert asked == [expected] * 2
    for one, other in zip(made[0].trainable_parameters(), made[1].trainable_parameters(), strict=True):
        assert torch.equal(one, other)  # student and branches start from the seed alone


def test_a_teacher_cache_gives_the_same_loss(tmp_path: Path):
    x, y = data(16)
    student = network(CNN)
    method = OFAKD(student, Teachers(network(VIT)), sample=x).eval()
    batch = TensorData(x, y).fetch(torch.arange(16), None)
    plain = method.losses(batch).total.item()
    method.cache_teacher(TensorData(x, y), tmp_path)
    first, second = method.losses(batch).total.item(), method.losses(batch).total.item()
    assert first == second == pytest.approx(plain, rel=1e-6)
    assert method.counters["teacher_forwards"] == 2 * 16  # not asked a third time


def test_labels_are_needed():
    x, _ = data()
    method = OFAKD(network(CNN), network(VIT), sample=x)
    with pytest.raises(InputError, match="needs labels"):
        method(x)

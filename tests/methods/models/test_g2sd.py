import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import limbeck
from limbeck import networks
from limbeck.adapters.patch_tokens import patch_decoder, patch_encoder
from limbeck.blocks.masking import TokenMask
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.core.semi import SemiSupervisedData
from limbeck.losses.logits import nkd
from limbeck.methods.models import G2SD
from limbeck.methods.models.g2sd import pyramid_loss, segmentation_losses
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
SMALL = {"decoder_width": 8, "decoder_heads": 2, "decoder_depth": 2}


def network(name: str = "distvit-d8-l2-h2-p2", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return networks.build(name, in_shape=(1, 8, 8), num_classes=3)


def autoencoder(depth: int = 4) -> ViTMAEForPreTraining:
    torch.manual_seed(1)
    config = ViTMAEConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=2, num_channels=1,
        decoder_hidden_size=12, decoder_num_hidden_layers=depth, decoder_num_attention_heads=2, decoder_intermediate_size=24,
    )  # fmt: skip
    return ViTMAEForPreTraining(config)


def make(student: nn.Module | None = None, **settings: object) -> G2SD:
    student = network() if student is None else student
    task_teacher = settings.pop("task_teacher", network("maevit-d16-l2-h2-p2", 3))
    return G2SD(student, autoencoder(), task_teacher=task_teacher, **{**SMALL, **settings})


def images(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def batch(n: int = 6) -> Batch:
    return Batch(images(n), torch.arange(n) % 3)


def data(n: int = 24, labelled: int = 12) -> SemiSupervisedData:
    x = images(n)
    return SemiSupervisedData(TensorData(x[:labelled], torch.arange(labelled) % 3), TensorData(x[labelled:]))


def test_the_generic_loss_by_hand() -> None:
    method, x = make(), images()
    torch.manual_seed(9)
    found = method.losses(Batch(x))["generic"]
    torch.manual_seed(9)
    mask = TokenMask.draw(6, 16, 0.75)
    assert method.teacher_block == 1  # the second of four
    encoded = patch_encoder(method.teacher)(x, mask)
    teacher = patch_decoder(method.teacher).hidden(encoded.latent, mask, stop=1)
    target = (teacher - teacher.mean(-1, keepdim=True)) / (teacher.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    student = method.student_decoder.hidden(patch_encoder(method.student)(x, mask).latent, mask)
    d = (method.predictor(student) - target).abs()
    expected = torch.where(d < 2, d.square() / 4, d - 1).mean()
    torch.testing.assert_close(found, expected)
    assert student.shape == (6, 17, 8) and target.shape == (6, 17, 12)


@pytest.mark.parametrize(("supervise", "count"), [("all", 17), ("hidden", 12), ("visible", 4)])
def test_which_tokens_count(supervise: str, count: int) -> None:
    method = make(supervise=supervise)
    mask = TokenMask.draw(6, 16, 0.75)
    chosen = method.supervised(mask, 17)
    assert chosen.sum(1).tolist() == [count] * 6 and bool(chosen[0, 0]) == (supervise == "all")
    if supervise == "hidden":
        assert torch.equal(chosen[:, 1:], mask.removed)


def test_the_teachers_decoder_stops() -> None:
    method = make()
    calls: list[int] = []
    for number, layer in enumerate(method.teacher.decoder.decoder_layers):
        layer.register_forward_hook(lambda *_, n=number: calls.append(n))
    method.losses(Batch(images()))
    assert calls == [0, 1]


def test_generic_gradients() -> None:
    method = make(encoder_weight=0.5)
    losses = method.losses(Batch(images()))
    assert set(losses) == {"generic", "encoder"}
    losses.total.backward()
    assert all(p.grad is None for p in (*method.teacher.parameters(), *method.task_teacher.parameters()))
    assert all(p.grad is not None for p in method.predictor.parameters())
    decoder = method.decoder
    assert decoder.mask_token.grad is not None and decoder.decoder_pred.weight.grad is None  # no pixel head
    unused = {n.split(".")[0] for n, p in method.student.named_parameters() if p.requires_grad and p.grad is None}
    assert unused == {"distillation_token", "head", "head_distillation"}


def test_the_encoder_term_is_off_as_published() -> None:
    assert set(make().losses(Batch(images()))) == {"generic"}


def test_the_specific_loss_by_hand() -> None:
    method = make(finetune_steps=1, label_smoothing=0.2, mixup=0.0, cutmix=0.0)
    x = batch()
    losses = method.finetuning_losses(x)
    own, distilled = method.student.both(x.inputs)
    soft = F.one_hot(x.labels, 3) * 0.8 + 0.2 / 3
    torch.testing.assert_close(losses["ce"], -(soft * F.log_softmax(own, 1)).sum(1).mean())
    hard = method.task_teacher(x.inputs).argmax(1)
    torch.testing.assert_close(losses["token"], F.cross_entropy(distilled, hard))
    torch.testing.assert_close(losses.total, (losses["ce"] + losses["token"]) / 2)


def test_the_teacher_sees_the_mixed_image() -> None:
    method = make(finetune_steps=1, cutmix=1.0)
    seen: list[torch.Tensor] = []
    for module in (method.task_teacher, method.student):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    method.student.both = lambda x: (seen.append(x), network().both(x))[1]  # the student's own entrance
    torch.manual_seed(0)
    method.finetuning_losses(batch())
    assert len(seen) == 2 and torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], images())


def test_the_normalised_loss_takes_a_single_head() -> None:
    method = make(
        network("maevit-d8-l2-h2-p2"),
        specific="nkd",
        finetune_steps=1,
        nkd_alpha=0.7,
        nkd_temperature=2.0,
        mixup=0.0,
        cutmix=0.0,
    )
    x = batch()
    expected = nkd(method.student(x.inputs), method.task_teacher(x.inputs), x.labels, 0.7, 2.0)
    torch.testing.assert_close(method.finetuning_losses(x).total, expected)


def test_a_teacher_that_fits_its_labels_says_more_than_they_do_on_mixed_images_only() -> None:
    x = batch(3)

    class Knows(nn.Module):
        """Answers with the nearest training image's label."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return -torch.cdist(images.flatten(1), x.inputs.flatten(1))

    def terms(**mixing: float) -> dict[str, float]:
        torch.manual_seed(1)
        method = make(finetune_steps=1, task_teacher=Knows(), **mixing)
        with torch.no_grad():
            method.student.head.weight.normal_()
            method.student.head_distillation.load_state_dict(method.student.head.state_dict())
            method.student.both = lambda images: (z := method.student.head(images.flatten(1)[:, :8]), z)
            return {k: float(v) for k, v in method.finetuning_losses(x).items()}

    plain = terms(mixup=0.0, cutmix=0.0)
    assert plain["ce"] == pytest.approx(plain["token"], rel=1e-5)
    mixed = terms()  # as published
    assert mixed["ce"] != pytest.approx(mixed["token"], rel=1e-2)


def test_labels_alone_teach_both_heads() -> None:
    method = make(specific="none", finetune_steps=1, task_teacher=None)
    assert set(method.finetuning_losses(batch())) == {"ce", "ce_distillation"}
    single = make(network("maevit-d8-l2-h2-p2"), specific="none", finetune_steps=1, task_teacher=None)
    assert set(single.finetuning_losses(batch())) == {"ce"}
    assert single.counters["teacher_forwards"] == 0 and set(single.contestants()) == {"student"}


def test_the_distillation_token_stands_last_and_has_no_position() -> None:
    model, x = network(), images(2)
    encoded = model.encode(x)
    assert encoded.tokens.shape == (2, 18, 8)
    own, distilled = model.both(x)
    torch.testing.assert_close(model(x), (own + distilled) / 2)
    first = []
    patch_encoder(model).blocks[0].register_forward_pre_hook(lambda _, args: first.append(args[0]))
    model(x)
    torch.testing.assert_close(first[0][:, -1], model.distillation_token[:, 0].expand(2, -1))
    assert encoded.mean(behind=1).shape == (2, 8)
    torch.testing.assert_close(encoded.mean(behind=1), encoded.tokens[:, 1:17].mean(1))


@pytest.mark.parametrize("stops", [(3, 5), (7,)])
def test_a_run_resumes_exactly_in_every_stage(tmp_path: Path, stops: tuple[int, ...]) -> None:
    def method() -> G2SD:
        torch.manual_seed(3)
        return G2SD(
            network(), network("maevit-d16-l2-h2-p2", 1), pretrained=False, teacher_epochs=2, steps=8, finetune_steps=6,
            batch_size=6, finetune_batch_size=4, teacher_decoder_width=8, cutmix=1.0, **SMALL,
        )  # fmt: skip

    done = resumed_equals_uninterrupted(method, data(), tmp_path, stops=stops, every=2)
    names = [s.name for s in done.stages(data())]
    assert names == ["teacher-pretraining", "generic", "teacher-finetuning", "specific"]


def test_each_stage_trains_its_own_parts() -> None:
    torch.manual_seed(0)
    method = G2SD(
        network(), network("maevit-d16-l2-h2-p2", 1), pretrained=False, teacher_epochs=1, steps=2, finetune_steps=2,
        batch_size=6, teacher_decoder_width=8, **SMALL,
    )  # fmt: skip
    expected = [{"teacher", "teacher_decoder"}, {"student", "decoder", "predictor"}, {"teacher"}, {"student"}]
    for stage, parts in zip(method.stages(data()), expected, strict=True):
        before = copy.deepcopy(method.state_dict())
        Engine(None, EngineConfig(progress=False)).run(method, [stage])
        changed = {k.split(".")[0] for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == parts, stage.name


def test_by_fit_on_modules_of_ones_own(tmp_path: Path) -> None:
    method = make(steps=3, finetune_steps=3, batch_size=8)
    run = limbeck.fit(
        method, data(), test=(images(9), torch.arange(9) % 3), out=tmp_path / "run", engine={"progress": False}
    )
    assert [r["who"] for r in run.result["rows"]] == ["student", "teacher"]
    kept = run.result["rows"][0]["accuracy"] / run.result["rows"][1]["accuracy"]
    assert run.result["retained_accuracy"] == pytest.approx(kept) and 0 < run.result["teacher_flops_ratio"] < 1
    assert set(limbeck.load(tmp_path / "run").content.state_dict()) == set(network().state_dict())


def test_segmentation_and_detection_losses() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[0, 0] = -100
    losses = segmentation_losses(student, teacher, labels, auxiliary=student, weight=10.0)
    p, log_q = torch.softmax(teacher.flatten(2), -1), torch.log_softmax(student.flatten(2), -1)
    torch.testing.assert_close(losses["channels"], (p * (p.log() - log_q)).sum(-1).mean())
    torch.testing.assert_close(losses["ce"], F.cross_entropy(student, labels, ignore_index=-100))
    torch.testing.assert_close(losses.total, 1.4 * losses["ce"] + 10 * losses["channels"])
    levels = {"p3": student, "p4": student}
    expected = 2 * F.mse_loss(student, teacher)
    torch.testing.assert_close(pyramid_loss(levels, {"p3": teacher, "p4": teacher}), expected)
    with pytest.raises(InputError, match="levels differ"):
        pyramid_loss(levels, {"p3": teacher})


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: G2SD(network(), network("maevit-d8-l1-h2-p2", 2)), "needs the teacher's decoder"),
        (lambda: make(teacher_block=4), "blocks 0 to 3, and no block 4"),
        (lambda: make(finetune_steps=1, task_teacher=None), "needs a fine-tuned teacher"),
        (lambda: make(network("maevit-d8-l1-h2-p2"), finetune_steps=1), "needs a student with a distillation token"),
        (lambda: make(supervise="hidden", mask_ratio=0.0), "needs hidden patches"),
        (lambda: make(network("distvit-d8-l1-h2-p4")), "token grids do not match"),
    ],
)
def test_mistakes(act: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        act()

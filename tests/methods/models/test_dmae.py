import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck import networks
from limbeck.adapters.patch_tokens import patch_encoder
from limbeck.blocks.masking import TokenMask
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.core.semi import SemiSupervisedData
from limbeck.methods.models import DMAE
from limbeck.methods.models.dmae import three_quarters
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)


def network(name: str = "maevit-d8-l4-h2-p2", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return networks.build(name, in_shape=(1, 8, 8), num_classes=3)


def make(**settings: object) -> DMAE:
    student, teacher = network(), network("maevit-d16-l8-h2-p2", 1)
    torch.manual_seed(2)
    return DMAE(student, teacher, **{"decoder_width": 8, "decoder_heads": 2, "decoder_depth": 1, **settings})


def images(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def data(n: int = 24, labelled: int = 12) -> SemiSupervisedData:
    x = images(n)
    return SemiSupervisedData(TensorData(x[:labelled], torch.arange(labelled) % 3), TensorData(x[labelled:]))


def test_the_loss_by_hand() -> None:
    method = make(feature_weight=3.0, pixel_weight=2.0, normalise_pixels=False)
    x = images()
    torch.manual_seed(9)
    losses = method.losses(Batch(x))
    torch.manual_seed(9)
    mask = TokenMask.draw(6, 16, 0.75)
    ours, theirs = patch_encoder(method.student), patch_encoder(method.teacher)
    assert method.pairs == ((2, 5),)  # three quarters of 4 and of 8 blocks
    hidden = ours(x, mask, taps=[2])
    target = theirs(x, mask, taps=[5]).hidden[5]
    projected = method.projections[0](hidden.hidden[2])
    features = (
        (projected / projected.norm(dim=-1, keepdim=True) - target / target.norm(dim=-1, keepdim=True)).abs().mean()
    )
    torch.testing.assert_close(losses["features"], features)
    decoder = method.student_decoder
    predicted = decoder.pixels(decoder.hidden(hidden.latent, mask))
    errors = []
    for b in range(6):
        for patch in range(16):
            if mask.removed[b, patch]:
                row, column = divmod(patch, 4)
                true = x[b, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
                errors.append((predicted[b, patch] - true).square().mean())
    torch.testing.assert_close(losses["pixels"], torch.stack(errors).mean())
    torch.testing.assert_close(losses.total, 3 * losses["features"] + 2 * losses["pixels"])


def test_the_published_pairs() -> None:
    assert (three_quarters(12), three_quarters(24)) == (8, 17)


def test_no_teacher_block_behind_the_aligned_one_is_run() -> None:
    method = make()
    calls: list[int] = []
    for number, block in enumerate(patch_encoder(method.teacher).blocks):
        block.register_forward_hook(lambda *_, n=number: calls.append(n))
    method.losses(Batch(images()))
    assert calls == [0, 1, 2, 3, 4, 5] and method.counters["teacher_forwards"] == 6


def test_the_teacher_never_sees_a_hidden_patch() -> None:
    method, x = make(), images()
    mask = TokenMask.draw(6, 16, 0.75)
    hidden = mask.removed.reshape(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    other = torch.where(hidden, torch.full_like(x, 7.0), x)
    torch.testing.assert_close(method.teacher_features(x, mask)[5], method.teacher_features(other, mask)[5])


def test_gradients_reach_the_student_and_its_helpers_only() -> None:
    method = make()
    method(Batch(images())).backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.projections.parameters())
    assert all(p.grad is not None for p in method.decoder.parameters() if p.requires_grad)
    unused = {n for n, p in method.student.named_parameters() if p.requires_grad and p.grad is None}
    assert unused == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def test_features_alone_leave_blocks_behind_the_pair_alone() -> None:
    method = make(pixel_weight=0.0)
    method(Batch(images())).backward()
    blocks = patch_encoder(method.student).blocks
    assert blocks[2].mlp.fc1.weight.grad is not None and blocks[3].mlp.fc1.weight.grad is None


def test_without_the_features_it_is_a_masked_autoencoder() -> None:
    method = make(feature_weight=0.0)
    assert set(method.losses(Batch(images()))) == {"pixels"} and method.counters["teacher_forwards"] == 0


def test_nothing_hidden_means_nothing_to_reconstruct() -> None:
    assert set(make(mask_ratio=0.0).losses(Batch(images()))) == {"features"}


def test_several_pairs_and_projections() -> None:
    method = make(pairs=((0, 1), (3, 7)), projection="mlp2", feature_distance="l2")
    losses = method.losses(Batch(images()))
    assert set(losses) == {"pixels", "features_0_1", "features_3_7"} and len(method.projections[0]) == 6
    same = DMAE(network(), network(seed=4), projection="none", decoder_width=8, decoder_heads=2)
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(same.feature_distance(a, b), F.l1_loss(a, b))  # and is not normalised


def test_an_identical_student_has_no_feature_loss() -> None:
    teacher = network()
    method = DMAE(copy.deepcopy(teacher), teacher, projection="none", decoder_width=8, decoder_heads=2)
    assert method.losses(Batch(images()))["features"] == 0


def test_half_precision_features_do_not_overflow() -> None:
    method = make()
    big = torch.full((1, 2, 16), 300.0, dtype=torch.float16)
    assert (
        torch.isfinite(method.feature_distance(big, big)) and method.feature_distance(big, big).dtype == torch.float32
    )


def test_a_bare_loop_learns_the_teachers_tokens() -> None:
    method = make(pixel_weight=0.0)
    optimizer = torch.optim.AdamW(method.trainable_parameters(), lr=5e-3)
    first = method(images(16)).item()
    for _ in range(60):
        loss = method(images(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first


@pytest.mark.parametrize("stops", [(3, 5), (7,)])
def test_a_run_resumes_exactly_in_every_stage(tmp_path: Path, stops: tuple[int, ...]) -> None:
    def method() -> DMAE:
        torch.manual_seed(3)
        return DMAE(
            network(), network("maevit-d16-l8-h2-p2", 1), pretrained=False, teacher_epochs=2, steps=8, finetune_steps=6,
            decoder_width=8, decoder_heads=2, teacher_decoder_width=8, batch_size=6, finetune_batch_size=4, mixup=0.5,
        )  # fmt: skip

    done = resumed_equals_uninterrupted(method, data(), tmp_path, stops=stops, every=2)
    assert [s.name for s in done.stages(data())] == ["teacher-pretraining", "distillation", "finetuning"]


def test_stages_train_what_they_should() -> None:
    method = make(steps=2, finetune_steps=2, batch_size=4)
    before = copy.deepcopy(method.state_dict())
    engine = limbeck.core.engine.Engine(None, limbeck.core.engine.EngineConfig(progress=False))
    engine.run(method, method.stages(data()))
    changed = {k.split(".")[0] for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"student", "decoder", "projections", "reconstructions"}


def test_by_fit_on_modules_of_ones_own(tmp_path: Path) -> None:
    run = limbeck.fit(
        "dmae", (images(12), torch.arange(12) % 3), unlabelled=images(20), student=network(), teacher=network("maevit-d16-l4-h2-p2"),
        test=(images(9), torch.arange(9) % 3), out=tmp_path / "run", engine={"progress": False},
        steps=3, finetune_steps=3, batch_size=8, decoder_width=8, decoder_heads=2,
    )  # fmt: skip
    assert 0.05 < run.result["teacher_flops_ratio"] < 0.4  # a quarter of the patches through three of four blocks
    assert run.result["rows"][0]["who"] == "student"
    assert any(p["title"].startswith("Masked images") for p in run.result["pictures"])
    keys = set(limbeck.load(tmp_path / "run").content.state_dict())
    assert keys == set(network().state_dict())


def test_pretraining_alone_needs_no_labels() -> None:
    run = limbeck.fit(
        "dmae", images(16), student=network(), teacher=network("maevit-d16-l4-h2-p2"), steps=3, engine={"progress": False},
        decoder_width=8, decoder_heads=2,
    )  # fmt: skip
    assert "rows" not in run.result


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: DMAE(network(), network("maevit-d8-l2-h2-p4")), "token grids do not match"),
        (lambda: make(pairs=((0, 8),)), "the teacher has blocks 0 to 7"),
        (lambda: make(pairs=()), "pairs is empty"),
        (lambda: make(projection="none"), "the student is 8 wide and the teacher 16"),
        (lambda: make(feature_weight=0.0, pixel_weight=0.0), "nothing would be learnt"),
        (lambda: make(feature_weight=0.0, mask_ratio=0.0), "nothing to reconstruct"),
        (lambda: make().losses(Batch(torch.zeros(2, 3, 8, 8))), r"images have shape \(3, 8, 8\)"),
        (lambda: make(finetune_steps=3).stages(TensorData(images())), "the data has none"),
        (lambda: (lambda m: DMAE(m, m))(network()), "same module"),
        (lambda: DMAE(nn.Linear(2, 2), network()), "no vision transformer"),
        (lambda: make(finetune_steps=1).check(Batch(images(), torch.full((6,), 3))), "labels go from 3 to 3"),
        (lambda: limbeck.fit("dmae", images(), teacher=network()), "needs student"),
    ],
)
def test_mistakes(act: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        act()

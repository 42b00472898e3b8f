from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.blocks.taps import Tap
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.metrics.layer_similarity import cka_map
from limbeck.metrics.similarity import MinibatchCKA, linear_cka
from limbeck.networks import build


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def two() -> tuple[nn.Module, nn.Module]:
    return (
        build("vit-d8-l4-h2-p4", in_shape=(1, 8, 8), num_classes=3),
        build("cnn-w4-s2", in_shape=(1, 8, 8), num_classes=3),
    )


def test_it_is_the_minibatch_estimate_of_the_tapped_features():
    teacher, student = two()
    x = torch.randn(22, 1, 8, 8)
    found = cka_map(teacher, student, x, batch_size=10)
    assert found.teacher_layers == tuple(teacher.stage_paths)
    assert found.student_layers == ("stages.0", "stages.1")
    assert found.values.shape == (3, 2)

    cka = MinibatchCKA()
    teacher.eval()
    student.eval()
    for part in (x[:10], x[10:20]):  # the last two samples are too few for an estimate
        with torch.no_grad():
            hidden = teacher.vit(pixel_values=part, output_hidden_states=True).hidden_states[1:]
            first = student.stages[0](part)
            cka.update([hidden[0], hidden[1], hidden[3]], [first, student.stages[1](first)])
    torch.testing.assert_close(found.values, cka.compute(), rtol=1e-6, atol=1e-8)


def test_a_network_with_itself_is_1_on_the_diagonal_and_symmetric():
    network = two()[1]
    found = cka_map(network, network, torch.randn(16, 1, 8, 8))
    assert found.diagonal == pytest.approx(1)
    torch.testing.assert_close(found.values, found.values.T)
    assert found.values[0, 1] < 0.999


def test_one_batch_is_the_unbiased_cka():
    teacher, student = two()
    x = torch.randn(12, 1, 8, 8)
    found = cka_map(teacher, student, x, "classifier", "head")
    with torch.no_grad():
        expected = linear_cka(teacher.eval()(x), student.eval()(x), unbiased=True)
    assert found.values.item() == pytest.approx(expected, rel=1e-5)


def test_modes_are_put_back_and_no_buffer_changes():
    teacher, student = two()
    teacher.eval()
    student.train()
    student.stages[0].eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    cka_map(teacher, student, torch.randn(8, 1, 8, 8))
    assert not teacher.training
    assert student.training and student.stages[1].training and not student.stages[0].training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    with pytest.raises(UnknownNameError, match=r"stages\.7"):
        cka_map(teacher, student, torch.randn(8, 1, 8, 8), None, ["stages.7"])
    assert student.training


def test_wrong_input_is_explained():
    teacher, student = two()
    x = torch.randn(8, 1, 8, 8)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(InputError, match="give student_taps"):
        cka_map(teacher, plain, x)
    with pytest.raises(InputError, match="at least 4 samples"):
        cka_map(teacher, student, x, batch_size=3)
    with pytest.raises(InputError, match="at least 4 samples"):
        cka_map(teacher, student, x[:3])
    with pytest.raises(InputError, match="no diagonal"):
        cka_map(teacher, student, x).diagonal
    with pytest.raises(InputError, match="several tensors"):
        cka_map(teacher, plain, x, None, Tap("1", call="all"))

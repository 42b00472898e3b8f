import pytest
import torch

from limbeck.blocks.mixup import mix, soft_labels
from limbeck.core.errors import InputError


def test_smoothed_labels() -> None:
    found = soft_labels(torch.tensor([1]), 4, 0.2)
    assert torch.allclose(found, torch.tensor([[0.05, 0.85, 0.05, 0.05]]))
    soft = torch.tensor([[0.25, 0.75]])
    assert torch.equal(soft_labels(soft, 2), soft)


def test_mixup_mixes_labels_as_it_mixes_images() -> None:
    torch.manual_seed(0)
    images = torch.eye(6)[:, :, None, None]  # image i is the unit vector i, so a mixture shows its shares
    mixed, target = mix(images, torch.arange(6), 6, mixup=0.8)
    assert torch.allclose(mixed.flatten(1), target, atol=1e-6) and not torch.equal(mixed, images)


def test_cutmix_mixes_labels_by_area() -> None:
    torch.manual_seed(0)
    images = torch.eye(5)[:, :, None, None].expand(5, 5, 10, 10)
    mixed, target = mix(images, torch.arange(5), 5, cutmix=1.0)
    assert torch.allclose(mixed.mean((2, 3)), target, atol=1e-6)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}  # pixels are pasted, not blended


def test_off_leaves_images_alone() -> None:
    images = torch.randn(3, 1, 2, 2)
    mixed, target = mix(images, torch.tensor([0, 1, 1]), 2)
    assert mixed is images and target.tolist() == [[1, 0], [0, 1], [0, 1]]


def test_a_negative_alpha() -> None:
    with pytest.raises(InputError, match="alpha"):
        mix(torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long), 2, mixup=-1)

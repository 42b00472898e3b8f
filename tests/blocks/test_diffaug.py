import pytest
import torch

from limbeck.blocks.diffaug import OPERATIONS, DiffAug
from limbeck.core.errors import UnknownNameError


@pytest.fixture
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_replays_and_is_linear_or_smooth_in_the_pixels(images, operation):
    augment = DiffAug(operation)
    parameters = augment.draw(6, torch.Generator().manual_seed(1))
    first, again = augment.apply(images, parameters), augment.apply(images, parameters)
    assert torch.equal(first, again)
    assert first.shape == images.shape
    assert torch.autograd.gradcheck(lambda x: augment.apply(x, parameters[:1]), images[:1].clone().requires_grad_())


def test_rows_are_treated_one_by_one(images):
    augment = DiffAug()
    parameters = augment.draw(6, torch.Generator().manual_seed(3))
    together = augment.apply(images, parameters)
    apart = torch.cat([augment.apply(images[i : i + 1], parameters[i : i + 1]) for i in range(6)])
    assert len(set(parameters[:, 0].tolist())) > 1  # several operations in one batch
    assert torch.allclose(together, apart)


def test_crop_moves_whole_pixels_and_fills_with_zeros():
    image = torch.arange(64.0).view(1, 1, 8, 8)
    parameters = torch.zeros(1, 7)  # lowest uniform numbers: one pixel towards the lower right
    moved = DiffAug("crop").apply(image, parameters)
    assert torch.equal(moved[0, 0, 1:, 1:], image[0, 0, :-1, :-1])
    assert float(moved[0, 0, 0].abs().sum() + moved[0, 0, :, 0].abs().sum()) == 0


def test_flip_mirrors_half_of_the_images(images):
    augment = DiffAug("flip")
    parameters = augment.draw(1000, torch.Generator().manual_seed(0))
    assert 400 < int((parameters[:, 1] < 0.5).sum()) < 600
    parameters = parameters[:6]
    expected = torch.where((parameters[:, 1] < 0.5)[:, None, None, None], images.flip(-1), images)
    assert torch.equal(augment.apply(images, parameters), expected)


def test_cutout_zeroes_a_square_of_half_the_side():
    parameters = torch.full((1, 7), 0.5)
    parameters[:, 0] = 0
    left = DiffAug("cutout").apply(torch.ones(1, 1, 8, 8), parameters)
    assert int((left == 0).sum()) == 16


def test_neutral_strengths_leave_images_alone(images):
    neutral = (DiffAug("scale", scale=1.0), DiffAug("rotate", rotate=0.0), DiffAug("crop", crop=0.0), DiffAug("none"))
    for augment in neutral:
        assert torch.allclose(augment(images), images, atol=1e-6)
    for operation in ("scale", "rotate", "color", "cutout"):  # while the usual strengths do change them
        assert not torch.allclose(DiffAug(operation)(images), images, atol=1e-3)


def test_siamese_draws_are_shared():
    augment = DiffAug()
    assert len(augment.draw(5, shared="all").unique(dim=0)) == 1
    rows = augment.draw(50, shared="op")
    assert len(rows[:, 0].unique()) == 1 and len(rows.unique(dim=0)) == 50


def test_unknown_operation():
    with pytest.raises(UnknownNameError, match="augmentation 'crops'"):
        DiffAug("color_crops")

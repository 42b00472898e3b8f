from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras, orbit
from limbeck.rendering.captures import read_capture
from limbeck.rendering.colmap import write_colmap
from limbeck.rendering.posed_npz import write_posed_npz
from limbeck.rendering.transforms_io import Views, write_transforms

torch.set_num_threads(1)


def some() -> Cameras:
    middle = torch.tensor(4.0), torch.tensor(3.0)
    return Cameras(orbit([0.0, 70, 200], 20.0, 3.0).c2w, torch.tensor(10.0), torch.tensor(10.0), *middle, 8, 6)


def written(folder: Path, form: str) -> tuple[Path, torch.Tensor]:
    """The same three pictures in each format."""
    cameras, images = some(), torch.randint(0, 256, (3, 6, 8, 3), generator=torch.Generator().manual_seed(0)) / 255
    path = folder
    write_transforms(folder, cameras, images)
    if form == "transforms":
        return path, images
    (folder / "transforms.json").unlink()
    if form == "colmap":
        write_colmap(folder / "sparse/0", cameras)
    elif form == "llff":
        right, up, back, place = (cameras.c2w.numpy()[:, :3, k] for k in range(4))
        size = np.tile([6.0, 8.0, 10.0], (3, 1))
        rows = np.stack([-up, right, back, place, size], -1).reshape(3, 15)
        np.save(folder / "poses_bounds.npy", np.concatenate([rows, np.tile([1.0, 9.0], (3, 1))], 1))
    else:
        path = write_posed_npz(folder / "all.npz", Views(cameras, images))
    return path, images


@pytest.mark.parametrize("form", ["transforms", "colmap", "llff", "npz"])
def test_every_format_gives_the_same(tmp_path: Path, form: str):
    path, images = written(tmp_path, form)
    views = read_capture(path)
    assert views.images is not None
    torch.testing.assert_close(views.images, images)
    torch.testing.assert_close(views.cameras.c2w, some().c2w)
    torch.testing.assert_close(views.cameras.intrinsics, some().intrinsics)
    assert read_capture(path, reduce=2).cameras.width == 4
    if form != "npz":
        assert read_capture(path, images=False).images is None
    if form == "colmap":
        inner = read_capture(tmp_path / "sparse/0").images
        assert inner is not None and inner.equal(views.images)


def test_shrunk_pictures_serve_where_there_are_no_others(tmp_path: Path):
    _, images = written(tmp_path, "colmap")
    (tmp_path / "images").rename(tmp_path / "images_2")
    for file in (tmp_path / "images_2").iterdir():
        with Image.open(file) as picture:
            small = picture.reduce(2)
        small.save(file)
    views = read_capture(tmp_path)
    assert views.images is not None and views.images.shape == (3, 3, 4, 3)
    means = torch.nn.functional.avg_pool2d(images.movedim(-1, 1), 2).movedim(1, -1)
    torch.testing.assert_close(views.images, means, atol=0.003, rtol=0)
    torch.testing.assert_close(views.cameras.fx, some().fx / 2)


def test_bad_input_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        read_capture(tmp_path / "none")
    with pytest.raises(InputError, match="holds no posed pictures: expected transforms.json"):
        read_capture(tmp_path)
    write_colmap(tmp_path / "model" / "sparse" / "0", some(), ["0000.png", "0001.png", "0002.png"])
    with pytest.raises(InputError, match="has no folder of pictures"):
        read_capture(tmp_path / "model")
    assert len(read_capture(tmp_path / "model", images=False).cameras) == 3

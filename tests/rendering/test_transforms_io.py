from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.core.errors import InputError, RunError
from limbeck.rendering.cameras import Cameras, orbit
from limbeck.rendering.transforms_io import read_transforms, write_transforms

torch.set_num_threads(1)

FOX = Path(os.environ.get("LIMBECK_DATA", "/nowhere")) / "fox"


def some(lens: bool = False, own: bool = False) -> Cameras:
    poses = orbit([0.0, 70, 200], 20.0, 3.0).c2w
    fx = torch.tensor([10.0, 11, 12]) if own else torch.tensor(10.0)
    k = torch.tensor([0.05, -0.08, 0.01, -0.001, 0.002]).expand(3, 5) if lens else None
    return Cameras(poses, fx, torch.tensor(9.5), torch.tensor(4.2), torch.tensor(2.9), 8, 6, distortion=k)


def change(file: Path, **more: Any) -> dict[str, Any]:
    data = json.loads(file.read_text()) | more
    file.write_text(json.dumps(data))
    return data


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("lens", [False, True])
def test_round_trip(tmp_path: Path, lens: bool, own: bool):
    cameras, images = some(lens, own), torch.randint(0, 256, (3, 6, 8, 3)) / 255
    file = write_transforms(tmp_path, cameras, images)
    data = json.loads(file.read_text())
    assert ("fl_x" in data) != own and ("fl_x" in data["frames"][0]) == own and data["fl_y"] == 9.5
    views = read_transforms(tmp_path)
    for name in ("c2w", "fx", "fy", "cx", "cy"):
        torch.testing.assert_close(getattr(views.cameras, name), getattr(cameras, name))
    assert (views.cameras.distortion is None) != lens
    if lens:
        torch.testing.assert_close(views.cameras.distortion, cameras.distortion)
    assert views.images is not None and views.alpha is None
    torch.testing.assert_close(views.images, images)
    assert read_transforms(file, images=False).images is None


def test_nerf_synthetic_files(tmp_path: Path):
    """camera_angle_x, no suffixes, no sizes, RGBA on a background of choice."""
    rgba = np.zeros((4, 8, 4), np.uint8)
    rgba[..., 0], rgba[:, :4, 3] = 255, 51
    Image.fromarray(rgba).save(tmp_path / "r_0.png")
    frame = {"file_path": "./r_0", "transform_matrix": orbit([0.0]).c2w[0].tolist()}
    file = tmp_path / "transforms_train.json"
    file.write_text(json.dumps({"camera_angle_x": 0.6911112, "frames": [frame]}))
    views = read_transforms(file, background=(0.0, 0.5, 1.0))
    assert float(views.cameras.fx[0]) == pytest.approx(4 / math.tan(0.6911112 / 2), rel=1e-5)
    assert float(views.cameras.fy[0]) == float(views.cameras.fx[0])
    assert float(views.cameras.cx[0]) == 4 and views.cameras.height == 4
    assert views.images is not None and views.alpha is not None
    torch.testing.assert_close(views.images[0, 0, 0], torch.tensor([0.2, 0.4, 0.8]))
    torch.testing.assert_close(views.images[0, 0, 7], torch.tensor([0.0, 0.5, 1.0]))
    half = read_transforms(file, reduce=2)
    assert half.images is not None and half.images.shape == (1, 2, 4, 3)
    assert float(half.cameras.fx[0]) == pytest.approx(float(views.cameras.fx[0]) / 2)
    with pytest.raises(InputError, match="not divisible"):
        read_transforms(file, reduce=3)


def test_damage_is_named(tmp_path: Path):
    file = write_transforms(tmp_path, some(), torch.rand(3, 6, 8, 3))
    whole = json.loads(file.read_text())

    def frames(**more: Any) -> list[dict[str, Any]]:
        return [whole["frames"][0], {**whole["frames"][1], **more}, whole["frames"][2]]

    scaled = (torch.tensor(whole["frames"][1]["transform_matrix"]) * torch.tensor([2.0, 2, 2, 1])).tolist()
    for changes, words in (
        ({"frames": frames(transform_matrix=scaled)}, "the pose of images/0001.png is no rotation"),
        ({"frames": frames(transform_matrix=[[1, 2], [3]])}, "0001.png is not 4 x 4"),
        ({"frames": frames(file_path="images/none.png")}, r"1 of 3 pictures of .* missing \(images/none.png\)"),
        ({"frames": [{"file_path": "a"}]}, "frame 0 needs"),
        ({"frames": []}, "no 'frames'"),
        ({"frames": whole["frames"], "camera_model": "OPENCV_FISHEYE"}, "camera model OPENCV_FISHEYE"),
        ({"camera_model": "OPENCV", "w": 9}, "says 9 x 6 but its pictures are 8 x 6"),
        ({"w": 8, "frames": frames(w=7)}, "mixes picture sizes"),
    ):
        change(file, **changes)
        with pytest.raises(InputError, match=words):
            read_transforms(file)
    del whole["fl_x"], whole["fl_y"]
    file.write_text(json.dumps(whole))
    with pytest.raises(InputError, match="no focal length"):
        read_transforms(file)
    (tmp_path / "images/0001.png").write_text("no picture")
    with pytest.raises(InputError, match="0001.png is not a readable picture"):
        read_transforms(file)
    with pytest.raises(RunError, match="does not exist"):
        read_transforms(tmp_path / "none.json")
    with pytest.raises(InputError, match="as many names"):
        write_transforms(tmp_path, some(), names=["a"])
    with pytest.raises(InputError, match="pictures are"):
        write_transforms(tmp_path, some(), torch.rand(3, 8, 6, 3))


@pytest.mark.skipif(not FOX.is_dir(), reason="needs fox/ under LIMBECK_DATA")
def test_the_fox():
    views = read_transforms(FOX, reduce=10)
    assert views.images is not None and views.images.shape == (50, 48, 27, 3) and views.aabb_scale == 4
    assert float(views.cameras.fx[0]) == pytest.approx(34.388) and views.cameras.distortion is not None
    pixels = torch.rand(40, 2) * torch.tensor([27.0, 48.0]) - 0.5
    o, d = views.cameras.rays(7, pixels)
    uv, _ = views.cameras.project(o + 3 * d)
    torch.testing.assert_close(uv[7], pixels + 0.5, atol=1e-3, rtol=0)

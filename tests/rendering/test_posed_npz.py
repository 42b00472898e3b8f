from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras, orbit
from limbeck.rendering.posed_npz import read_posed_npz, write_posed_npz
from limbeck.rendering.transforms_io import Views

torch.set_num_threads(1)


def parts() -> dict[str, np.ndarray]:
    poses = orbit([0.0, 70, 200], 20.0, 3.0).c2w.numpy()
    return {
        "images": np.random.default_rng(0).random((3, 6, 8, 3), np.float32),
        "poses": poses,
        "focal": np.array(12.5),
    }


def test_the_small_lego_layout(tmp_path: Path):
    given = parts()
    np.savez(tmp_path / "lego.npz", **given)
    views = read_posed_npz(tmp_path / "lego.npz", near=2.0, far=6.0)
    assert views.images is not None and views.images.equal(torch.from_numpy(given["images"])) and views.alpha is None
    cameras = views.cameras
    assert cameras.c2w.equal(torch.from_numpy(given["poses"])) and (cameras.near, cameras.far) == (2.0, 6.0)
    assert cameras.fx.tolist() == cameras.fy.tolist() == [12.5] * 3
    assert cameras.cx.tolist() == [4] * 3 and cameras.cy.tolist() == [3] * 3
    half = read_posed_npz(tmp_path / "lego.npz", reduce=2)
    assert half.images is not None and half.images.shape == (3, 3, 4, 3) and half.cameras.fx.tolist() == [6.25] * 3


def test_bytes_and_alpha(tmp_path: Path):
    rgba = np.zeros((3, 6, 8, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 255, 51
    np.savez(tmp_path / "a.npz", **{**parts(), "images": rgba, "focal": np.array([1.0, 2, 3])})
    views = read_posed_npz(tmp_path / "a.npz", background=(0.0, 0.5, 1.0))
    assert views.images is not None and views.alpha is not None
    torch.testing.assert_close(views.images[0, 0, 0], torch.tensor([0.2, 0.4, 0.8]))
    torch.testing.assert_close(views.alpha, torch.full((3, 6, 8), 0.2))
    assert views.cameras.fx.tolist() == [1, 2, 3]


def test_round_trip(tmp_path: Path):
    images = torch.randint(0, 256, (3, 6, 8, 3)) / 255
    middle = torch.tensor(4.0), torch.tensor(3.0)
    focal = torch.tensor([10.0, 11, 12])
    cameras = Cameras(orbit([0.0, 70, 200], 20.0, 3.0).c2w, focal, focal, *middle, 8, 6)
    path = write_posed_npz(tmp_path / "new" / "a.npz", Views(cameras, images))
    again = read_posed_npz(path)
    assert again.images is not None and again.cameras.c2w.equal(cameras.c2w) and again.cameras.fx.equal(focal)
    torch.testing.assert_close(again.images, images)
    with pytest.raises(InputError, match="no pictures"):
        write_posed_npz(path, Views(cameras))
    with pytest.raises(InputError, match="centred pinholes"):
        write_posed_npz(path, Views(replace(cameras, cx=cameras.cx + 1), images))


def test_damage_is_named(tmp_path: Path):
    file, good = tmp_path / "a.npz", parts()
    sheared = good["poses"].copy()
    sheared[1, 0, 0] += 1
    for changes, words in (
        ({"images": good["images"][..., 0]}, r"images are \(N, H, W, 3\)"),
        ({"images": good["images"][:0]}, r"images are \(N, H, W, 3\)"),
        ({"images": 255 * good["images"]}, r"finite numbers in \[0, 1\]"),
        ({"images": np.full_like(good["images"], np.nan)}, r"finite numbers in \[0, 1\]"),
        ({"poses": good["poses"][:2]}, r"3 images need poses \(3, 4, 4\)"),
        ({"poses": sheared}, "pose 1 is no rotation"),
        ({"focal": np.ones(2)}, "one focal length or 3"),
        ({"focal": np.array(0.0)}, "focal lengths are finite and above 0"),
        ({"images": np.array(["a"], dtype=object)}, "holds objects, which are not read"),
    ):
        np.savez(file, **{**good, **changes})
        with pytest.raises(InputError, match=words) as caught:
            read_posed_npz(file)
        assert "\n" not in str(caught.value)
    np.savez(file, pictures=good["images"])
    with pytest.raises(InputError, match="lacks images, poses, focal: it holds pictures"):
        read_posed_npz(file)
    np.savez(file, **good)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match="damaged"):
        read_posed_npz(file)
    np.save(tmp_path / "one.npy", good["images"])
    with pytest.raises(InputError, match="holds one array"):
        read_posed_npz(tmp_path / "one.npy")
    with pytest.raises(InputError, match="does not exist"):
        read_posed_npz(tmp_path / "none.npz")

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import orbit
from limbeck.rendering.llff import read_llff

torch.set_num_threads(1)


def table(**changes: Any) -> np.ndarray:
    """Three poses of ours in LLFF's columns [down, right, back | t | hwf] and their depths."""
    c2w = orbit([0.0, 20, 40], 10.0, 3.0).c2w.double().numpy()
    right, up, back, place = (c2w[:, :3, k] for k in range(4))
    size = np.tile([6.0, 8.0, 10.0], (3, 1))
    rows = np.concatenate(
        [np.stack([-up, right, back, place, size], -1).reshape(3, 15), [[1.0, 7], [2, 8], [1.5, 9]]], 1
    )
    for place_, value in changes.items():
        rows[0, int(place_[1:])] = value
    return rows


def test_poses_are_ours(tmp_path: Path):
    np.save(tmp_path / "poses_bounds.npy", table())
    for path in (tmp_path, tmp_path / "poses_bounds.npy"):
        views = read_llff(path)
        cameras = views.cameras
        torch.testing.assert_close(cameras.c2w, orbit([0.0, 20, 40], 10.0, 3.0).c2w)
        assert (cameras.width, cameras.height) == (8, 6) and cameras.fx.tolist() == cameras.fy.tolist() == [10] * 3
        assert cameras.cx.tolist() == [4] * 3 and cameras.cy.tolist() == [3] * 3
        assert cameras.near == pytest.approx(0.9) and cameras.far == pytest.approx(9.9)
        assert views.bounds.tolist() == [[1, 7], [2, 8], [1.5, 9]] and views.images is None
    assert read_llff(tmp_path, near=0.5, far=20.0).cameras.near == 0.5


def test_by_hand(tmp_path: Path):
    """A camera that looks along -Z with +Y up: down is -Y, right is +X, back is +Z."""
    row = np.array([[0.0, 1, 0, 5, 6], [-1, 0, 0, 6, 8], [0, 0, 1, 7, 10]]).reshape(1, 15)
    np.save(tmp_path / "poses_bounds.npy", np.concatenate([row, [[1.0, 2.0]]], 1))
    expected = torch.tensor([[1.0, 0, 0, 5], [0, 1, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]])
    assert read_llff(tmp_path).cameras.c2w[0].equal(expected)


def test_pictures_smaller_than_the_file_says(tmp_path: Path):
    np.save(tmp_path / "poses_bounds.npy", table())
    (tmp_path / "images_2").mkdir()
    for i in range(3):
        Image.fromarray(np.full((3, 4, 3), 50 * i, np.uint8)).save(tmp_path / "images_2" / f"{i}.PNG")
    (tmp_path / "images_2" / "notes.txt").write_text("no picture")
    views = read_llff(tmp_path, images=tmp_path / "images_2")
    assert views.images is not None and (views.images[:, 0, 0, 0] * 255).round().tolist() == [0, 50, 100]
    assert views.cameras.fx.tolist() == [5] * 3 and views.cameras.width == 4
    (tmp_path / "images_2" / "1.PNG").unlink()
    with pytest.raises(InputError, match="has 3 poses but .* holds 2 pictures"):
        read_llff(tmp_path, images=tmp_path / "images_2")
    with pytest.raises(InputError, match="name the folder"):
        read_llff(tmp_path, images=tmp_path / "images")


def test_damage_is_named(tmp_path: Path):
    file = tmp_path / "poses_bounds.npy"
    for content, words in (
        (np.zeros((3, 12)), r"must hold \(N, 17\) numbers"),
        (table(i0=np.nan), "NaN or infinity"),
        (table(i4=7.0), "mixes picture sizes"),
        (table(i15=0.0), "not 0 < near < far"),
        (table(i16=0.5), "not 0 < near < far"),
        (table(i0=3.0), "pose 0 is no rotation"),
        (np.array([{"a": 1}], dtype=object), "holds objects, which are not read"),
        (np.array(["a"]), "something else than numbers"),
    ):
        np.save(file, content, allow_pickle=True)
        with pytest.raises(InputError, match=words) as caught:
            read_llff(tmp_path)
        assert "\n" not in str(caught.value)
    np.save(file, table())
    whole = file.read_bytes()
    for end in (0, 5, 60, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(InputError, match="no arrays of numpy, or damaged ones"):
            read_llff(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="does not exist"):
        read_llff(tmp_path)

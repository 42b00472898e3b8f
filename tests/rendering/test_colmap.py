from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras, normalised, orbit
from limbeck.rendering.colmap import quaternions, read_colmap, write_colmap
from limbeck.rendering.colmap_files import NUMBERED
from limbeck.rendering.gaussians import Gaussians, rotations

torch.set_num_threads(1)

NAMES = ["b.png", "a.png", "sub/c.png"]


def some(lens: bool = False, own: bool = False) -> Cameras:
    poses = orbit([0.0, 70, 200], 20.0, 3.0).c2w
    fx = torch.tensor([10.0, 11, 12]) if own else torch.tensor(10.0)
    k = torch.tensor([0.05, -0.08, 0.0, -0.001, 0.002]).expand(3, 5) if lens else None
    return Cameras(poses, fx, torch.tensor(9.5), torch.tensor(4.2), torch.tensor(2.9), 8, 6, distortion=k)


def as_binary(folder: Path) -> None:
    """The text model of a folder in COLMAP's binary layout, written here independently of the reader, and the text removed."""

    def rows(name: str) -> list[str]:
        return [line for line in (folder / name).read_text().splitlines() if line and not line.startswith("#")]

    cameras = rows("cameras.txt")
    data = struct.pack("<Q", len(cameras))
    for line in cameras:
        number, model, width, height, *values = line.split()
        data += struct.pack("<IiQQ", int(number), NUMBERED.index(model), int(width), int(height))
        data += struct.pack(f"<{len(values)}d", *map(float, values))
    (folder / "cameras.bin").write_bytes(data)
    images = rows("images.txt")
    data = struct.pack("<Q", len(images))
    for i, line in enumerate(images):
        number, *pose, camera, name = line.split(maxsplit=9)
        data += struct.pack("<I7dI", int(number), *map(float, pose), int(camera)) + name.encode() + b"\0"
        data += struct.pack("<Q", i) + i * struct.pack("<ddQ", 1.5, 2.5, 2**64 - 1)
    (folder / "images.bin").write_bytes(data)
    points = rows("points3D.txt")
    data = struct.pack("<Q", len(points))
    for i, line in enumerate(points):
        number, *rest = line.split()
        x, y, z, r, g, b, error = map(float, rest)
        data += struct.pack("<Q3d3BdQ", int(number), x, y, z, int(r), int(g), int(b), error + i, i)
        data += i * struct.pack("<II", 1, i)
    (folder / "points3D.bin").write_bytes(data)
    for kind in ("cameras", "images", "points3D"):
        (folder / f"{kind}.txt").unlink()


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("lens", [False, True])
def test_round_trip(tmp_path: Path, lens: bool, own: bool, binary: bool):
    cameras, points, colours = some(lens, own), torch.randn(5, 3), torch.randint(0, 256, (5, 3)) / 255
    folder = write_colmap(tmp_path / "sparse" / "0", cameras, NAMES, points, colours)
    lines = (folder / "cameras.txt").read_text().splitlines()
    assert len(lines) == 1 + (3 if own else 1) and (" OPENCV " if lens else " PINHOLE ") in lines[1]
    if binary:
        as_binary(folder)
    for path in (tmp_path, folder):
        model = read_colmap(path, near=0.2, far=9.0)
        order = [NAMES.index(name) for name in model.names]
        assert model.names == sorted(NAMES)
        for name in ("c2w", "fx", "fy", "cx", "cy"):
            torch.testing.assert_close(getattr(model.cameras, name), getattr(cameras, name)[order])
        assert (model.cameras.distortion is None) != lens
        if lens:
            torch.testing.assert_close(model.cameras.distortion, cameras.distortion)
        assert (model.cameras.width, model.cameras.height, model.cameras.near, model.cameras.far) == (8, 6, 0.2, 9.0)
        torch.testing.assert_close(model.points, points)
        torch.testing.assert_close(model.colours, colours)
        assert model.errors.tolist() == ([0, 1, 2, 3, 4] if binary else [0] * 5)
        assert model.images is None
    assert len(Gaussians.from_points(model.points, model.colours)) == 5
    assert len(normalised(model.cameras)[0]) == 3


def test_poses_by_hand(tmp_path: Path):
    """A camera at (0, 0, -2) that looks along +Z with +Y down, as COLMAP writes it: our axes are +X, -Y and -Z."""
    (tmp_path / "cameras.txt").write_text("# made by hand\n7 SIMPLE_RADIAL 8 6 10 4 3 -0.1\n")
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 2 7 view 1.png\n1.0 2.0 -1 3.0 4.0 5\n")
    model = read_colmap(tmp_path)
    expected = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, -2], [0, 0, 0, 1]])
    torch.testing.assert_close(model.cameras.c2w[0], expected)
    torch.testing.assert_close(
        model.cameras.viewmats[0], torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]])
    )
    assert model.names == ["view 1.png"] and model.points.shape == (0, 3)
    assert model.cameras.distortion is not None and model.cameras.distortion[0].tolist() == pytest.approx(
        [-0.1, 0, 0, 0, 0]
    )
    uv, depth = model.cameras.project(torch.tensor([[0.5, 0.25, 2.0]]))
    x, y = 0.5 / 4, 0.25 / 4
    bent = 1 - 0.1 * (x * x + y * y)
    assert uv[0, 0].tolist() == pytest.approx([10 * x * bent + 4, 10 * y * bent + 3]) and float(depth[0, 0]) == 4


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    ("line", "pinhole", "lens"),
    [
        ("SIMPLE_PINHOLE 8 6 10 4 3", (10, 10, 4, 3), None),
        ("PINHOLE 8 6 10 9 4 3", (10, 9, 4, 3), None),
        ("SIMPLE_RADIAL 8 6 10 4 3 0.1", (10, 10, 4, 3), (0.1, 0, 0, 0, 0)),
        ("RADIAL 8 6 10 4 3 0.1 0.2", (10, 10, 4, 3), (0.1, 0.2, 0, 0, 0)),
        ("OPENCV 8 6 10 9 4 3 0.1 0.2 0.3 0.4", (10, 9, 4, 3), (0.1, 0.2, 0, 0.3, 0.4)),
    ],
)
def test_camera_models(
    tmp_path: Path, line: str, pinhole: tuple[float, ...], lens: tuple[float, ...] | None, binary: bool
):
    write_colmap(tmp_path, some())
    (tmp_path / "cameras.txt").write_text(f"1 {line}\n")
    if binary:
        as_binary(tmp_path)
    found = read_colmap(tmp_path).cameras
    assert [float(getattr(found, name)[0]) for name in ("fx", "fy", "cx", "cy")] == pytest.approx(list(pinhole))
    assert (found.distortion is None) == (lens is None)
    if lens is not None and found.distortion is not None:
        assert found.distortion[0].tolist() == pytest.approx(list(lens))


def test_quaternions_of_every_branch():
    q = torch.nn.functional.normalize(torch.randn(200, 4, dtype=torch.float64), dim=-1)
    q = torch.cat([q, torch.eye(4).double(), 1e-9 * torch.ones(4, 4).double() + torch.eye(4).double()])
    found = quaternions(rotations(q))
    assert float(found[:, 0].min()) >= 0
    torch.testing.assert_close(
        (found * torch.nn.functional.normalize(q, dim=-1)).sum(-1).abs(), torch.ones(len(q)).double()
    )


def test_pictures_come_in_the_order_of_the_cameras(tmp_path: Path):
    """Pictures that were shrunk after the calibration shrink the intrinsics, and ``reduce`` shrinks both once more."""
    cameras = some().resized(16, 12)
    write_colmap(tmp_path / "sparse/0", cameras, NAMES)
    for i, name in enumerate(NAMES):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), 50 * i, np.uint8)).save(tmp_path / "images" / name)
    model = read_colmap(tmp_path, images=tmp_path / "images")
    assert model.images is not None and model.images.shape == (3, 6, 8, 3) and len(model.paths) == 3
    assert (model.images[:, 0, 0, 0] * 255).round().tolist() == [50, 0, 100]
    torch.testing.assert_close(model.cameras.fx, some().fx)
    half = read_colmap(tmp_path, images=tmp_path / "images", reduce=2)
    assert half.images is not None and half.images.shape == (3, 3, 4, 3)
    torch.testing.assert_close(half.cameras.cx, some().cx / 2)
    for i in range(2):
        (tmp_path / "images" / NAMES[i]).unlink()
    with pytest.raises(InputError, match=r"2 of 3 pictures of .* are missing in .* \(a.png, b.png\)"):
        read_colmap(tmp_path, images=tmp_path / "images")
    for name in NAMES:
        Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "images" / name)
    with pytest.raises(InputError, match="says 16 x 12 but its pictures are 8 x 9"):
        read_colmap(tmp_path, images=tmp_path / "images")


@pytest.mark.parametrize("model", NUMBERED[5:])
@pytest.mark.parametrize("binary", [False, True])
def test_other_camera_models_are_named(tmp_path: Path, model: str, binary: bool):
    write_colmap(tmp_path, some())
    (tmp_path / "cameras.txt").write_text(f"1 {model} 8 6 1 2 3 4\n")
    if binary:
        as_binary(tmp_path)
    with pytest.raises(
        InputError, match=f"camera 1 has the model {model}, which is not read here: undistort"
    ) as caught:
        read_colmap(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["cameras", "images", "points3D"])
def test_files_cut_anywhere_are_named(tmp_path: Path, kind: str):
    """A binary file that ends at any byte is refused in one line that names it."""
    write_colmap(tmp_path, some(lens=True), NAMES, torch.randn(3, 3))
    as_binary(tmp_path)
    file = tmp_path / f"{kind}.bin"
    whole = file.read_bytes()
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(InputError, match=f"{kind}.bin is cut short or no binary file of COLMAP") as caught:
            read_colmap(tmp_path)
        assert "\n" not in str(caught.value)
    file.write_bytes(b"\xff" * 400)
    with pytest.raises(InputError, match=f"{kind}.bin is cut short"):
        read_colmap(tmp_path)


def test_damage_is_named(tmp_path: Path):
    write_colmap(tmp_path, some(), NAMES, torch.randn(3, 3))
    whole = {kind: (tmp_path / f"{kind}.txt").read_text() for kind in ("cameras", "images", "points3D")}
    pose = "1 1 0 0 0 0 0 2 1 a.png\n"
    for kind, text, words in (
        ("cameras", "1 PINHOLE 8 6 10 9 4\n", r"camera 1 \(PINHOLE\) needs a size and 4 parameters"),
        ("cameras", "1 PINHOLE 8 six 10 9 4 3\n", "the line '1 PINHOLE 8 six 10 9 4 3' is not understood"),
        ("cameras", "1\n", "the line '1' is not understood"),
        ("cameras", "2 PINHOLE 8 6 10 9 4 3\n", "a.png was taken by camera 1, which is not in the cameras file"),
        ("cameras", "1 PINHOLE 8 6 -10 9 4 3\n", "focal lengths"),
        ("images", "1 1 0 0 0 0 0 2 1\n", "is not understood: it was changed, damaged or cut short"),
        ("images", "1 2 0 0 0 0 0 2 1 a.png\n", "the quaternion of a.png has not length 1"),
        ("images", "1 0 0 0 0 0 0 2 1 a.png\n", "the quaternion of a.png has not length 1"),
        ("images", "1 nan 0 0 0 0 0 2 1 a.png\n", "the quaternion of a.png has not length 1"),
        ("images", "1 1 0 0 0 0 inf 2 1 a.png\n", "the pose of a.png has entries that are not finite"),
        ("images", pose + pose, "after a.png comes no line of 2-D points in threes"),
        ("images", "# nothing\n", "lists no pictures"),
        ("points3D", "1 0 0 0 9 9\n", "is no text file of COLMAP's points"),
        ("points3D", "1 0 0 nan 9 9 9 0.5\n", "points with NaN or infinity"),
    ):
        (tmp_path / f"{kind}.txt").write_text(text)
        with pytest.raises(InputError, match=words) as caught:
            read_colmap(tmp_path)
        assert "\n" not in str(caught.value)
        (tmp_path / f"{kind}.txt").write_text(whole[kind])
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 8 6 10 9 4 3\n2 PINHOLE 9 6 10 9 4 3\n")
    (tmp_path / "images.txt").write_text(pose + "\n" + pose.replace(" 1 a", " 2 b"))
    with pytest.raises(InputError, match="mixes picture sizes .8 x 6 and 9 x 6"):
        read_colmap(tmp_path)
    (tmp_path / "images.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not a text file of COLMAP"):
        read_colmap(tmp_path)
    (tmp_path / "images.txt").unlink()
    with pytest.raises(InputError, match="has cameras.txt but no images.txt"):
        read_colmap(tmp_path)
    (tmp_path / "cameras.txt").unlink()
    with pytest.raises(InputError, match="holds no COLMAP model"):
        read_colmap(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_colmap(tmp_path / "nowhere")


def test_what_cannot_be_written_is_named(tmp_path: Path):
    lens = replace(some(), distortion=torch.tensor([0.0, 0, 0.1, 0, 0]).expand(3, 5))
    with pytest.raises(InputError, match="no k3"):
        write_colmap(tmp_path, lens)
    with pytest.raises(InputError, match="as many names"):
        write_colmap(tmp_path, some(), ["a"])
    with pytest.raises(InputError, match="no spaces in the name of a picture .'b 1.png'"):
        write_colmap(tmp_path, some(), ["a.png", "b 1.png", "c.png"])
    with pytest.raises(InputError, match="points and colours"):
        write_colmap(tmp_path, some(), None, torch.zeros(2, 3), torch.zeros(3, 3))

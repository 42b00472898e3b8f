from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.gaussians import Gaussians
from limbeck.rendering.ply import load_ply, names_of, save_ply

torch.set_num_threads(1)


def scene(count: int = 5, coefficients: int = 16) -> Gaussians:
    g = torch.Generator().manual_seed(0)
    quats = torch.nn.functional.normalize(torch.randn(count, 4, generator=g), dim=-1)
    return Gaussians(
        torch.randn(count, 3, generator=g),
        torch.randn(count, 3, generator=g),
        quats,
        torch.randn(count, generator=g),
        torch.randn(count, coefficients, 3, generator=g),
    )


@pytest.mark.parametrize("coefficients", [1, 4, 9, 16])
def test_a_round_trip_changes_nothing(tmp_path: Path, coefficients: int):
    gaussians = scene(coefficients=coefficients)
    again = load_ply(save_ply(gaussians, tmp_path / "folder" / "scene.ply"))
    for name, value in gaussians.named_parameters():
        torch.testing.assert_close(getattr(again, name), value, rtol=1e-6, atol=1e-7)
    assert again.sh_degree == gaussians.sh_degree


def test_the_bytes_of_the_layout(tmp_path: Path):
    """Header and numbers by hand: f_rest is channel by channel, quaternions are (w, x, y, z) and normalised, normals are 0."""
    gaussians = scene(2, 4)
    gaussians.quats.data[1] = torch.tensor([2.0, 0, 0, 0])
    data = save_ply(gaussians, tmp_path / "s.ply").read_bytes()
    names = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 " + " ".join(f"f_rest_{i}" for i in range(9))
    names += " opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
    header = "ply\nformat binary_little_endian 1.0\nelement vertex 2\n"
    header += "".join(f"property float {n}\n" for n in names.split()) + "end_header\n"
    assert data.startswith(header.encode()) and len(data) == len(header) + 2 * 4 * 26
    row = struct.unpack("<26f", data[len(header) + 26 * 4 :])
    sh = gaussians.sh[1].tolist()
    assert row[:6] == pytest.approx([*gaussians.means[1].tolist(), 0, 0, 0])
    assert row[6:9] == pytest.approx(sh[0])
    assert row[9:18] == pytest.approx([sh[k][c] for c in range(3) for k in (1, 2, 3)])
    assert row[18] == pytest.approx(float(gaussians.opacity_logits[1]))
    assert row[19:22] == pytest.approx(gaussians.log_scales[1].tolist())
    assert row[22:] == pytest.approx((1, 0, 0, 0))


def test_other_writers(tmp_path: Path):
    """Ascii, big endian, another order, further properties, an element before and a list after."""
    names = [*reversed(names_of(0)), "label"]
    values = list(range(len(names)))
    end = "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    for order, body in (
        ("ascii", " ".join(map(str, [7, *values])).encode()),
        ("binary_big_endian", struct.pack(f">h{len(names)}d", 7, *values)),
    ):
        text = (
            f"ply\r\nformat {order} 1.0\ncomment made elsewhere\nelement first 1\nproperty short a\nelement vertex 1\n"
        )
        text += "".join(f"property double {n}\n" for n in names) + end
        (tmp_path / "o.ply").write_bytes(text.encode() + body)
        found = load_ply(tmp_path / "o.ply")
        at = {n: float(v) for n, v in zip(names, values, strict=True)}
        assert found.means[0].tolist() == [at["x"], at["y"], at["z"]]
        assert found.quats[0].tolist() == [at[f"rot_{i}"] for i in range(4)]
        assert found.sh.shape == (1, 1, 3) and float(found.opacity_logits[0]) == at["opacity"]


def test_files_that_are_something_else(tmp_path: Path):
    good = save_ply(scene(), tmp_path / "good.ply").read_bytes()
    cloud = b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\nend_header\n0 0 0\n"
    nan = scene()
    path = tmp_path / "bad.ply"
    for data, message in (
        (b"\x89PNG\r\n", "is not a .ply file"),
        (b"", "is not a .ply file"),
        (good[:-1], "cut short: its header promises 5"),
        (cloud, "holds no Gaussians but another kind of .ply .*f_dc_0"),
        (cloud.replace(b" z\n", b" packed_position\n"), "compressed .ply"),
        (cloud.replace(b"vertex 1", b"vertex 0"), "element vertex is empty"),
        (cloud.replace(b"vertex 1", b"vertex one"), "line 'element vertex one' is not understood"),
        (cloud.replace(b"float y", b"quad y"), "line 'property quad y'"),
        (cloud.replace(b"format ascii 1.0\n", b""), "names no format"),
        (cloud.replace(b"0 0 0", b"0 0 zero"), "no number"),
        (cloud.replace(b"vertex", b"points"), "no element vertex"),
        (good.replace(b"f_rest_44", b"g_rest_44"), "has 44 properties f_rest"),
        (good[:-4] + struct.pack("<f", float("nan")), "NaN or infinity in rot_3"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=message) as caught:
            load_ply(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        load_ply(tmp_path / "none.ply")
    nan.means.data[0, 0] = float("inf")
    with pytest.raises(InputError, match="means of the Gaussians contain NaN"):
        save_ply(nan, tmp_path / "nan.ply")
    assert not (tmp_path / "nan.ply").exists()

"""The small U-Net of views: its equations, sizes, conditions, what it refuses, and that it goes to the disk and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.adapters.denoising import build_network, read_sampler, rebuild_network, save_sampler
from limbeck.core.errors import InputError
from limbeck.core.files import read_json
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, VPCosine
from limbeck.networks.view_unet import ViewUNet, named_view_unet

torch.set_num_threads(1)


def network(**options: object) -> ViewUNet:
    torch.manual_seed(0)
    made = ViewUNet(**{"shape": (3, 8, 8), "width": 8, "num_classes": 4, **options})  # type: ignore[arg-type]
    nn.init.normal_(made.last.weight)
    return made.double()


def inputs(n: int = 3, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, side, side, generator=generator, dtype=torch.float64)
    return x, torch.linspace(10, 900, n, dtype=torch.float64)


def test_it_computes_what_it_says() -> None:
    made = network()
    x, t = inputs()
    classes = torch.tensor([0, 3, 4])

    def block(m: nn.Module, h: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        scale, shift = m.modulation(vector).chunk(2, 1)
        inner = m.conv1(F.silu(F.group_norm(h, 4, m.norm1.weight, m.norm1.bias)))
        inner = F.group_norm(inner, 4, m.norm2.weight, m.norm2.bias)
        inner = inner * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return m.skip(h) + m.conv2(F.silu(inner))

    angles = t[:, None] / 1000 * made.frequencies
    embedded = made.time_embedding(torch.cat([angles.sin(), angles.cos()], 1))
    assert embedded.shape == (3, 64)
    vector = F.silu(embedded + made.class_embedding.weight[classes])
    full = block(made.enter, made.first(x), vector)
    half = block(made.middle[0], made.down(full), vector)
    assert full.shape[1:] == (8, 8, 8) and half.shape[1:] == (16, 4, 4)
    wide = made.up(half).repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = block(made.leave, torch.cat([wide, full], 1), vector)
    wanted = made.last(F.silu(made.norm(h)))
    assert torch.allclose(made(x, t, classes), wanted, atol=1e-10)


def test_no_condition_is_the_null_class() -> None:
    made = network()
    x, t = inputs()
    null = torch.full((3,), 4)
    assert torch.equal(made(x, t), made(x, t, null)) and torch.equal(made(x, t), made(x, t, {"class_labels": null}))
    assert not torch.allclose(made(x, t), made(x, t, torch.zeros(3, dtype=torch.long)))


def test_it_begins_at_zero_and_takes_any_even_size() -> None:
    for side in (8, 10, 16, 22):
        made = ViewUNet(width=8)
        x = torch.randn(2, 3, side, side + 2)
        found = made(x, torch.rand(2))
        assert found.shape == x.shape and not bool(found.any())


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    made = network()
    x, t = inputs()
    classes = torch.tensor([1, 2, 3])
    one = torch.cat([made(x[i : i + 1], t[i : i + 1], classes[i : i + 1]) for i in range(3)])
    assert torch.allclose(made(x, t, classes), one, atol=1e-10)


def test_a_control_picture_is_seen_and_goes_through_guidance() -> None:
    made = network(extra_channels=2)
    x, t = inputs()
    control = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    classes = torch.tensor([0, 1, 2])
    assert torch.equal(made(x, t, classes), made(x, t, {"class_labels": classes, "control": torch.zeros_like(control)}))
    cond = {"class_labels": classes, "control": control}
    assert not torch.allclose(made(x, t, cond), made(x, t, classes))
    denoiser = Denoiser(made, VPCosine(), "v", null_cond={"class_labels": torch.tensor(4)})
    guided = denoiser.predict(x, 0.5, cond, "v", guidance=3.0)
    plain, blank = (denoiser.predict(x, 0.5, {**cond, "class_labels": c}, "v") for c in (classes, torch.full((3,), 4)))
    assert torch.allclose(guided, blank + 3 * (plain - blank), atol=1e-9)


def test_names() -> None:
    made = build_network("view-unet-w8", (3, 16, 16), 5, VPCosine())
    assert isinstance(made, ViewUNet) and made.spec["width"] == 8 and made.num_classes == 5 and made.time_scale == 1e-3
    edm = build_network("view-unet", (3, 16, 16), None, EDM())
    assert isinstance(edm, ViewUNet) and edm.time_scale == 1 and edm.class_embedding is None
    assert named_view_unet("unet-w8", (3, 16, 16), 5, 1e-3) is None


def test_it_goes_to_the_disk_and_back(tmp_path: Path) -> None:
    made = network(blocks=2).float()
    x, t = (v.float() for v in inputs())
    denoiser = Denoiser(made, VPCosine(), "v", null_cond=torch.tensor(4))
    sampler = Sampler.ode(denoiser, 2)
    save_sampler(sampler, tmp_path, {})
    again = read_sampler(tmp_path, read_json(tmp_path / "artifact.json"))
    assert torch.equal(again.denoiser.module(x, t), made(x, t))
    assert isinstance(rebuild_network({"class": "ViewUNet", **made.spec}), ViewUNet)


def test_mistakes() -> None:
    made = network()
    x, t = inputs()
    with pytest.raises(InputError, match="class 5 was never seen"):
        made(x, t, torch.tensor([0, 1, 5]))
    with pytest.raises(InputError, match=r"class ids \(3,\)"):
        made(x, t, torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match="even sides of 8"):
        made(torch.zeros(1, 3, 9, 8).double(), t[:1])
    with pytest.raises(InputError, match="even sides of 8"):
        ViewUNet((3, 6, 6))
    with pytest.raises(InputError, match=r"pictures \(B, 3, H, W\)"):
        made(torch.zeros(1, 1, 8, 8).double(), t[:1])
    with pytest.raises(InputError, match="multiple of 4"):
        ViewUNet(width=6)
    with pytest.raises(InputError, match="no classes"):
        network(num_classes=None)(x, t, torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match="extra_channels is 0"):
        made(x, t, {"control": torch.zeros(3, 1, 8, 8)})
    with pytest.raises(InputError, match="not depth"):
        made(x, t, {"depth": torch.zeros(3, 1, 8, 8)})

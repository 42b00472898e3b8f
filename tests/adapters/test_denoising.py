"""Samplers on the disk, and denoising networks by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import limbeck
from limbeck.adapters.denoising import build_network, save_sampler
from limbeck.core.errors import InputError, RunError, UnknownNameError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, Flow, VPDiscrete

torch.set_num_threads(1)


def denoiser(schedule: object, prediction: str, precond: str | None = None) -> Denoiser:
    torch.manual_seed(0)
    network = build_network("mlp-w8-b1", (1, 4, 4), 3, schedule)  # type: ignore[arg-type]
    torch.nn.init.normal_(network.last.weight)  # type: ignore[union-attr]
    return Denoiser(network, schedule, prediction, precond=precond, null_cond=torch.tensor(3), sigma_data=0.7)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["edm", "flow", "vp"])
def test_a_sampler_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    made = {
        "edm": Sampler.ode(denoiser(EDM(0.02, 20.0), "x0", "edm"), 3, "heun", 1.5),
        "flow": Sampler.one_step(denoiser(Flow(shift=3.0), "flow")),
        "vp": Sampler(denoiser(VPDiscrete("scaled_linear"), "eps"), torch.tensor([0.9, 0.5, 0.0]), "tcd", gamma=0.3),
    }[kind]
    save_sampler(made, tmp_path, {"method": "test"})
    again = limbeck.load(tmp_path)
    assert again.kind == "sampler" and again.description["method"] == "test"
    z, c = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    first, second = (
        s.sample(z, c, torch.Generator().manual_seed(1)).x
        for s in (made.replace(denoiser=made.denoiser.eval()), again.content)
    )
    assert torch.equal(first, second)


def test_a_network_of_ones_own_must_be_given(tmp_path: Path) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, t: torch.Tensor, c: object = None) -> torch.Tensor:
            return self.layer(x)

    own = Own()
    save_sampler(Sampler.one_step(Denoiser(own, Flow(), "flow")), tmp_path, {})
    with pytest.raises(InputError, match="pass model="):
        limbeck.load(tmp_path)
    found = limbeck.load(tmp_path, model=Own()).content
    z = torch.randn(3, 2)
    assert torch.allclose(found.sample(z).x, z - own(z, z, None))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    save_sampler(Sampler.one_step(denoiser(Flow(), "flow")), tmp_path, {})
    about = json.loads((tmp_path / "artifact.json").read_text())
    (tmp_path / "artifact.json").write_text(json.dumps({**about, "sampler": {}}))
    with pytest.raises(RunError, match="lacks 'times'"):
        limbeck.load(tmp_path)
    (tmp_path / "artifact.json").write_text(json.dumps(about))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match="not a safetensors file"):
        limbeck.load(tmp_path)


def test_networks_by_name() -> None:
    with pytest.raises(UnknownNameError, match="denoising network 'cnn'"):
        build_network("cnn", (1, 8, 8), 10, Flow())
    pytest.importorskip("diffusers")
    made = build_network("unet-w8", (1, 8, 8), 10, Flow())
    x = torch.randn(2, 1, 8, 8)
    assert made(x, torch.tensor([10.0, 500.0]), torch.tensor([0, 10])).shape == x.shape


@pytest.mark.parametrize("schedule", [Flow(), EDM(0.02, 20.0)])
def test_a_unet_comes_back_through_diffusers(schedule: object, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = build_network("unet-w8", (1, 8, 8), 3, schedule)  # type: ignore[arg-type]
    edm = isinstance(schedule, EDM)
    made = Denoiser(
        network, schedule, "x0" if edm else "flow", precond="edm" if edm else None, null_cond=torch.tensor(3)
    )  # type: ignore[arg-type]
    sampler = Sampler.one_step(made.eval())
    save_sampler(sampler, tmp_path / "one", {"method": "test"})
    z, c = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    again = limbeck.load(tmp_path / "one").content.sampler
    assert torch.allclose(again.sample(z, c).x, sampler.sample(z, c).x, atol=1e-5)
    plain = diffusers.UNet2DModel.from_pretrained(tmp_path / "one" / "unet")
    t = torch.full((2,), 1000.0)
    assert torch.allclose(plain(z, t, class_labels=c).sample, network.network(z, t, class_labels=c).sample, atol=1e-5)  # type: ignore[operator]
    assert "```python" in (tmp_path / "one" / "README.md").read_text()
    heun = Sampler.ode(made, 2, "heun")
    save_sampler(heun, tmp_path / "heun", {})
    assert torch.allclose(limbeck.load(tmp_path / "heun").content.sample(z, c).x, heun.sample(z, c).x, atol=1e-5)

"""Small worlds that tests of score distillation share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import kernel_density
from limbeck.diffusion.schedules import VPCosine
from limbeck.networks.view_unet import ViewUNet
from limbeck.rendering.cameras import Cameras, RandomOrbit
from limbeck.rendering.fields import Density, build_field
from limbeck.rendering.particles import SceneParticles
from limbeck.tasks.view_priors import ViewPrior

SIZE = 8
ORBIT = RandomOrbit(
    SIZE, SIZE, radius=(3.0, 3.0), fovy=(45.0, 45.0), jitter_position=0.0, jitter_centre=0.0, jitter_up=0.0
)


def prior(kind: str = "closed") -> ViewPrior:
    """A prior over 8x8 pictures: a kernel density over six random ones, or an untrained network with two classes."""
    torch.manual_seed(0)
    schedule = VPCosine()
    denoiser: Denoiser
    if kind == "closed":
        denoiser = kernel_density(2 * torch.rand(6, 3, SIZE, SIZE) - 1, 0.1, schedule)
    else:
        net = ViewUNet((3, SIZE, SIZE), 8, 2)
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        denoiser = Denoiser(net, schedule, "v", null_cond=torch.tensor(2))

    def condition(cameras: Cameras | None, count: int) -> tuple[Any, Any]:
        if kind == "closed":
            return None, None
        return torch.ones(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)

    return ViewPrior(
        name=kind,
        denoiser=denoiser.eval(),
        shape=(3, SIZE, SIZE),
        render_size=SIZE,
        encode=lambda images: 2 * images - 1,
        condition=condition,
        orbit=ORBIT,
        references=None,
        support=None,
        camera_path=None if kind == "closed" else "time_embedding",
    )


def scenes(count: int = 1, family: str = "voxels") -> SceneParticles:
    torch.manual_seed(1)
    law = Density("softplus", "blob_magic3d", 10.0, 0.5, low=None, high=None)
    config: dict[str, Any] = {"density": law}
    if family == "voxels":
        config |= {"resolution": 6, "sh_degree": 0}
    fields = [build_field(family, config) for _ in range(count)]
    for field in fields:
        for parameter in field.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return SceneParticles(fields, 8)


def state(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module: nn.Module, before: list[Tensor]) -> bool:
    return any(not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))

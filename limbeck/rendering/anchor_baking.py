r"""Plain Gaussians from anchors and their decoder, for viewers that know no decoder.

What a decoder says depends on the camera, so it is averaged over the cameras that see an anchor: the opacity as the mean of max(0, alpha);
log-scales and colours weighted by it; rotations as the main axis of sum w q q^T; colours as spherical harmonics by weighted least squares.
What is lost is how opacities and shapes change with the view.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.anchors import AnchorScene
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.gaussians import Gaussians, sh_basis
from limbeck.rendering.splatting import MIN_ALPHA
from limbeck.rendering.views import view_of

RIDGE = 0.1
"""Held against harmonics above degree 0, in views of opacity 1: with few directions they would run wild."""


@torch.no_grad()
def baked(scene: AnchorScene, cameras: Cameras, sh_degree: int = 1) -> Gaussians:
    """Gaussians that look like the scene from where the cameras are.

    Args:
        scene: what is baked. cameras: from which it is meant to be seen. sh_degree: of the colours, 0 to 3.

    Raises:
        InputError: no Gaussian is seen by any of the cameras.
    """
    anchors = scene.anchors
    count, k = anchors.offsets.shape[:2]
    make = anchors.positions.new_zeros
    size = (sh_degree + 1) ** 2
    seen, mass = make(count), make(count, k)
    logs, turns = make(count, k, 3), make(count, k, 4, 4)
    normal, right = make(count, k, size, size), make(count, k, size, 3)
    points = anchors.points()
    for number in range(len(cameras)):
        view = view_of(cameras, number)
        which = anchors.visible(view).nonzero()[:, 0]
        found = anchors.attributes(scene.decoder, view.centre, which)
        weight = found.opacities.clamp_min(0)
        basis = sh_basis(F.normalize(points[which] - view.centre.to(points), dim=-1), sh_degree)
        seen[which] += 1
        mass[which] += weight
        logs[which] += weight[..., None] * found.scales.clamp_min(1e-12).log()
        turns[which] += weight[..., None, None] * _outer(found.quats, found.quats)
        normal[which] += weight[..., None, None] * _outer(basis, basis)
        right[which] += weight[..., None, None] * _outer(basis, found.colours - 0.5)
    opacity = mass / seen.clamp_min(1)[:, None]
    kept = opacity >= MIN_ALPHA
    if not bool(kept.any()):
        raise InputError("no Gaussian of these anchors is seen by any camera: give cameras that look at the scene")
    system = normal[kept]
    ridge = RIDGE * torch.ones(size).to(system)
    ridge[0] = 0
    sh = torch.linalg.solve(system + ridge.diag(), right[kept])
    quats = torch.linalg.eigh(turns[kept]).eigenvectors[..., -1]
    log_scales = logs[kept] / mass[kept][:, None]
    return Gaussians(points[kept], log_scales, quats, torch.logit(opacity[kept].clamp_max(0.9999)), sh)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]

"""Grad-CAM: where in an image a classifier finds the evidence for a class."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.embeddings import evaluating
from limbeck.blocks.taps import Tap, Taps, list_taps
from limbeck.core.batch import logits_of
from limbeck.core.data import as_data
from limbeck.core.errors import InputError


def grad_cam(
    model: nn.Module,
    images: Tensor,
    layer: str | Tap,
    *,
    classes: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
) -> Tensor:
    """Class-activation maps ReLU(Σ_k α_k A_k), where α_k is the mean over positions of d logit_c / d A_k.

    Args:
        model: a classifier, in evaluation mode while it is asked (so that samples do not depend on each other); its parameters may
            be frozen, and get no gradients.
        images: (B, C, H, W).
        layer: a layer by module path, or a tap, that gives maps (B, K, h, w) or patch tokens (B, P + h w, K).
        classes: (B,) int64; None: the predicted classes.
        grid: h and w of patch tokens; None: the model's ``grid``, or a square one.
        prefix_tokens: P; None: the model's ``prefix_tokens``, or what is left of the square.

    Returns:
        (B, h, w) non-negative, each map divided by its maximum (a map without evidence stays zero).

    Raises:
        InputError: a layer without positions or without influence on the logits.

    Source: "Grad-CAM: Visual Explanations from Deep Networks via Gradient-Based Localization" (2017).
    """
    taps = Taps(model, layer)  # not cloned: the gradient is taken at the tensor that goes on to the head
    with torch.enable_grad(), evaluating(model):
        # frozen parameters would leave no graph, so the images carry it
        seen = images.detach().clone().requires_grad_(True)
        with taps as tapped:
            logits = logits_of(model(seen))
        activation = next(iter(tapped.values()))
        chosen = logits.argmax(1) if classes is None else classes.to(logits.device)
        score = logits.gather(1, chosen[:, None]).sum()
        (slope,) = torch.autograd.grad(score, activation, allow_unused=True)
    if slope is None:
        raise InputError(f"the layer '{Tap.of(layer)}' has no influence on the logits: name one on the way to the head")
    activation, slope = activation.detach(), slope.detach()
    if activation.ndim == 3:
        rows, columns, prefix = _token_grid(model, activation.shape[1], grid, prefix_tokens)
        activation, slope = (
            t[:, prefix : prefix + rows * columns].transpose(1, 2).unflatten(2, (rows, columns))
            for t in (activation, slope)
        )
    if activation.ndim != 4:
        raise InputError(
            f"the layer '{Tap.of(layer)}' gives {tuple(activation.shape)}; Grad-CAM needs maps (B, K, h, w) or tokens (B, N, K)"
        )
    maps = (slope.mean((2, 3), keepdim=True) * activation).sum(1).clamp_min(0)
    top = maps.amax((1, 2), keepdim=True)
    return torch.where(top > 0, maps / top.clamp_min(torch.finfo(maps.dtype).tiny), 0.0)


def importance_maps(
    model: nn.Module, data: Any, layer: str | Tap | None, grid: tuple[int, int], batch_size: int = 256
) -> Tensor:
    """Grad-CAM at the predicted class of every image, resized to a grid of patches.

    Args:
        model, layer: see :func:`grad_cam`; None: :func:`last_map`.
        data: what :func:`limbeck.core.data.as_data` takes; images (B, C, H, W).
        grid: rows and columns of patches.
        batch_size: images at a time.

    Returns:
        (N, rows, columns) float32 in [0, 1], on the CPU.
    """
    data = as_data(data)
    parameter = next(model.parameters(), None)
    maps = []
    for batch in data.batches(batch_size):
        images = batch.inputs if parameter is None else batch.inputs.to(parameter.device)
        layer = last_map(model, images[:1]) if layer is None else layer
        maps.append(resize_maps(grad_cam(model, images, layer), grid).cpu())
    return torch.cat(maps)


def resize_maps(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (B, h, w) on a grid of patches (B, rows, columns): bilinear, averaging where the grid is coarser."""
    return F.interpolate(maps[:, None].float(), size=grid, mode="bilinear", antialias=True, align_corners=False)[:, 0]


def last_map(model: nn.Module, sample: Tensor) -> str:
    """The path of the deepest layer whose output has positions.

    For networks of patch tokens that say so (``grid``) it is the stage before the last, since the patch tokens of the last one do not
    reach a head that reads the class token. Elsewhere it is the last layer, in the model's order, that gives maps of more than one
    position.

    Args:
        model: a classifier.
        sample: (B, C, H, W) on the model's device.

    Raises:
        InputError: no layer gives maps.
    """
    stages: list[str] = list(getattr(model, "stage_paths", []))
    if getattr(model, "grid", None) is not None and stages:
        return stages[max(0, len(stages) - 2)]
    found = [i.path for i in list_taps(model, sample) if i.shape is not None and _has_positions(i.shape)]
    if not found:
        raise InputError(f"no layer of {type(model).__name__} gives maps (B, K, h, w): name the layer for Grad-CAM")
    return found[-1]


def _has_positions(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[2] * shape[3] > 1


def _token_grid(
    model: nn.Module, tokens: int, grid: tuple[int, int] | None, prefix: int | None
) -> tuple[int, int, int]:
    grid = grid or getattr(model, "grid", None)
    if grid is None:
        side = math.isqrt(tokens - (prefix or 0))
        grid = (side, side)
    if prefix is None:
        said = getattr(model, "prefix_tokens", None)
        # without a word from the model, all further tokens are taken to stand in front
        prefix = said if isinstance(said, int) else tokens - grid[0] * grid[1]
    if grid[0] < 1 or prefix < 0 or tokens < prefix + grid[0] * grid[1]:
        raise InputError(
            f"{tokens} tokens are no grid of {grid[0]}x{grid[1]} patches behind {prefix} others: give grid=… and prefix_tokens=…"
        )
    return grid[0], grid[1], prefix

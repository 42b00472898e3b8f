"""Denoising networks by name, and samplers on the disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.core.artifacts import DESCRIPTION, WEIGHTS, load_weights, save_weights
from limbeck.core.errors import InputError, RunError, UnknownNameError
from limbeck.core.files import write_json
from limbeck.diffusion.boundary import ConsistencyDenoiser
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.extra_time import rebuilt
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import Schedule, make_schedule
from limbeck.networks.diffusion_mlp import DiffusionMLP, named_mlp
from limbeck.networks.view_unet import ViewUNet, named_view_unet

EXAMPLES = ("mlp-w160-b3", "mlp-w48-b1", "unet-w32", "view-unet-w24")
_OWN: dict[str, type[nn.Module]] = {"DiffusionMLP": DiffusionMLP, "ViewUNet": ViewUNet}
_UNET = re.compile(r"unet(?:-w([0-9]+))?(?:-l([0-9]+))?")


def build_network(name: str, shape: tuple[int, ...], num_classes: int | None, schedule: Schedule) -> nn.Module:
    """A denoising network with new weights, called ``(x, model_time, cond)``.

    ``mlp[-w<width>][-b<blocks>]`` takes samples of any shape; ``unet[-w<width>][-l<levels>]`` is a diffusers ``UNet2DModel`` for images
    whose sides can be halved ``levels - 1`` times; ``view-unet[-w<width>]`` is a smaller one of our own for pictures with even sides.

    Args:
        name: see above.
        shape: of one sample.
        num_classes: C; ids 0 … C - 1 and C for no class; None: unconditional.
        schedule: whose model times it will be given.

    Raises:
        UnknownNameError: another name.
        InputError: the network does not fit the shape.
    """
    scale = 1.0 if schedule.name == "edm" else 1e-3
    made = named_mlp(name, shape, num_classes, scale) or named_view_unet(name, shape, num_classes, scale)
    if made is not None:
        return made
    found = _UNET.fullmatch(name)
    if found is None:
        raise UnknownNameError(
            "denoising network",
            name,
            EXAMPLES,
            hint="Forms: mlp[-w<width>][-b<blocks>], unet[-w<width>][-l<levels>], view-unet[-w<width>].",
        )
    from limbeck.adapters.diffusers_networks import small_unet

    width, levels = (int(value) if value else default for value, default in zip(found.groups(), (32, 2), strict=True))
    return small_unet(shape, width, levels, num_classes, time_scale=250.0 if schedule.name == "edm" else 1.0)


def save_sampler(sampler: Sampler, folder: Path, description: dict[str, Any]) -> None:
    """Write a sampler: the network's weights as safetensors, everything else in ``artifact.json``.

    A U-Net is written as a pipeline's folder that diffusers opens (see :mod:`limbeck.adapters.diffusers_students`), where a table of steps can
    express the sampler.
    """
    module = sampler.denoiser.module
    if type(module).__name__ == "SmallUNet":
        from limbeck.adapters.diffusers_students import save_unet

        if save_unet(folder, sampler, description):
            return
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(module, folder / WEIGHTS)
    about = {
        "kind": "sampler",
        **description,
        "sampler": sampler.describe(),
        "denoiser": sampler.denoiser.describe(),
        "network": network_spec(module),
        "class": type(module).__name__,
    }
    write_json(folder / DESCRIPTION, about)


def network_spec(module: nn.Module) -> dict[str, Any] | None:
    """From what :func:`rebuild_network` builds the module again; None for networks that are not ours."""
    spec = getattr(module, "spec", None)
    return None if spec is None else {"class": type(module).__name__, **spec}


def rebuild_network(spec: dict[str, Any]) -> nn.Module:
    """The network of :func:`network_spec`, with new weights."""
    if spec.get("inner"):  # a network that is told one more number
        wrapped = rebuilt(spec, rebuild_network(spec["inner"]))
        if wrapped is not None:
            return wrapped
    options = {k: v for k, v in spec.items() if k != "class"}
    if spec["class"] in _OWN:
        return _OWN[spec["class"]](**{**options, "shape": tuple(options["shape"])})
    from limbeck.adapters import diffusers_networks

    kind = getattr(diffusers_networks, spec["class"], None)
    if kind is None:
        raise RunError(
            f"the sampler's network is a {spec['class']}, which cannot be built by name: pass model=… to fill"
        )
    made: nn.Module = kind.from_spec(options)
    return made


def read_sampler(folder: Path, description: dict[str, Any], *, model: nn.Module | None = None) -> Sampler:
    """A sampler from its folder.

    Args:
        model: a network to fill, called ``(x, model_time, cond)``, where it cannot be built from the description.

    Raises:
        InputError: the network cannot be built without it.
        RunError: the folder is damaged.
    """
    if model is None:
        if description.get("network") is None:
            raise InputError(
                f"the sampler's network is a {description.get('class')}: pass model=… of that class to be filled"
            )
        model = rebuild_network(description["network"])
    try:
        conventions, how = description["denoiser"], description["sampler"]
        schedule = dict(conventions["schedule"])
        null = conventions["null_class"]
        denoiser = Denoiser(
            load_weights(model, folder / WEIGHTS).eval(),
            make_schedule(schedule.pop("name"), **schedule),
            conventions["prediction"],
            precond=conventions["precond"],
            sigma_data=conventions["sigma_data"],
            null_cond=None if null is None else torch.tensor(null),
        )
        form = conventions.get("boundary")
        if form is not None:
            denoiser = ConsistencyDenoiser(
                denoiser, form["form"], sigma_data=form["sigma_data"], timestep_scaling=form["timestep_scaling"]
            )
        times = torch.tensor(how["times"], dtype=torch.float64)
        return Sampler(denoiser, times, how["kind"], how["solver"], how["guidance"], how["gamma"], how["noise"])
    except KeyError as error:
        raise RunError(f"{folder / DESCRIPTION} lacks {error}: it was changed or damaged") from None

"""Pipelines of diffusers as teachers: a denoiser, prompts to conditions, latents to pictures and back.

::

    teacher = load_teacher("stable-diffusion-v1-5/stable-diffusion-v1-5", device="cuda", dtype=torch.float16)
    cond = teacher.encode_prompts(["a lighthouse in fog"])
    latents = Sampler.ode(teacher.denoiser, 25, "dpm2m", guidance=7.5).sample(torch.randn(1, *teacher.shape), cond).x
    pictures = teacher.decode(latents)
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.adapters.diffusers_networks import DiffusersNetwork
from limbeck.adapters.diffusers_prompts import encode_prompts, null_condition
from limbeck.adapters.diffusers_schedules import Conventions, conventions_of
from limbeck.adapters.diffusers_transformers import DiT, wrap
from limbeck.core.errors import InputError, MissingDependencyError, RunError
from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import Schedule

INDEX = "model_index.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FLUX_SIDE = 128
"""Side of Flux's latents where no image size is given: 1024 pixels, the default of diffusers' pipeline."""


@dataclass
class Teacher:
    """A pipeline, taken apart.

    Attributes:
        denoiser: its network with its conventions; ``denoiser.module.network`` is the model of diffusers.
        pipeline: the pipeline itself.
        shape: of a sample, (C, H, W): latents where there is a VAE, otherwise pixels in [-1, 1].
        num_classes: of class-conditional networks, without a null class at the end; else None.
        class_names: id to name, where the pipeline has names.
    """

    denoiser: Denoiser
    pipeline: Any
    shape: tuple[int, int, int]
    num_classes: int | None = None
    class_names: Mapping[int, str] | None = None

    @property
    def network(self) -> DiffusersNetwork:
        """The wrapped network."""
        module = self.denoiser.module
        assert isinstance(module, DiffusersNetwork)
        return module

    @property
    def vae(self) -> Any:
        """The autoencoder in single precision, or None."""
        return getattr(self.pipeline, "vae", None)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of pictures in pixels."""
        factor = _latent_factor(self.pipeline)
        return self.shape[1] * factor, self.shape[2] * factor

    @property
    def null_cond(self) -> Condition:
        """The null condition of guidance; None where the network has none."""
        return self.denoiser.null_cond

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts as a condition: a mapping of tensors, one row a prompt, without gradient.

        Raises:
            InputError: no texts, or a network that takes none.
        """
        return encode_prompts(self.pipeline, self.network, prompts, self.image_size)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) as pictures (B, 3, 8H, 8W) about in [-1, 1], in single precision; gradients flow through.

        The inverse of the latents' scaling is applied. Without a VAE samples are pictures already.

        Raises:
            InputError: latents of another number of channels.
        """
        self._check(latents, self.shape[0], "latents")
        if self.vae is None:
            return latents
        scale, shift = _scaling(self.vae, latents)
        found: Tensor = self.vae.decode(latents.float() / scale + shift, return_dict=False)[0]
        return found

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures (B, 3, 8H, 8W) in [-1, 1] as scaled latents (B, C, H, W).

        Args:
            generator: draws from the posterior with it; None: the posterior's mode.

        Raises:
            InputError: pictures of another number of channels.
        """
        if self.vae is None:
            self._check(images, self.shape[0], "images")
            return images
        self._check(images, int(self.vae.config.in_channels), "images")
        found = self.vae.encode(images.float())
        if hasattr(found, "latent_dist"):
            posterior = found.latent_dist
            raw = posterior.mode() if generator is None else posterior.sample(generator)
        else:
            raw = found.latents
        scale, shift = _scaling(self.vae, raw)
        return (raw - shift) * scale

    @staticmethod
    def _check(value: Tensor, channels: int, what: str) -> None:
        if value.ndim != 4 or value.shape[1] != channels:
            raise InputError(f"{what} must be (B, {channels}, H, W), not {tuple(value.shape)}")


def load_teacher(
    path_or_hub_name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    components: Mapping[str, Any] | None = None,
    **options: Any,
) -> Teacher:
    """A teacher from a pipeline's folder, or from the Hugging Face hub by name.

    Weights are read from safetensors only, and no code comes with them.

    Args:
        path_or_hub_name: a folder with ``model_index.json``, or ``owner/name``.
        device: where the pipeline goes.
        dtype: of its weights (the VAE stays in single precision); None: as stored, single precision as a rule.
        subfolder: of the folder or repository that holds the pipeline.
        revision, variant: of the hub's repository (``variant="fp16"`` for files in half precision).
        components: parts that replace the pipeline's, such as ``{"safety_checker": None, "text_encoder_3": None}``.
        options: see :func:`teacher_of`.

    Raises:
        MissingDependencyError: diffusers is absent.
        InputError: no such folder, a folder that is no pipeline, a scheduler or network that is not known.
        RunError: files missing or damaged, or the hub cannot be reached.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise MissingDependencyError("diffusers", "diffusion", "loading a pipeline") from None
    source = _located(str(path_or_hub_name), subfolder, revision)
    settings: dict[str, Any] = {"use_safetensors": True, "local_files_only": isinstance(source, Path)}
    settings.update(
        {k: v for k, v in (("revision", revision), ("variant", variant), ("torch_dtype", dtype)) if v is not None}
    )
    with _explained(str(path_or_hub_name)):
        pipeline = DiffusionPipeline.from_pretrained(str(source), **settings, **dict(components or {}))
    if device is not None:
        pipeline.to(device)
    return teacher_of(pipeline, **options)


def teacher_of(
    pipeline: Any,
    *,
    image_size: int | tuple[int, int] | None = None,
    schedule: Schedule | None = None,
    prediction: str | None = None,
    sign: int = 1,
    null_class: int | None = None,
    **options: Any,
) -> Teacher:
    """A teacher from a pipeline in memory. Its weights are frozen, its VAE goes to single precision, all in evaluation mode.

    Args:
        pipeline: an object of diffusers.
        image_size: height and width of pictures in pixels; None: the network's own.
        schedule, prediction: in place of what the scheduler says (both, as a rule): ``Flow(), "flow"`` for a U-Net that was retrained as a
            flow and kept its old scheduler.
        sign: -1 negates the network's output; InstaFlow returns x0 - eps where a flow's velocity is eps - x0.
        null_class: id of the null class of a class-conditional ``UNet2DModel``, which does not say it; None: it cannot be guided.
        options: of the network's wrapper.

    Raises:
        InputError: a scheduler or network that is not known, an image size that does not fit, a null class out of range.
    """
    inner = _network_of(pipeline)
    shape = _sample_shape(pipeline, inner, image_size)
    tokens = _tokens(inner, shape)
    if schedule is not None and prediction is not None:
        said = Conventions(schedule, prediction)
    else:
        said = conventions_of(pipeline.scheduler, tokens=tokens)
        said = Conventions(
            schedule or said.schedule, prediction or said.prediction, said.precond, said.sigma_data, said.sign
        )
    network = wrap(inner, sign * said.sign, **options)
    network.check_size(*shape[1:])
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    vae = getattr(pipeline, "vae", None)
    if vae is not None and vae.dtype != torch.float32:  # that of SDXL overflows in half precision
        vae.to(torch.float32)
    factor = _latent_factor(pipeline)
    null: Condition = None
    classes = network.num_classes
    if isinstance(network, DiT):
        null_class, classes = network.null_class, network.null_class
    if null_class is not None:
        if network.num_classes is None or not 0 <= null_class < network.num_classes:
            raise InputError(
                f"null_class {null_class} is no class of {network.name}, which has {network.num_classes or 'none'}"
            )
        null = torch.tensor(null_class)
        classes = null_class if null_class == network.num_classes - 1 else classes
    elif network.main == "encoder_hidden_states" and getattr(pipeline, "text_encoder", None) is not None:
        null = null_condition(pipeline, network, (shape[1] * factor, shape[2] * factor))
    denoiser = Denoiser(
        network, said.schedule, said.prediction, precond=said.precond, sigma_data=said.sigma_data, null_cond=null
    )
    return Teacher(denoiser.eval(), pipeline, shape, classes, _names(pipeline))


def _located(name: str, subfolder: str | None, revision: str | None) -> Path | str:
    """A folder that holds a pipeline, or the name of a repository of the hub.

    Raises:
        InputError: neither.
        RunError: a part of a repository cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise InputError(
            f"{name} is a file: load single-file checkpoints with diffusers (StableDiffusionPipeline.from_single_file) and pass the "
            "pipeline to teacher_of"
        )
    if not path.exists():
        if not _HUB_NAME.fullmatch(name):
            raise InputError(
                f"there is no folder {name}, and it is no name on the Hugging Face hub (owner/name) either"
            )
        if subfolder is None:
            return name
        from huggingface_hub import snapshot_download

        with _explained(name):
            path = Path(snapshot_download(name, revision=revision, allow_patterns=[f"{subfolder.strip('/')}/*"]))
    folder = path / subfolder if subfolder else path
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} is no pipeline of diffusers: it has no {INDEX}")
    return folder


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """One line about whatever another library cannot read or fetch; the cause stays attached."""
    try:
        yield
    except Exception as error:
        where = "" if Path(name).expanduser().exists() else " from the Hugging Face hub (there is no such folder here)"
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise RunError(f"cannot load the pipeline {name}{where}: {said}") from error


def _network_of(pipeline: Any) -> nn.Module:
    for name in ("unet", "transformer"):
        found = getattr(pipeline, name, None)
        if isinstance(found, nn.Module):
            return found
    raise InputError(
        f"{type(pipeline).__name__} has no unet and no transformer: it is no diffusion pipeline that can be distilled"
    )


def _latent_factor(pipeline: Any) -> int:
    """Pixels to a latent, along one side."""
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return 1
    return int(getattr(pipeline, "vae_scale_factor", 2 ** (len(vae.config.block_out_channels) - 1)))


def _sample_shape(pipeline: Any, network: nn.Module, image_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    config: Any = network.config
    flux = any(kind.__name__ == "FluxTransformer2DModel" for kind in type(network).__mro__)
    channels = int(config.in_channels) // 4 if flux else int(config.in_channels)
    if image_size is None:
        side = FLUX_SIDE if flux else config.sample_size
        if side is None:
            raise InputError(f"{type(network).__name__} does not say the size of its samples: give image_size=…")
        height, width = (side, side) if isinstance(side, int) else side
        return channels, int(height), int(width)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    factor = _latent_factor(pipeline)
    if height < factor or width < factor or height % factor or width % factor:
        raise InputError(f"image_size must be multiples of {factor}, the autoencoder's factor (got {height} x {width})")
    return channels, height // factor, width // factor


def _tokens(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Image tokens of a sample, on which a dynamic shift depends."""
    config: Any = network.config
    patch = (
        2
        if "FluxTransformer2DModel" in (k.__name__ for k in type(network).__mro__)
        else int(config.get("patch_size", 1) or 1)
    )
    return math.prod(side // patch for side in shape[1:])


def _scaling(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """Factor and shift of latents: scaled = (raw - shift) * factor; per channel where the VAE has statistics of its own."""
    config = vae.config
    factor, shift = float(config.get("scaling_factor", None) or 1.0), float(config.get("shift_factor", None) or 0.0)
    mean, std = config.get("latents_mean", None), config.get("latents_std", None)
    if mean is None or std is None:
        return factor, shift
    columns = [torch.tensor(v, device=like.device, dtype=torch.float32).reshape(1, -1, 1, 1) for v in (mean, std)]
    return factor / columns[1], columns[0]


def _names(pipeline: Any) -> dict[int, str] | None:
    labels = getattr(pipeline, "labels", None)
    if not isinstance(labels, Mapping) or not labels:
        return None
    names: dict[int, str] = {}
    for name, number in labels.items():
        names.setdefault(int(number), str(name))
    return names

"""Guidance as an input of one forward pass: a network with guidance adapters as a denoiser like any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from limbeck.blocks.guidance_adapters import AdapterSettings
from limbeck.blocks.guidance_injection import Attachment, GuidanceAdapters, attach
from limbeck.core.artifacts import DESCRIPTION, WEIGHTS, load_weights, save_weights
from limbeck.core.errors import InputError, RunError
from limbeck.core.files import write_json, write_text
from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.samplers import Sampler


def carrier(module: nn.Module) -> nn.Module:
    """The network whose blocks adapters sit on: what a wrapper called ``module(x, model_time, cond)`` holds as ``network``, or the module."""
    inner = getattr(module, "network", None)
    return inner if isinstance(inner, nn.Module) else module


class GuidedNetwork(nn.Module):
    """A network and guidance adapters on it, called as ``module(x, model_time, cond)``.

    Args:
        base: the network.
        adapters: made for it or for another one of the same architecture.
        owned: the base is a part of this module: it trains, moves, is saved and copied with it. False: it belongs to somebody else (a frozen
            teacher, say); copies of this module then share it and bring adapters of their own.

    Raises:
        InputError: the adapters do not fit.
    """

    def __init__(
        self,
        base: nn.Module,
        adapters: GuidanceAdapters,
        *,
        owned: bool = True,
        attachment: Attachment | None = None,
    ) -> None:
        super().__init__()
        self.adapters, self.owned = adapters, owned
        self.scale: Tensor | float | None = None
        if owned:
            self.inner = base
        else:
            self._outer = (base,)
        self.attachment = attachment or attach(carrier(base), adapters.settings)

    @property
    def base(self) -> nn.Module:
        """The network."""
        return self.inner if self.owned else self._outer[0]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of one sample, where the network knows."""
        return getattr(self.base, "shape", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        base = deepcopy(self.base, memo) if self.owned else self.base
        attachment = deepcopy(self.attachment, memo) if self.owned else self.attachment
        made = type(self)(base, deepcopy(self.adapters, memo), owned=self.owned, attachment=attachment)
        made.training = self.training
        memo[id(self)] = made
        return made

    def forward(self, x: Tensor, model_time: Tensor, cond: Any = None) -> Tensor:
        """The prediction at x (B, ...): guided inside of :meth:`guided_by`, else that of the network alone."""
        if self.scale is None or cond is None:
            with self.attachment.disabled():
                alone: Tensor = self.base(x, model_time, cond)
            return alone
        with self.attachment.guided(self.adapters, self.scale, model_time, cond, len(x)):
            guided: Tensor = self.base(x, model_time, cond)
        return guided

    @contextmanager
    def guided_by(self, scale: Tensor | float) -> Iterator[None]:
        """Inside, calls with a condition are guided with w = ``scale``, a number or (B,)."""
        before, self.scale = self.scale, scale
        try:
            yield
        finally:
            self.scale = before

    def remove(self) -> nn.Module:
        """Take the adapters off; the network as it was."""
        self.attachment.remove()
        return self.base


class GuidedDenoiser(Denoiser):
    """A denoiser with guidance built in: a guided prediction takes one evaluation instead of two.

    Without guidance (w = 1) and without a condition it is the base network.

    Attributes:
        guided_evaluations: 1.

    Raises:
        InputError: the network is no :class:`GuidedNetwork`.

    Source: "Efficient Distillation of Classifier-Free Guidance using Adapters" (2025); "On Distillation of Guided Diffusion Models" (2023) for
    one network that takes w.
    """

    module: GuidedNetwork
    guided_evaluations = 1

    def __init__(self, module: GuidedNetwork, *args: Any, **kwargs: Any) -> None:
        if not isinstance(module, GuidedNetwork):
            raise InputError(f"a guided denoiser needs a GuidedNetwork, not {type(module).__name__}")
        super().__init__(module, *args, **kwargs)

    @classmethod
    def of(cls, denoiser: Denoiser, module: GuidedNetwork) -> Self:
        """With the conventions of another denoiser."""
        return cls(
            module,
            denoiser.schedule,
            denoiser.prediction,
            precond=denoiser.precond,
            sigma_data=denoiser.sigma_data,
            null_cond=denoiser.null_cond,
        )

    def guided(self, x_t: Tensor, t: Tensor, cond: Condition, guidance: float | Tensor, negative: Condition) -> Tensor:
        """The guided prediction, in one evaluation.

        Raises:
            InputError: a negative condition, which the adapters were not trained for.
        """
        if negative is not None:
            raise InputError("guidance that is built in leads away from the null condition: it takes no negative one")
        with self.module.guided_by(guidance):
            return self.raw(x_t, t, cond)

    def with_module(self, module: nn.Module, **changes: Any) -> Denoiser:
        """The same conventions around another guided network."""
        plain = super().with_module(module, **changes)
        return type(self).of(plain, module) if isinstance(module, GuidedNetwork) else plain


def unguided(denoiser: GuidedDenoiser) -> Denoiser:
    """The base network as a denoiser without adapters."""
    return Denoiser.with_module(denoiser, denoiser.module.base)


def model_time_range(denoiser: Denoiser) -> float:
    """Difference between the largest and the least time that the network is told."""
    schedule = denoiser.schedule
    told = schedule.to_model_time(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    return float((told[1] - told[0]).abs())


# ---- on the disk -------------------------------------------------------------------------------------------------------

KIND = "guidance-adapters"


def save_adapters(network: GuidedNetwork, folder: Path, description: Mapping[str, Any]) -> None:
    """Write the adapters alone (of an owned base, which was trained, the whole network): safetensors, settings, and how to use them."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = network if network.owned else network.adapters
    save_weights(kept, folder / WEIGHTS)
    about = {
        **description,
        "kind": KIND,
        "adapters": network.adapters.settings.describe(),
        "base_included": network.owned,
    }
    write_json(folder / DESCRIPTION, about)
    write_text(folder / "README.md", _README)


def read_adapters(folder: Path, description: Mapping[str, Any], *, model: Denoiser | None = None) -> Any:
    """What :func:`save_adapters` wrote.

    Args:
        model: the base, or one that was fine-tuned from it.

    Returns:
        a sampler with the base and the adapters where the base is given and a sampler was described, a guided denoiser where none was,
        and the adapters alone where no base is given.

    Raises:
        RunError: the folder is damaged.
        InputError: the adapters do not fit the base; a trained network is to be read without a base to fill.
    """
    try:
        settings = AdapterSettings.from_description(description["adapters"])
        owned = bool(description["base_included"])
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{folder / DESCRIPTION} does not describe guidance adapters ({error}): it was changed or damaged"
        ) from None
    adapters = GuidanceAdapters(settings)
    if model is None:
        if owned:
            raise InputError(
                "the folder holds a whole network: pass model=… (a Denoiser of the same architecture, to be copied and filled)"
            )
        load_weights(adapters, folder / WEIGHTS)
        return adapters.eval()
    network = GuidedNetwork(deepcopy(model.module) if owned else model.module, adapters, owned=owned)
    load_weights(network if owned else adapters, folder / WEIGHTS)
    made = GuidedDenoiser.of(model, network.eval())
    how = description.get("sampler")
    if how is None:
        return made
    times = torch.tensor(how["times"], dtype=torch.float64)
    return Sampler(made, times, how["kind"], how["solver"], how["guidance"], how["gamma"], how["noise"])


_README = """# Guidance adapters

One forward pass of the base network with these adapters gives what classifier-free guidance needs two for. `model.safetensors` holds the
adapters alone (or, where `artifact.json` says `base_included`, a whole network), `artifact.json` where they sit and which scales `w` they
were trained for.

With a network of diffusers (the base, or a checkpoint that was fine-tuned from it), the pipeline's own guidance off:

```python
import limbeck
from limbeck.blocks.guidance_injection import listen

adapters = limbeck.load("this/folder").content
stop = listen(pipe.unet, adapters, guidance=5.0)  # for a transformer: pipe.transformer
image = pipe("a lighthouse", guidance_scale=1).images[0]
stop()
```

For class-conditional networks give `cond="class_labels"`. With a denoiser of limbeck:

```python
sampler = limbeck.load("this/folder", model=denoiser).content
samples = sampler.replace(guidance=5.0).sample(noise, classes).x
```

Source: "Efficient Distillation of Classifier-Free Guidance using Adapters" (2025).
"""

"""What a method is: an ``nn.Module`` whose forward pass is its loss, and a list of stages that train it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from limbeck.core import config as configuration
from limbeck.core.batch import Batch, Losses
from limbeck.core.errors import InputError, RunError


class Method(nn.Module):
    """Base of every method that trains something.

    As a plain object::

        method = KD(student, teacher, temperature=4)
        optimizer = torch.optim.AdamW(method.trainable_parameters())
        for batch in loader:
            loss = method(batch)
            loss.backward()
            ...

    Everything trainable (student, projectors, discriminators) is a sub-module; so are frozen teachers, which stay in
    evaluation mode, receive no gradient and do not go into checkpoints.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    show_progress: bool = True
    """Whether what takes long outside of stages (preparing a run, judging its result) shows progress."""

    class Config(configuration.Config):
        """Hyper-parameters of the method."""

    class Setup(configuration.Config):
        """What a run of the method by name builds: task, networks, sizes."""

    def __init__(self, config: configuration.Config | None = None, **overrides: Any) -> None:
        super().__init__()
        if config is not None and overrides:
            raise InputError(
                f"give {type(self).__name__} either a config or single settings ({', '.join(overrides)}), not both"
            )
        self.config: Any = type(self).Config.make(**overrides) if config is None else config
        self._frozen: list[str] = []
        self.counters: Counter[str] = Counter()
        """Costs worth reporting, e.g. teacher forwards (in samples). They survive a resume."""

    # ---- what a method defines -------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        """The named terms of the loss on one batch."""
        raise NotImplementedError(f"{type(self).__name__} defines no losses")

    def forward(self, batch: Any) -> Tensor:
        """The total loss on a batch (anything that :meth:`Batch.of` takes); a scalar to call ``backward()`` on."""
        return self.losses(Batch.of(batch)).total

    # ---- frozen parts ----------------------------------------------------------------------------------------------

    def add_frozen(self, name: str, module: nn.Module) -> None:
        """Register ``module`` as a frozen part: evaluation mode, no gradients, not in checkpoints."""
        self.add_module(name, freeze(module))
        self._frozen.append(name)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self._frozen:
            getattr(self, name).eval()
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters an optimiser should see: everything that is not frozen, each once."""
        return (p for p in self.parameters() if p.requires_grad)

    def training_state(self) -> dict[str, Any]:
        """What a checkpoint stores: tensors without the frozen parts, the frozen parts' fingerprints, the counters."""
        prefixes = tuple(f"{name}." for name in self._frozen)
        return {
            "tensors": {k: v for k, v in self.state_dict().items() if not (prefixes and k.startswith(prefixes))},
            "frozen": {name: fingerprint(getattr(self, name)) for name in self._frozen},
            "counters": dict(self.counters),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`training_state` gave.

        Raises:
            RunError: the frozen parts are others than those of the checkpoint, or the tensors do not fit.
        """
        for name, mark in state["frozen"].items():
            if name not in self._frozen or fingerprint(getattr(self, name)) != mark:
                raise RunError(f"the checkpoint was made with another '{name}': its weights differ; give the same one")
        missing, unexpected = self.load_state_dict(state["tensors"], strict=False)
        prefixes = tuple(f"{name}." for name in self._frozen)
        missing = [k for k in missing if not (prefixes and k.startswith(prefixes))]
        if missing or unexpected:
            raise RunError(
                f"the checkpoint does not fit the method: missing {missing[:3]}, unexpected {unexpected[:3]}"
            )
        self.counters = Counter(state["counters"])


def freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode and no gradients, in place."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return module


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """A hash of a module's parameters and buffers, names and values (hex, 32 digits)."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    return digest.hexdigest()[:32]

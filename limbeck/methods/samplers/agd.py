"""AGD: classifier-free guidance distilled into small adapters on a frozen network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.guidance_adapters import AdapterKind
from limbeck.blocks.guidance_injection import GuidanceAdapters, time_embedder
from limbeck.core.batch import Batch, Losses, first_tensor, map_tensors
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.method import fingerprint, freeze
from limbeck.core.stage import Stage, Stepper
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.guided import GuidedDenoiser, GuidedNetwork, carrier, model_time_range, save_adapters
from limbeck.diffusion.pairs import noise_of
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import precise
from limbeck.diffusion.trajectories import (
    Recorded,
    TrajectoryData,
    TrajectoryStore,
    record_diffused,
    record_guided,
)
from limbeck.methods.samplers.base import SamplerDistiller, sample_shape
from limbeck.metrics.cost import count_parameters

CHUNK = 256
"""Trajectories that are recorded at once."""
KEYS = ("encoder_hidden_states", "class_labels")
"""Which part of a condition that is a mapping the adapters are told."""


class AGD(SamplerDistiller):
    r"""Adapter guidance distillation: one evaluation per step instead of two, with the guidance scale as an input.

    1. *Trajectories.* For a condition c, a scale :math:`w \sim U(w_{low}, w_{high})` and noise, the teacher's DDIM runs with guidance,
       :math:`p_w = p_\varnothing + w\,(p_c - p_\varnothing)`, p being what the network predicts, and every
       :math:`(x_t, p_w, t)` is stored beside (c, w). No images are needed.
    2. *Adapters.* The frozen network with adapters A on its blocks learns them, with gradients to the adapters alone:

       .. math:: L = E\,\| p_{\theta + A}(x_t, t, c;\ w) - p_w \|^2

       a mean over dimensions and over states that are drawn evenly from trajectories and steps.

    The student's base *is* the teacher's network, which hooks leave as it is (see :mod:`limbeck.blocks.guidance_injection`); nothing is copied, and
    checkpoints and the artifact hold adapters alone. In use, :math:`w = 1` gives the base network exactly.

    Variants that the paper compares: ``states="diffusion"`` noises data instead of running the teacher (needs samples); ``train="all"`` is full
    guidance distillation, in which a copy of the network learns as a whole and is told w beside its time; ``loss``: ``l1``; ``cosine``: squared
    errors times :math:`\tfrac12 |1 - \cos(p_c, p_w)|`; ``sigma``: times :math:`\sigma(t)` (the paper does not write this weight down: our
    decision).

    Without the engine::

        method = AGD(teacher, classes, w_range=(1, 6))
        store = method.record()
        optimizer = torch.optim.AdamW(method.trainable_parameters(), lr=2e-3)
        for _ in range(2000):
            loss = method(store.draw(128))
            ...
        method.student.predict(x_t, t, cond, guidance=4.0)  # one evaluation

    Source: "Efficient Distillation of Classifier-Free Guidance using Adapters" (2025); ``train="all"``: "On Distillation of Guided Diffusion
    Models" (2023), its first stage, with a Fourier embedding of w that is added to the embedded time.

    Raises:
        InputError: a teacher without a null condition, or one whose network has no blocks for adapters; a student.
    """

    name = "agd"
    student: GuidedDenoiser

    class Config(SamplerDistiller.Config):
        steps: int = Field(2000, ge=1, description="updates of the adapters")
        optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="update rule")
        lr: float = Field(2e-3, gt=0, description="peak learning rate of the adapters")
        warmup: float = Field(0.1, ge=0, lt=1, description="fraction of training with a linearly rising rate")
        guidance: float = Field(3.0, ge=0, description="guidance weight w that the result is judged at")
        teacher_nfe: int = Field(32, ge=1, description="steps of the trajectories and of the result")
        teacher_solver: Literal["ddim", "euler", "heun", "dpm2m"] = Field(
            "ddim", description="solver of the result; trajectories are DDIM's"
        )
        w_range: tuple[float, float] = Field((1.0, 6.0), description="least and largest guidance weight of training")
        trajectories: int = Field(2500, ge=1, description="guided trajectories that are recorded")
        states: Literal["guided", "diffusion"] = Field(
            "guided", description="learn at states of guided trajectories, or at noised data"
        )
        adapter: AdapterKind = Field("cross_attention", description="kind of adapter")
        adapter_dim: int = Field(32, ge=2, description="width of what adapters are told; even")
        told: tuple[str, ...] = Field(("w", "t", "c"), description="what adapters are told: w, t (time), c (condition)")
        blocks: tuple[str, ...] = Field(
            (), description="paths or patterns of the blocks with adapters; none: attentions, or residual blocks"
        )
        own_encoders: bool = Field(False, description="encoders of w, t and c for each adapter; else they share them")
        positions: Literal["sinusoidal", "learned"] = Field("sinusoidal", description="of cross-attention's tokens")
        adapter_dropout: float = Field(0.0, ge=0, lt=1, description="dropout in the offset adapter")
        time_path: str | None = Field(
            None, description="the network's own module that embeds the time, to be reused; none: an encoder of its own"
        )
        class_path: str | None = Field(None, description="the same for classes")
        loss: Literal["l2", "l1", "cosine", "sigma"] = Field("l2", description="error, or weight of squared errors")
        train: Literal["adapters", "all"] = Field(
            "adapters", description="adapters alone, or all weights of a copy (full guidance distillation)"
        )
        half: bool = Field(False, description="store trajectories in 16 bits")

        presets = {
            "paper": {
                "steps": 5000,
                "batch_size": 64,
                "lr": 1e-4,
                "clip_grad": None,
                "teacher_nfe": 1000,
                "trajectories": 1000,
                "adapter": "offset",
                "adapter_dim": 256,
                "half": True,
            },
            "paper-text": {
                "steps": 5000,
                "batch_size": 64,
                "lr": 1e-4,
                "clip_grad": None,
                "teacher_nfe": 999,
                "trajectories": 500,
                "w_range": (1.0, 12.0),
                "adapter_dim": 320,
                "half": True,
            },
        }

    def __init__(
        self,
        teacher: Any,
        conditions: Any = None,
        student: Denoiser | None = None,
        config: Any = None,
        *,
        shape: Sequence[int] | None = None,
        seed: int = 0,
        **overrides: Any,
    ) -> None:
        if student is not None:
            raise InputError("agd puts adapters on the teacher's own network: it takes no student")
        if config is not None and overrides:
            raise InputError(f"give AGD either a config or single settings ({', '.join(overrides)}), not both")
        settings = type(self).Config.make(**overrides) if config is None else config
        denoiser = getattr(teacher, "denoiser", teacher)
        if isinstance(denoiser, Denoiser):
            if not denoiser.conditional:
                raise InputError("the teacher has no null condition: there is no guidance to distil (null_cond=…)")
            listed = Conditions.of(conditions)
            if listed.values is None:
                raise InputError("agd needs conditions to guide towards: class ids or embeddings")
            student = guided_student(denoiser, listed, sample_shape(shape, teacher, denoiser), settings)
        super().__init__(teacher, conditions, student, settings, shape=shape, seed=seed)

    # ---- 1. trajectories ---------------------------------------------------------------------------------------------

    def make_trajectories(self) -> TrajectoryStore:
        """An empty store."""
        config = self.config
        folder = None if config.pair_folder is None else Path(config.pair_folder).expanduser() / "trajectories"
        times = self.teacher.schedule.times(config.teacher_nfe)
        return TrajectoryStore(config.trajectories, times, self.shape, folder, config.half)

    def record(self, data: Data | None = None, seed: int = 0) -> TrajectoryStore:
        """All trajectories at once, for loops of your own; ``data`` are samples, for ``states="diffusion"``."""
        store = self.make_trajectories()
        for start in range(0, store.count, CHUNK):
            self.record_chunk(store, start, data, seed)
        return store

    def record_chunk(self, store: TrajectoryStore, start: int, data: Data | None, seed: int) -> None:
        """Trajectories number ``start`` and on, as many as fit into a chunk; a function of the seed and their place.

        Raises:
            InputError: data is needed and there is none.
        """
        count = min(CHUNK, store.count - start)
        generator = torch.Generator().manual_seed(mix_seed(seed, start, 503))
        low, high = self.config.w_range
        w = low + (high - low) * torch.rand(count, generator=generator)
        if self.config.states == "diffusion":
            recorded, cond = self._diffused(store.times, data, w, generator)
        else:
            drawn = self.conditions.draw(count, generator)
            cond = map_tensors(drawn, lambda v: v.to(self.device))
            z = noise_of(mix_seed(seed, 509), start, count, self.shape).to(self.device)
            first = Sampler.ode(self.teacher, self.config.teacher_nfe).start(z)
            recorded = record_guided(self.teacher, first, store.times, cond, w.to(self.device))
        store.write(start, recorded, cond, w)
        self.counters["teacher_evaluations"] += 2 * count * store.steps

    def _diffused(
        self, times: Tensor, data: Data | None, w: Tensor, generator: torch.Generator
    ) -> tuple[Recorded, Any]:
        if data is None:
            raise InputError("states='diffusion' needs samples with their conditions, such as (images, labels)")
        ids = torch.randint(len(data), (len(w),), generator=generator)
        x0, cond = self.unpack(data.fetch(ids, None).to(self.device))
        if x0 is None or cond is None:
            raise InputError("states='diffusion' needs samples with their conditions, such as (images, labels)")
        return record_diffused(self.teacher, x0, times, cond, w.to(self.device), generator), cond

    # ---- 2. adapters -------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        """The error on a batch of states, as :meth:`~limbeck.diffusion.trajectories.TrajectoryStore.batch` gives them.

        Raises:
            InputError: the batch holds no states.
        """
        inputs = batch.inputs
        if not isinstance(inputs, Mapping) or "prediction" not in inputs:
            raise InputError(
                "agd learns from recorded states: use method.record().draw(n), or let the engine run its stages"
            )
        x_t, t, w, wanted = (inputs[k] for k in ("x_t", "t", "w", "prediction"))
        cond = inputs["cond"]
        found = self.student.guided(x_t, t, cond, w, None)
        if self.config.loss == "l1":
            return Losses(guidance=(found - wanted).abs().mean())
        errors = precise(found - wanted).square().flatten(1).mean(1)
        if self.config.loss == "sigma":
            errors = errors * self.teacher.schedule.sigma(t)
        elif self.config.loss == "cosine":
            with torch.no_grad():
                plain = self.teacher.raw(x_t, t, cond)
            errors = errors * 0.5 * (1 - nn.functional.cosine_similarity(plain.flatten(1), wanted.flatten(1))).abs()
        return Losses(guidance=errors.mean())

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        store, config = self.make_trajectories(), self.config
        chunks = -(-store.count // CHUNK)

        def update(_: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            self.record_chunk(store, stepper.step * CHUNK, train, mix_seed(seed, 19))
            return {"trajectories": torch.tensor(float(store.done))}

        return [
            Stage("trajectories", chunks, update=update, state={"trajectories": store}),
            Stage(
                "adapters",
                config.steps,
                Stream(TrajectoryData(store), config.batch_size, seed=mix_seed(seed, 5)),
                losses=self.losses,
                optimisers=lambda: self.optimised(config.steps),
                after_step=self.follow,
                state={"trajectories": store},
            ),
        ]

    # ---- the result --------------------------------------------------------------------------------------------------

    def sampler(self) -> Sampler:
        """As many steps as the trajectories have, one evaluation each."""
        config = self.config
        return Sampler.ode(self.averaged, config.teacher_nfe, config.teacher_solver, config.guidance)

    def contestants(self) -> dict[str, Sampler]:
        """As in the family, and the teacher without guidance, which costs as much as the result."""
        return {**super().contestants(), "without guidance": self.teacher_sampler(guidance=1.0)}

    @property
    def parameter_share(self) -> float:
        """Trained parameters, as a share of those of the teacher's network."""
        trained = sum(p.numel() for p in self.student.parameters() if p.requires_grad)
        return trained / count_parameters(self.teacher.module)

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """As in the family, and the share of parameters that were trained."""
        return {**super().evaluate(test, class_names), "parameter_share": self.parameter_share}

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The adapters alone (all weights with ``train="all"``), and what they belong to."""
        module = self.averaged.module
        assert isinstance(module, GuidedNetwork)
        about = {
            **description,
            "sampler": self.sampler().describe(),
            "w_range": list(self.config.w_range),
            "base": {**self.teacher.describe(), "fingerprint": fingerprint(self.teacher.module)},
        }
        save_adapters(module, folder, about)


def guided_student(teacher: Denoiser, conditions: Conditions, shape: Sequence[int], config: Any) -> GuidedDenoiser:
    """The teacher's network with new adapters (``train="all"``: a copy that is told w beside its time)."""
    full = config.train == "all"
    base = deepcopy(teacher.module) if full else teacher.module
    freeze(teacher)
    network = carrier(base)
    where = next(iter([*base.parameters(), *base.buffers()]), torch.zeros(()))
    cond = map_tensors(conditions.rows(torch.arange(1)), lambda v: v.to(where.device))
    x = torch.zeros((1, *shape), device=where.device)
    t = torch.full((1,), teacher.schedule.t_max, device=where.device)
    paths = config.blocks or ((time_embedder(network),) if full else "auto")
    reuse = {k: p for k, p in (("t", config.time_path), ("c", config.class_path)) if p is not None and k in config.told}
    told = {"inputs": ("w",), "kind": "offset"} if full else {"inputs": config.told, "kind": config.adapter}
    adapters = GuidanceAdapters.probe(
        network,
        lambda: base(x, teacher.schedule.to_model_time(t), cond),
        blocks=paths,
        w_range=config.w_range,
        t_range=model_time_range(teacher),
        reuse={} if full else reuse,
        dim=config.adapter_dim,
        positions=config.positions,
        dropout=config.adapter_dropout,
        shared=not config.own_encoders,
        exact_one=not full,
        **told,
        **({} if full else condition_settings(teacher, conditions)),
    )
    return GuidedDenoiser.of(teacher, GuidedNetwork(base, adapters.to(where.device), owned=full))


def condition_settings(teacher: Denoiser, conditions: Conditions) -> dict[str, Any]:
    """What adapters must know of the conditions: their kind, size and name.

    Raises:
        InputError: conditions of a shape that adapters do not take.
    """
    values, null, key = conditions.values, teacher.null_cond, KEYS[0]
    if isinstance(values, Mapping):
        key = next((k for k in KEYS if k in values), next(iter(values)))
        values = values[key]
        null = null.get(key) if isinstance(null, Mapping) else None
    assert isinstance(values, Tensor)
    if values.ndim == 1 and not values.is_floating_point():
        blank = first_tensor(null)
        most = max(int(values.max()), -1 if blank is None else int(blank.max()))
        return {"condition": "class", "size": most + 1, "key": key}
    if values.ndim not in (2, 3) or not values.is_floating_point():
        raise InputError(f"agd takes class ids (N,), vectors (N, D) or tokens (N, L, D), not {tuple(values.shape)}")
    tokens = 2 + (values.shape[1] if values.ndim == 3 else 1)
    kind = "tokens" if values.ndim == 3 else "vector"
    return {"condition": kind, "size": int(values.shape[-1]), "key": key, "tokens": tokens}

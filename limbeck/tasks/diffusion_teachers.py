"""Reference teachers of generation: diffusion models trained once on a task, then kept in the cache folder by content hash."""

from __future__ import annotations

import torch

from limbeck.adapters.denoising import build_network
from limbeck.blocks.ema import EMA
from limbeck.core.artifacts import WEIGHTS, load_weights, save_weights
from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import UnknownNameError
from limbeck.core.files import write_json
from limbeck.core.method import Method
from limbeck.core.optim import TrainingConfig, make_optimised
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage
from limbeck.diffusion.conditions import drop
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.losses import denoising_loss, edm_weight
from limbeck.diffusion.schedules import EDM, SCHEDULES, Schedule, make_schedule
from limbeck.diffusion.time_samplers import LogNormal, TimeSampler, Uniform
from limbeck.tasks.base import cache_folder, hash_of
from limbeck.tasks.generation import GenerationTask
from limbeck.tasks.teachers import alone

RECIPE = 2  # part of the cache key: raise it when the way teachers are trained changes
PREDICTS = {"flow": "flow", "vp-discrete": "eps", "vp-cosine": "v", "edm": "x0", "trig": "v"}
"""What a teacher of each schedule predicts unless said otherwise."""


class DenoiserTraining(Method):
    """Denoising score matching (or flow matching) of one network on real samples, with an average of its weights."""

    name = "denoiser"

    class Config(TrainingConfig):
        """Adam with a cosine schedule."""

    def __init__(
        self,
        denoiser: Denoiser,
        times: TimeSampler,
        *,
        dropout: float = 0.1,
        decay: float = 0.998,
        config: TrainingConfig | None = None,
        **overrides: object,
    ) -> None:
        super().__init__(config, **overrides)
        self.denoiser, self.times, self.dropout = denoiser, times, dropout
        self.average = EMA(denoiser.module, decay, warmup=True)

    def losses(self, batch: Batch) -> Losses:
        cond = batch.labels if self.denoiser.conditional else None
        cond = drop(cond, self.denoiser.null_cond, self.dropout)
        t = self.times(len(batch.inputs), device=batch.inputs.device)
        weight = edm_weight(self.denoiser.sigma_data) if self.denoiser.precond == "edm" else None
        space = self.denoiser.prediction
        return Losses(denoising=denoising_loss(self.denoiser, batch.inputs, t, cond, space=space, weight=weight))

    def stage(self, data: Data, seed: int, steps: int) -> Stage:
        return Stage(
            "training",
            steps,
            Stream(data, self.config.batch_size, seed=seed),
            losses=self.losses,
            optimisers=lambda: {"main": make_optimised(self.denoiser.parameters(), self.config, steps)},
            after_step=lambda _: self.average.update(self.denoiser.module),
        )


def reference_schedule(schedule: str | Schedule) -> Schedule:
    """A schedule by name as reference teachers use it: ``edm`` with noise from 0.02 to 20, which suits 8x8 images and the plane."""
    if isinstance(schedule, Schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise UnknownNameError("noise schedule", schedule, SCHEDULES)
    return EDM(0.02, 20.0) if schedule == "edm" else make_schedule(schedule)


def training_times(schedule: Schedule) -> TimeSampler:
    """Where reference teachers are trained: evenly in time; for ``edm`` ln sigma normal around -0.4."""
    if schedule.name == "edm":
        return LogNormal(-0.4, 1.2, schedule.t_min, schedule.t_max)
    return Uniform(schedule.t_min, schedule.t_max)


def fresh_denoiser(
    task: GenerationTask, schedule: Schedule, prediction: str | None, network: str, *, classes: bool = True
) -> Denoiser:
    """An untrained denoiser for a task, its weights from torch's random state."""
    count = task.num_classes if classes else None
    module = build_network(network, task.shape, count, schedule)
    edm = schedule.name == "edm"
    return Denoiser(
        module,
        schedule,
        prediction or PREDICTS[schedule.name],
        precond="edm" if edm and prediction in (None, "x0") else None,
        sigma_data=task.sigma_data,
        null_cond=None if count is None else torch.tensor(count),
    )


def diffusion_teacher(
    task: GenerationTask,
    schedule: str | Schedule = "flow",
    prediction: str | None = None,
    *,
    network: str = "mlp-w160-b3",
    steps: int = 5000,
    dropout: float = 0.1,
    seed: int = 0,
    classes: bool = True,
    progress: bool = True,
) -> Denoiser:
    """A diffusion model trained on a task's training part, from the cache where it is there.

    The random state of the caller is left alone, so a run does not depend on whether its teacher came from the cache.

    Args:
        task: what to learn.
        schedule: a schedule, or its name.
        prediction: what the network predicts; None: what is usual with the schedule.
        network: see :func:`limbeck.adapters.denoising.build_network`.
        steps: updates, in batches of 128.
        dropout: share of conditions that are replaced by the null condition in training.
        classes: whether it is told the classes.
        progress: show a bar while training.

    Returns:
        the denoiser with averaged weights, in evaluation mode.
    """
    made = reference_schedule(schedule)
    with preserved_random_state():
        seed_everything(mix_seed(seed, 131))
        denoiser = fresh_denoiser(task, made, prediction, network, classes=classes)
        about = {**denoiser.describe(), "network": network, "steps": steps, "dropout": dropout, "seed": seed}
        key = hash_of(RECIPE, task.fingerprint, sorted(about.items(), key=str))
        folder = cache_folder() / "diffusion" / f"{task.name}-{made.name}-{network}-{key}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if not (folder / WEIGHTS).exists():
                training = DenoiserTraining(
                    denoiser,
                    training_times(made),
                    dropout=dropout,
                    optimizer="adam",
                    lr=2e-3,
                    weight_decay=0.0,
                    batch_size=128,
                    warmup=0.02,
                    clip_grad=1.0,
                )
                engine = Engine(folder, EngineConfig(progress=progress), seed=mix_seed(seed, 137))
                engine.run(training, [training.stage(task.train, seed, steps)], resume=True)
                save_weights(training.average.module.cpu(), folder / WEIGHTS)
                write_json(folder / "about.json", {"task": task.describe(), **about})
                (folder / "checkpoint.pt").unlink(missing_ok=True)
        load_weights(denoiser.module, folder / WEIGHTS)
    return denoiser.cpu().eval()

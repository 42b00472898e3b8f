"""Reference teachers for tasks whose every pixel has a class: trained once, semi-supervised, then kept in the cache folder."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from limbeck import networks
from limbeck.blocks.cross_pseudo import cross_pseudo_terms
from limbeck.blocks.cutmix_masks import MixedPair
from limbeck.core.artifacts import WEIGHTS, load_weights, save_weights
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.files import write_json
from limbeck.core.method import Method
from limbeck.core.optim import TrainingConfig, make_optimised
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.semi import SemiSupervisedData, SemiSupervisedStream
from limbeck.core.stage import Stage
from limbeck.losses.segmentation import pixel_cross_entropy
from limbeck.tasks.base import Task, cache_folder, hash_of
from limbeck.tasks.teachers import alone, as_labels

RECIPE = 1  # part of the cache key: raise it when the way teachers are trained changes
STEPS = 400
LABELS_FIRST = 0.25


class SegmenterTraining(Method):
    """Training of one network on labelled and unlabelled images by cross pseudo supervision with CutMix.

    A second branch of the same architecture and other initial weights learns beside it and is thrown away. Both learn from the
    labels alone for the first quarter of the updates: from random weights, pseudo labels would soon be background everywhere
    (published recipes start from pretrained encoders). Where all images have labels, the network is trained alone.

    Args:
        network: the branch that is kept.
        peer: the other one.
        config: hyper-parameters; or give single ones as keyword arguments.
    """

    name = "teacher"

    class Config(TrainingConfig):
        """AdamW with a cosine schedule and a short warm-up."""

        batch_size: int = Field(4, ge=1, description="labelled images per update")
        unlabelled_batch_size: int = Field(4, ge=1, description="mixed unlabelled images per update")
        lr: float = Field(5e-3, gt=0, description="peak learning rate")
        warmup: float = Field(0.05, ge=0, lt=1, description="fraction of training with a linearly rising rate")

    def __init__(self, network: nn.Module, peer: nn.Module, config: Any = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.network, self.peer = network, peer

    def losses(self, batch: Batch) -> Losses:
        labels = as_labels(batch.labels)
        if batch.unlabelled is None:
            own, other = (
                pixel_cross_entropy(logits_of(call_model(m, batch.inputs)), labels) for m in (self.network, self.peer)
            )
            return Losses(supervised=own + other)
        pair = MixedPair.draw(batch.unlabelled)
        supervised, crossed = cross_pseudo_terms(self.network, self.peer, batch.inputs, labels, pair)
        return Losses(supervised=supervised, cross=crossed)

    def stages(self, data: Data, seed: int, steps: int) -> list[Stage]:
        """``labels`` and then ``cross``, together ``steps`` updates."""
        config = self.config
        if not isinstance(data, SemiSupervisedData):
            stream = Stream(data, config.batch_size + config.unlabelled_batch_size, seed=seed)
            return [self._stage("labels", steps, stream, config)]
        first = min(max(1, round(LABELS_FIRST * steps)), steps - 1)
        stages = [
            self._stage(
                "cross",
                steps - first,
                SemiSupervisedStream(data, config.batch_size, config.unlabelled_batch_size, copies=2, seed=seed),
                config,
            )
        ]
        if first:
            labelled = Stream(data.labelled, config.batch_size, seed=mix_seed(seed, 47))
            stages.insert(0, self._stage("labels", first, labelled, config.replace(schedule="constant")))
        return stages

    def _stage(self, name: str, steps: int, stream: Stream, recipe: TrainingConfig) -> Stage:
        return Stage(
            name,
            steps,
            stream,
            losses=self.losses,
            optimisers=lambda: {"main": make_optimised(self.trainable_parameters(), recipe, steps)},
        )


def reference_segmenter(
    task: Task, network: str, *, seed: int = 0, steps: int | None = None, progress: bool = True
) -> nn.Module:
    """A network trained on the task's training part, labelled and unlabelled, from the cache where it is there.

    The random state of the caller is left alone, so a run does not depend on whether its teacher came from the cache.

    Args:
        task: what to learn.
        network: a network's name.
        seed: seeds initialisation and training.
        steps: updates; 400 if None.
        progress: show a bar while training.

    Returns:
        the network in evaluation mode.
    """
    steps = STEPS if steps is None else steps
    key = hash_of("segmenter", RECIPE, task.fingerprint, network, seed, steps)
    folder = cache_folder() / "teachers" / f"{task.name}-{network.replace(':', '_').replace('.', '_')}-{key}"
    with preserved_random_state():
        seed_everything(mix_seed(seed, 101))
        first, second = (
            networks.build(network, in_shape=task.in_shape, num_classes=task.num_classes) for _ in range(2)
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if not (folder / WEIGHTS).exists():
                training = SegmenterTraining(first, second)
                engine = Engine(folder, EngineConfig(progress=progress), seed=mix_seed(seed, 103))
                engine.run(training, training.stages(task.train, seed, steps), resume=True)
                save_weights(first.cpu(), folder / WEIGHTS)
                write_json(
                    folder / "about.json", {"task": task.describe(), "network": network, "seed": seed, "steps": steps}
                )
                (folder / "checkpoint.pt").unlink(missing_ok=True)
        load_weights(first, folder / WEIGHTS)
    return first.eval()

"""Does a student learn better features from an untrained network, without labels, than that network and the raw input have?

Data: 4,000 images of CIFAR-10, averaged over 2x2 pixels to 16x16 and standardised, where the data set is given; else the digits.
Encoder: seven convolutions without any normalisation (vgg-w32-s4), so that no batch statistics can explain a difference between
student and teacher.

Fixed beforehand: 200 updates of Adam in batches of 128 at learning rate 1e-3, a head of 512-512-128 with 1,024 outputs, alpha 1e-10 for
the method; the number of updates because the gain peaks early on so few images, and no step is chosen afterwards. All distilled arms
of a seed have the same teacher, the same second initialisation and the same order of batches; alpha alone, or the images, differ.
Nothing is tuned, so no arm has candidates. The linear probe is logistic regression with C = 0.1 on features standardised by training
statistics, for raw pixels as well, fitted on the labels of the training images; the encoder is frozen in evaluation mode.

The headline is the paper's effect: the student's probe beats the teacher's (by more than two points on CIFAR-10) and the raw input's,
and it is the images that make the difference, since a student that saw Gaussian noise instead is worse. On digits, whose pixels are
nearly linearly separable, the comparison with the raw input decides nothing and is only reported.

Where the student starts is reported and no part of the verdict. The paper finds alpha up to 0.6 equally good and alpha 1 worse, but
better than the teacher, after 100 epochs. Pilots on validation data (one seed; probe of the teacher 31.9 %, of the pixels 31.7 %) gave
35.0 % from next to the teacher, 36.1 % from an independent start and 28.8 % from noise: at learning rate 1e-3 the first steps of Adam
throw a network of this size so far that the start hardly counts. With steps so small that the student stays near its teacher (learning
rate 3e-4, or a large eps) it gained nothing in 200 updates.

Reported as well, at the start of the student and at that of its teacher: a lottery ticket, two rounds of pruning to a fifth of the
weights with rewinding to the start, each network trained for 50 updates on the labels; and the barrier of the test error (1,000
images) on the line between two networks trained from the same start in different orders. That is far less training than in the
paper, so these show a direction and are no part of the verdict.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import catalogue
from limbeck.blocks.encoders import Encoder, RawInput
from limbeck.blocks.interpolation import state_of
from limbeck.blocks.pruning import Masks, lottery_tickets
from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.models import common
from limbeck.core.data import Data, TensorData, mix_seed
from limbeck.core.engine import Engine
from limbeck.metrics.landscape import mode_connectivity
from limbeck.metrics.probing import KNNProbe, LinearProbe, extract_features
from limbeck.tasks.base import Task, channel_statistics, take

STEPS, TRAINING_STEPS = 200, 50
ENCODER = "vgg-w32-s4"
LOCAL = 1e-10
ROUNDS, SPARSITY = 2, 0.8
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 128,
    "lr": 1e-3,
    "head_hidden": 512,
    "head_bottleneck": 128,
    "head_outputs": 1024,
    "evaluations": 0,
}


@dataclass(frozen=True)
class Ground:
    """What all arms share. Hashable, so that what is made from it is made once per process."""

    data_root: str | None
    on_images: bool

    @property
    def task(self) -> Task:
        return _images(self.data_root) if self.on_images else common.task(None, "digits", None, augment=False)


@functools.lru_cache(maxsize=2)
def _images(data_root: str | None) -> Task:
    """CIFAR-10 at 16x16: 4,000 training, 1,000 validation and 3,000 test images."""
    full = common.task(data_root, "cifar10", 4000, augment=False)
    parts = {}
    for name, size in (("train", None), ("val", 1000), ("test", 3000)):
        data: Any = getattr(full, name)
        ids = take(data.labels, size, 0, what=name)
        parts[name] = (F.avg_pool2d(data.inputs[ids].float(), 2).round().to(torch.uint8), data.labels[ids])
    mean, std = channel_statistics(parts["train"][0])
    train, val, test = (TensorData(*parts[name], mean=mean, std=std) for name in ("train", "val", "test"))
    source = f"{full.source}, averaged over 2x2 pixels"
    return replace(full, train=train, val=val, test=test, in_shape=(3, 16, 16), source=source)


def noise_like(data: Data, seed: int) -> TensorData:
    """As many samples of standard normal noise as a data set has, of the same shape."""
    shape = (len(data), *data.fetch(torch.arange(1), None).inputs.shape[1:])
    return TensorData(torch.randn(shape, generator=torch.Generator().manual_seed(mix_seed(seed, 51))))


def probed(model: nn.Module, task: Task) -> Outcome:
    """Both probes of frozen features, fitted on training data, on validation and on test data."""
    fitted = _labelled(model, task.train)
    probes = {"linear_probe": LinearProbe(c=0.1).fit(*fitted), "knn_probe": KNNProbe(20).fit(*fitted)}
    scores = [
        {name: p.score(*features) for name, p in probes.items()}
        for features in (_labelled(model, part) for part in (task.val, task.test))
    ]
    return Outcome(*scores)


def _labelled(model: nn.Module, data: Data) -> tuple[Tensor, Tensor]:
    features, labels = extract_features(model, data)
    assert labels is not None
    return features, labels


def distil(ground: Ground, seed: int, alpha: float, *, noise: bool = False, trained: bool = True) -> Any:
    """The method on the ground's encoder, trained; or as it starts."""
    cls: Any = catalogue.get("random-teacher").load()
    config = cls.Config.make(**{**SETTINGS, "alpha": alpha})
    made = cls.on_task(ground.task, cls.Setup.make(student=ENCODER), config, seed=seed, progress=False)
    if trained:
        data = noise_like(ground.task.train, seed) if noise else ground.task.train
        Engine(None, common.QUIET, seed=mix_seed(seed, 2)).run(made, made.stages(data, None, seed=seed))
    return made


def trainability(network: nn.Module, task: Task, seed: int) -> dict[str, float]:
    """What supervised training makes of a start: the dense network, a sparse ticket of it, and how two dense ones connect.

    Returns:
        ``dense`` and ``ticket``, test accuracies; ``ticket_drop``, their difference; ``barrier`` of the test error between two
        networks that differ in the order of their batches.
    """
    start = state_of(network)

    def train(model: nn.Module, masks: Masks | None, order: int = 0) -> None:
        cls: Any = catalogue.get("supervised").load()
        config = cls.Config.make(
            steps=TRAINING_STEPS, batch_size=128, lr=1e-3, weight_decay=0.0, optimizer="adam", schedule="constant"
        )
        method = cls(model, config)
        stages = method.stages(task.train, None, seed=mix_seed(seed, 53, order))
        if masks is not None:
            stages[0].after_step = lambda step: masks.apply_(model)
        Engine(None, common.QUIET, seed=mix_seed(seed, 54)).run(method, stages)

    def accuracy(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
        return common.measures(model, task, "test")["accuracy"], state_of(model)

    fraction = 1 - (1 - SPARSITY) ** (1 / ROUNDS)
    tickets = list(lottery_tickets(network, train, rounds=ROUNDS, fraction=fraction, evaluate=accuracy))
    network.load_state_dict(start)
    train(network, None, order=1)
    assert isinstance(task.test, TensorData)
    few = task.test.subset(torch.arange(min(1000, len(task.test))))
    line = mode_connectivity(network, tickets[0].score[1], network, few, points=7)
    dense, ticket = tickets[0].score[0], tickets[-1].score[0]
    return {"dense": dense, "ticket": ticket, "ticket_drop": dense - ticket, "barrier": line.barrier}


def claim(data_root: str | None = None) -> Claim:
    """CIFAR-10 at 16x16 where it is given, else the digits."""
    ground = Ground(data_root, common.available("cifar10", data_root))

    def student(settings: Mapping[str, Any], seed: int, alpha: float, noise: bool = False) -> Outcome:
        return probed(distil(ground, seed, alpha, noise=noise).encoder, ground.task)

    def with_training(made: nn.Module, seed: int) -> Outcome:
        found = probed(Encoder(made), ground.task)
        return Outcome(found.val, {**found.test, **trainability(made, ground.task, seed)})

    def local(settings: Mapping[str, Any], seed: int) -> Outcome:
        return with_training(distil(ground, seed, LOCAL).student, seed)

    def teacher(settings: Mapping[str, Any], seed: int) -> Outcome:
        return with_training(distil(ground, seed, 0.0, trained=False).student, seed)

    def raw(settings: Mapping[str, Any], seed: int) -> Outcome:
        return probed(RawInput(), ground.task)

    def distilled(role: Any, description: str, **options: Any) -> Arm:
        return Arm(role, description, functools.partial(student, **options))

    points = 0.02 if ground.on_images else 0.0

    def reported(
        statement: str, method: str, baseline: str, metric: str, margin: float = 0.0, higher: bool = True
    ) -> Check:
        return Check(statement, method, baseline, metric, margin, higher, headline=False)

    return Claim(
        name="random-teacher",
        arms={
            "random-teacher": Arm("method", "the student, started next to its random teacher (alpha 1e-10)", local),
            "teacher": Arm("baseline", "the untrained teacher", teacher),
            "input": Arm("baseline", "raw pixels", raw),
            "alpha-0.5": distilled("control", "started half way to another initialisation", alpha=0.5),
            "alpha-1": distilled("control", "started at another initialisation", alpha=1.0),
            "noise": distilled(
                "control", "started next to its teacher, Gaussian noise for images", alpha=LOCAL, noise=True
            ),
        },
        checks=[
            Check(
                "a linear probe reads the student better than its teacher",
                "random-teacher",
                "teacher",
                "linear_probe",
                points,
            ),
            Check(
                "a linear probe reads the student better than the raw input",
                "random-teacher",
                "input",
                "linear_probe",
                headline=ground.on_images,
            ),
            Check("the images matter: noise gives less", "random-teacher", "noise", "linear_probe"),
            reported(
                "from noise the student learns nothing (half a point at most)",
                "teacher",
                "noise",
                "linear_probe",
                -0.005,
            ),
            reported(
                "a start next to the teacher beats an independent one",
                "random-teacher",
                "alpha-1",
                "linear_probe",
                points,
            ),
            reported("from an independent start it still beats the teacher", "alpha-1", "teacher", "linear_probe"),
            reported(
                "half way is about as good (within two points)", "alpha-0.5", "random-teacher", "linear_probe", -0.02
            ),
            reported("neighbours read the student better than its teacher", "random-teacher", "teacher", "knn_probe"),
            reported("neighbours read the student better than the raw input", "random-teacher", "input", "knn_probe"),
            reported(
                "trained on labels, the student's start beats the random one", "random-teacher", "teacher", "dense"
            ),
            reported("so does its ticket with a fifth of the weights", "random-teacher", "teacher", "ticket"),
            reported("the ticket loses less accuracy", "random-teacher", "teacher", "ticket_drop", higher=False),
            reported("two trained students are better connected", "random-teacher", "teacher", "barrier", higher=False),
        ],
        data=ground.task.describe(),
        seeds=3,
        select="linear_probe",
        note=note,
        settings={**SETTINGS, "encoder": ENCODER, "training_steps": TRAINING_STEPS, "sparsity": SPARSITY},
    )


def note(result: Mapping[str, Any]) -> str:
    """All probes side by side, and what the trainings from both starts gave."""

    def mean(arm: str, metric: str = "linear_probe") -> float:
        values = result["arms"][arm]["metrics"][metric]
        return float(sum(values) / len(values))

    return (
        f"Mean linear probe: teacher {mean('teacher'):.1%}, raw input {mean('input'):.1%}, student {mean('random-teacher'):.1%} "
        f"(alpha 0.5: {mean('alpha-0.5'):.1%}, alpha 1: {mean('alpha-1'):.1%}, noise for images: {mean('noise'):.1%}). "
        f"Trained on labels from the student's and the teacher's weights: {mean('random-teacher', 'dense'):.1%} and "
        f"{mean('teacher', 'dense'):.1%} dense, {mean('random-teacher', 'ticket'):.1%} and {mean('teacher', 'ticket'):.1%} with a fifth of "
        f"the weights, barriers {mean('random-teacher', 'barrier'):.1%} and {mean('teacher', 'barrier'):.1%}. Small encoder, few images and "
        "200 updates; the paper's networks and schedules of 100 epochs were not run."
    )

"""Does self-distillation help where the ridge is too small, and does ground truth keep it from harm where the ridge is large?

Kernel part (it makes the verdict). Scikit-learn's diabetes data, standardised, RBF kernel with gamma 0.02, 8 steps. A seed is a
random split into 150 training, 100 validation and 192 test samples, the same for every arm, and everything else is deterministic.
Fixed beforehand: the small ridges 0.001, 0.01 and 0.1 and the large ones 1, 3 and 10, of which the middle ones (0.01 and 3) make the
verdict and the others are reported. Validation data serves for the weights alone; steps are never chosen (the last one counts), except in
the control that stops early. The headline checks:

- ridge 0.01: the last step with optimal weights has a smaller test error than the first fit;
- ridge 3: it has a smaller one than the last step without ground truth;
- ridge 3: it is no worse than the first fit, within 0.005 (the targets' variance is 1).

Controls say what the gain is: one constant weight from a grid of eleven, chosen on validation data, and its infinite limit, which is plain
ridge regression with a ridge divided by the weight; a ridge chosen on validation data among 26, without any distillation. Self-distillation
is a way of regularising more, so with a tuned ridge there should be little left to gain: that comparison is reported, not asked for.

Network part (reported). The digits, 300 training images of which a fifth carries a wrong label, an MLP 64-128-10, four rounds, 200 updates
per training. ``net`` estimates the weight of each round from two trainings, and ``net-grid`` trains a student for each of six weights and
keeps the one with the least squared error on validation data; both start each round from the same new weights as the other. The estimate
should lose at most 2 per cent of the grid's final squared error on validation data, with 7 trainings instead of 19. Test accuracies are compared with
those of the first round and of rounds without labels.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.models import common
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine
from limbeck.methods.models import GTSelfDistillation, KernelSelfDistillation
from limbeck.methods.models.base import make_network
from limbeck.tasks.base import Task
from limbeck.tasks.teachers import predictions

SMALL, LARGE = (0.001, 0.01, 0.1), (1.0, 3.0, 10.0)
STEPS, GAMMA = 8, 0.02
TRAIN, VAL, TEST = 150, 100, 192
WEIGHTS = tuple(np.linspace(0, 1, 11).round(1).tolist())
RIDGES = tuple(np.geomspace(1e-3, 1e2, 26).tolist())
NO_WORSE = 0.005

ROUNDS, NET_WEIGHTS = 4, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
NET = {"rounds": ROUNDS, "steps": 200, "batch_size": 64, "lr": 3e-3, "regulariser": 1e-4, "evaluations": 0}
NETWORK = "mlp-128"


# ---- kernels ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def diabetes() -> tuple[np.ndarray, np.ndarray]:
    """442 samples with 10 features, and the progress of the disease after a year."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return x, y.astype(np.float64)


def split(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training, validation and test part, standardised by the training part."""
    x, y = diabetes()
    order = np.random.default_rng(mix_seed(seed, 61)).permutation(len(y))
    parts = np.split(order[: TRAIN + VAL + TEST], [TRAIN, TRAIN + VAL])
    mean, std = x[parts[0]].mean(0), x[parts[0]].std(0)
    centre, scale = y[parts[0]].mean(), y[parts[0]].std()
    return [((x[p] - mean) / std, (y[p] - centre) / scale) for p in parts]


def kernel_arm(kind: str, seed: int) -> Outcome:
    """Squared errors under every ridge, as ``mse_ridge_…``; and the mean weight of steps 2 to T where it is optimal."""
    (x, y), (x_val, y_val), (x_test, y_test) = split(seed)
    val, test = {}, {}

    def fit(ridge: float, weight: Any, steps: float) -> KernelSelfDistillation:
        model = KernelSelfDistillation(gamma=GAMMA, ridge=ridge, gt_weight=weight, steps=steps)
        return model.fit(x, y, x_val, y_val)

    def best(models: list[KernelSelfDistillation]) -> KernelSelfDistillation:
        return min(models, key=lambda m: m.validation_losses_[-1])

    plain = best([fit(r, 1.0, 1) for r in RIDGES]) if kind == "tuned-ridge" else None
    for ridge in (*SMALL, *LARGE):
        step = -1
        if kind == "first":
            model = fit(ridge, 1.0, 1)
        elif plain is not None:
            model = plain
        elif kind == "optimal":
            model = fit(ridge, "optimal", STEPS)
            test[f"weight_ridge_{ridge:g}"] = float(model.gt_weights_[1:].mean())
        elif kind in ("pure", "pure-early"):
            model = fit(ridge, 0.0, STEPS)
            step = int(np.argmin(model.validation_losses_)) if kind == "pure-early" else -1
        else:
            model = best([fit(ridge, w, math.inf if kind == "constant-limit" else STEPS) for w in WEIGHTS])
        predicted = list(model.staged_predict(x_test))[step]
        val[f"mse_ridge_{ridge:g}"] = float(model.validation_losses_[step])
        test[f"mse_ridge_{ridge:g}"] = float(((predicted - y_test) ** 2).mean())
    return Outcome(val, test)


# ---- networks --------------------------------------------------------------------------------------------------------


def _network_task() -> Task:
    return common.task(None, "digits", 300, label_noise=0.2, augment=False)


def _squared_error(model: nn.Module, on: Task) -> float:
    """On validation data, mean over samples and classes."""
    was_training = model.training
    model.eval()
    logits, labels = predictions(model, on.val)
    model.train(was_training)
    return float(F.mse_loss(torch.softmax(logits, -1), F.one_hot(labels, on.num_classes).float()))


def _measured(model: nn.Module, on: Task, trainings: int) -> Outcome:
    error = _squared_error(model, on)
    val = {**common.measures(model, on, "val"), "val_mse": error}
    test = {**common.measures(model, on, "test"), "log_val_mse": math.log(error), "trainings": float(trainings)}
    return Outcome(val, test)


def _trained(on: Task, seed: int, gt_weight: Any, rounds: int = ROUNDS) -> GTSelfDistillation:
    method = GTSelfDistillation(make_network(NETWORK, on, seed), **{**NET, "rounds": rounds, "gt_weight": gt_weight})
    Engine(None, common.QUIET, seed=mix_seed(seed, 2)).run(method, method.stages(on.train, on.val, seed=seed))
    return method


def net(gt_weight: Any, rounds: int, settings: Mapping[str, Any], seed: int) -> Outcome:
    """All rounds with one way of weighing."""
    on = _network_task()
    method = _trained(on, seed, gt_weight, rounds)
    return _measured(method.student, on, len(method.stages(on.train, on.val)))


def net_grid(settings: Mapping[str, Any], seed: int) -> Outcome:
    """In each round a student for every weight of the grid, of which the best on validation data goes on."""
    on = _network_task()
    method = GTSelfDistillation(make_network(NETWORK, on, seed), **{**NET, "gt_weight": 0.0})
    engine = Engine(None, common.QUIET, seed=mix_seed(seed, 2))
    first, *later = method.stages(on.train, seed=seed)
    engine.run(method, [first])
    for number, stage in enumerate(later, 2):
        found = []
        for weight in NET_WEIGHTS:
            method.weights[number - 1] = weight
            engine.run(method, [stage])
            found.append((_squared_error(method.student, on), weight, copy.deepcopy(method.student.state_dict())))
        _, method.weights[number - 1], state = min(found, key=lambda f: f[0])
        method.student.load_state_dict(state)
        method.finish_round()
    return _measured(method.student, on, 1 + len(later) * len(NET_WEIGHTS))


# ---- the claim -------------------------------------------------------------------------------------------------------


def claim(data_root: str | None = None) -> Claim:
    """On data that scikit-learn brings along, whatever else is given."""

    def kernel(role: Any, description: str, kind: str) -> Arm:
        return Arm(role, description, lambda settings, seed: kernel_arm(kind, seed))

    def network(role: Any, description: str, gt_weight: Any, rounds: int = ROUNDS) -> Arm:
        return Arm(role, description, functools.partial(net, gt_weight, rounds))

    def error(statement: str, baseline: str, ridge: float, margin: float = 0.0, headline: bool = False) -> Check:
        return Check(statement, "optimal", baseline, f"mse_ridge_{ridge:g}", margin, False, headline)

    return Claim(
        name="gt-self-distillation",
        arms={
            "optimal": kernel("method", "eight steps, weight of the ground truth optimal in each", "optimal"),
            "first": kernel("baseline", "the first fit: kernel ridge regression", "first"),
            "pure": kernel("baseline", "eight steps without ground truth", "pure"),
            "pure-early": kernel("control", "without ground truth, stopped on validation data", "pure-early"),
            "constant": kernel("control", "eight steps, constant weight chosen on validation data", "constant"),
            "constant-limit": kernel(
                "control", "infinitely many steps, constant weight chosen likewise", "constant-limit"
            ),
            "tuned-ridge": kernel("control", "kernel ridge regression, ridge chosen on validation data", "tuned-ridge"),
            "net": network("method", "network, four rounds, estimated weights", "estimated"),
            "net-first": network("baseline", "network, first round: labels alone", 1.0, 1),
            "net-pure": network("baseline", "network, four rounds, later ones without labels", 0.0),
            "net-grid": Arm("control", "network, four rounds, each with the best of six weights", net_grid),
        },
        checks=[
            error("under a small ridge it beats the first fit", "first", SMALL[1], headline=True),
            error(
                "under a large ridge it beats self-distillation without ground truth", "pure", LARGE[1], headline=True
            ),
            error("under a large ridge it is no worse than the first fit", "first", LARGE[1], -NO_WORSE, headline=True),
            *(error(f"ridge {r:g}: it beats the first fit", "first", r) for r in (SMALL[0], SMALL[2])),
            *(error(f"ridge {r:g}: it beats self-distillation without ground truth", "pure", r) for r in LARGE[::2]),
            *(error(f"ridge {r:g}: it is no worse than the first fit", "first", r, -NO_WORSE) for r in LARGE[::2]),
            error("under a small ridge it is as good as the best constant weight", "constant", SMALL[1], -NO_WORSE),
            error("under a small ridge it is as good as a tuned ridge", "tuned-ridge", SMALL[1], -NO_WORSE),
            Check(
                "networks: the estimate loses at most 2 % of the grid's validation error",
                "net",
                "net-grid",
                "log_val_mse",
                -math.log(1.02),
                False,
                False,
            ),
            Check("networks: it is more accurate than the first round", "net", "net-first", "accuracy", headline=False),
            Check("networks: it is more accurate than without labels", "net", "net-pure", "accuracy", headline=False),
        ],
        data={
            "name": "diabetes",
            "source": "scikit-learn's diabetes data (Efron et al., 2004), 442 samples, 10 features; a seed is a split",
            "train": TRAIN,
            "val": VAL,
            "test": TEST,
            "networks_on": "digits, 300 training images, labels of 60 wrong",
            "digits_fingerprint": _network_task().fingerprint,
        },
        seeds=20,
        select="accuracy",
        note=note,
        settings={
            "gamma": GAMMA,
            "steps": STEPS,
            "small": list(SMALL),
            "large": list(LARGE),
            "network": NETWORK,
            **NET,
        },
    )


def note(result: Mapping[str, Any]) -> str:
    """What the errors were, and what a tuned ridge says about them."""

    def mean(arm: str, metric: str) -> float:
        values = result["arms"][arm]["metrics"][metric]
        return float(sum(values) / len(values))

    small, large = (f"mse_ridge_{r:g}" for r in (SMALL[1], LARGE[1]))
    return (
        f"Mean test MSE (target variance 1), ridge {SMALL[1]:g}: first fit {mean('first', small):.3f}, optimal weights "
        f"{mean('optimal', small):.3f} (mean weight {mean('optimal', f'weight_ridge_{SMALL[1]:g}'):.2f}), without ground truth "
        f"{mean('pure', small):.3f}; ridge {LARGE[1]:g}: {mean('first', large):.3f}, {mean('optimal', large):.3f}, "
        f"{mean('pure', large):.3f}. Self-distillation acts as a stronger regularisation: plain ridge regression with a ridge chosen on the same "
        f"validation data reaches {mean('tuned-ridge', small):.3f}. Networks, reported only: accuracy {mean('net', 'accuracy'):.1%} with "
        f"{mean('net', 'trainings'):.0f} trainings, {mean('net-grid', 'accuracy'):.1%} with {mean('net-grid', 'trainings'):.0f} of a grid, "
        f"{mean('net-first', 'accuracy'):.1%} after the first round, {mean('net-pure', 'accuracy'):.1%} without labels. CIFAR-10 and ResNets were not run."
    )

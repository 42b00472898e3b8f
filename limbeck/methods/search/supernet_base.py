"""What methods that train a super-network share: sub-networks that are cut out, calibrated, searched, judged and kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck import networks
from limbeck.blocks.bn_calibration import recalibrate
from limbeck.blocks.evolution import Evolution
from limbeck.blocks.search_spaces import Budget, Code, SearchSpace
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.files import write_json
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage, Stepper
from limbeck.methods.search.base import SearchMethod
from limbeck.networks.artifacts import save_model
from limbeck.networks.supernets import SuperNetwork
from limbeck.report.fronts import front_png
from limbeck.tasks.base import Task, load_task
from limbeck.tasks.holdout import Part
from limbeck.tasks.judging import judge_classifiers
from limbeck.tasks.teachers import predictions

TIES = 1e-3
"""Weight of the likelihood beside the accuracy in the search's score: it only tells equals apart."""


class SupernetMethod(SearchMethod):
    """Base of the methods that train a super-network, and of the search over its sub-networks afterwards.

    The search (evolution, in as many budgets as asked for, spaced evenly on the log scale from the smallest sub-network to the full one or to the bound
    that is given) judges a sub-network by its accuracy on validation data, after its batch-norm statistics were estimated on training batches.

    Args:
        supernet: trained in place.
        config: hyper-parameters; or give single ones as keyword arguments.
        most: bounds on ``parameters`` and ``flops`` of the student that is chosen.

    Raises:
        InputError: no super-network, or no sub-network within the bounds.
    """

    class Config(SearchMethod.Config):
        """Training, and the search over sub-networks."""

        calibration: int = Field(
            4, ge=1, description="training batches on which a sub-network's batch-norm statistics are estimated"
        )
        budgets: int = Field(4, ge=1, description="budgets, spaced evenly in log FLOPs, in which the search looks")
        search: int = Field(40, ge=0, description="sub-networks that the search judges in each budget; 0: no search")
        judged_on: int = Field(
            1000, ge=1, description="validation samples that judge a sub-network in the search, at most"
        )
        population: int = Field(16, ge=1, description="sub-networks alive in the evolutionary search")

    class Setup(SearchMethod.Setup):
        """What a run by name builds."""

        student: str | None = Field(
            None,
            description="super-network: elasticmlp…, elasticcnn…, elasticmbconv… or elasticvit…; none: elasticmlp up to 8x8 inputs and for tables, else elasticcnn",
        )

    supernet: SuperNetwork

    def __init__(
        self, supernet: Any, config: Any = None, *, most: Mapping[str, float] | None = None, **overrides: Any
    ) -> None:
        super().__init__(config, **overrides)
        if not isinstance(supernet, SuperNetwork):
            raise InputError(
                f"{self.name} needs a super-network, not {type(supernet).__name__}: wrap yours as SuperNetwork(network, knobs, sample)"
            )
        self.supernet = supernet
        self.most = dict(most or {})
        self.calibration_inputs: list[Any] = []
        self.searches: dict[str, Evolution] = {}
        self._within(supernet.smallest)

    # ---- sub-networks ------------------------------------------------------------------------------------------------

    def calibrate_on(self, data: Data, seed: int = 0) -> None:
        """From now on sub-networks are calibrated on some batches of this training data, always the same."""
        generator = torch.Generator().manual_seed(mix_seed(seed, 31))
        order = torch.randperm(len(data), generator=generator)[: self.config.calibration * self.config.batch_size]
        with preserved_random_state():
            self.calibration_inputs = [data.fetch(part, 0).inputs for part in order.split(self.config.batch_size)]

    def subnetwork(self, code: Code) -> nn.Module:
        """A sub-network as a plain module in evaluation mode, with calibrated statistics (see :meth:`calibrate_on`)."""
        plain = self.supernet.extract(code)
        device = next(plain.parameters()).device
        return recalibrate(plain, (Batch(x).to(device).inputs for x in self.calibration_inputs)).eval()

    def quality(self, code: Code, data: Data) -> dict[str, float]:
        """``accuracy`` and ``nll`` of a sub-network."""
        logits, labels = predictions(self.subnetwork(code), data)
        accuracy = float((logits.argmax(1) == labels).double().mean())
        return {"accuracy": accuracy, "nll": float(F.cross_entropy(logits, labels))}

    def quick_metrics(self, data: Data) -> dict[str, float]:
        """Accuracy of the full and of the smallest network."""
        ends = {"full": self.supernet.largest, "smallest": self.supernet.smallest}
        return {f"accuracy_{name}": self.quality(code, data)["accuracy"] for name, code in ends.items()}

    # ---- search ------------------------------------------------------------------------------------------------------

    def levels(self) -> list[Budget]:
        """The budgets of the search, smallest first; the last is the one that was asked for."""
        costs = self.supernet.costs
        low, high = costs(self.supernet.smallest)["flops"], costs(self.supernet.largest)["flops"]
        high = min(high, self.most.get("flops", high))
        count = self.config.budgets
        bounds = [low ** (1 - (k + 1) / count) * high ** ((k + 1) / count) for k in range(count)]
        bounds[-1] = high
        return [Budget(costs, {**self.most, "flops": max(bound, low)}) for bound in bounds]

    def search_stage(self, val: Data, seed: int) -> Stage:
        """One step judges one sub-network; budget after budget. Each begins with the largest uniform sub-networks within it."""
        config = self.config
        generator = torch.Generator().manual_seed(mix_seed(seed, 43))
        judges = Part(val, torch.randperm(len(val), generator=generator)[: config.judged_on].sort().values)
        population = min(config.population, config.search)
        sample = max(1, population // 3)
        space = _AllSizes(self.supernet.space.name, self.supernet.space.choices, self.supernet.space.make)
        self.searches = {
            f"budget {k + 1}": Evolution(
                space,
                budget,
                population=population,
                sample=sample,
                parents=max(1, sample // 2),
                crossover=0.3,
                seed=mix_seed(seed, 37, k),
            )
            for k, budget in enumerate(self.levels())
        }

        def judge(_: Batch | None, stepper: Stepper) -> dict[str, Tensor]:
            level, position = divmod(stepper.step, config.search)
            search = list(self.searches.values())[level]
            first = self._uniform_within(search.budget)[: config.search // 2]
            code = self.supernet.canonical(first[position] if position < len(first) else search.ask())
            known = {c: score for each in self.searches.values() for c, score in each.history}
            if code not in known:
                found = self.quality(code, judges)
                known[code] = found["accuracy"] - TIES * found["nll"]
            search.tell(code, known[code])
            return {"score": torch.tensor(known[code]), "flops": torch.tensor(self.supernet.costs(code)["flops"])}

        return Stage("search", config.search * config.budgets, update=judge, state=self.searches)

    def front(self) -> dict[str, Code]:
        """The best sub-network of each budget, by the budget's share of the full network's FLOPs; none before the search."""
        costs, found = self.supernet.costs, {}
        full = costs(self.supernet.largest)["flops"]
        histories = [h for search in self.searches.values() for h in search.history]
        for search in self.searches.values():
            inside = [(code, score) for code, score in histories if search.budget.allows(code)]
            if inside:
                found[f"best within {search.budget.most['flops'] / full:.0%}"] = max(inside, key=lambda h: h[1])[0]
        return found

    @property
    def chosen(self) -> Code:
        """The student: the search's best within the bounds; without a search the largest uniform sub-network within them."""
        front = self.front()
        if front:
            return list(front.values())[-1]
        return self._uniform_within(Budget(self.supernet.costs, self.most))[0]

    def _uniform_within(self, budget: Budget) -> list[Code]:
        """The uniform sub-networks within a budget, largest first."""
        return sorted(
            filter(budget.allows, self.supernet.uniform()), key=lambda code: -self.supernet.costs(code)["flops"]
        )

    def _within(self, code: Code) -> None:
        costs = self.supernet.costs(code)
        for name, bound in self.most.items():
            if costs[name] > bound:
                raise InputError(
                    f"no sub-network is within the budget {name} <= {bound:g}: the smallest takes {costs[name]:g}; allow more"
                )

    # ---- building ----------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Task]:
        """The method on a super-network for its task, and the task."""
        task = load_task(setup)
        return cls.on_task(task, setup, config, seed=seed, progress=progress), task

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        """The method for a task that is already loaded. The super-network is initialised from ``seed``."""
        return cls(make_supernet(setup.student, task, seed), config, most=cls.bounds(setup))

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        """The method on a user's own super-network."""
        if student is None:
            raise InputError(f"{cls.name} needs student=… (a SuperNetwork)")
        if teacher is not None:
            raise InputError(f"{cls.name} takes no teacher: the super-network's full size teaches the others")
        return cls(student, config)

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        """Nothing to prepare."""

    def check(self, batch: Batch) -> None:
        """Dry run on one batch: shapes and labels; state is left as it was.

        Raises:
            InputError: no logits (B, C), or labels that do not fit them.
        """
        with self.untouched():
            for code in (self.supernet.smallest, self.supernet.largest):
                self.supernet.set_active(code)
                logits = logits_of(call_model(self.supernet, batch.inputs))
                if logits.ndim != 2 or len(logits) != len(batch):
                    raise InputError(
                        f"the super-network gives logits of shape {tuple(logits.shape)}; expected ({len(batch)}, classes)"
                    )
            labels = self.labels(batch)
            if labels.ndim == 1 and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]):
                raise InputError(
                    f"labels go from {int(labels.min())} to {int(labels.max())}, but the super-network has classes 0 to {logits.shape[1] - 1}"
                )

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """No gradients; buffers and random state are put back afterwards."""
        buffers = {name: b.clone() for name, b in self.named_buffers()}
        with preserved_random_state(), torch.no_grad():
            yield
            for name, b in self.named_buffers():
                b.copy_(buffers[name])

    @staticmethod
    def labels(batch: Batch) -> Tensor:
        """(B,) or (B, C) labels.

        Raises:
            InputError: the batch has none.
        """
        if batch.labels is None:
            raise InputError("training a super-network needs labels, and the batch has none: give (inputs, labels)")
        return batch.labels

    # ---- judging and keeping the result ------------------------------------------------------------------------------

    def kept(self) -> dict[str, Code]:
        """The sub-networks that are judged and kept, the student first."""
        front = list(self.front().items())[:-1]
        return {
            "student": self.chosen,
            **dict(front),
            "smallest": self.supernet.smallest,
            "full": self.supernet.largest,
        }

    def families(self) -> dict[str, SupernetMethod]:
        """Trained super-networks to be shown side by side, this one first."""
        return {self.name: self}

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Quality and cost of the kept sub-networks, means over the uniform ones, and the picture of accuracy against FLOPs."""
        result = judge_classifiers({who: self.subnetwork(code) for who, code in self.kept().items()}, test, class_names)
        series: dict[str, list[tuple[float, float]]] = {}
        for name, each in self.families().items():
            codes = list(each.supernet.uniform())
            found = [each.quality(code, test)["accuracy"] for code in codes]
            flops = [each.supernet.costs(code)["flops"] for code in codes]
            series[name] = [(f, 100 * a) for f, a in zip(flops, found, strict=True)]
            suffix = "" if each is self else f"_{name}"
            result[f"uniform_accuracy{suffix}"] = sum(found) / len(found)
        front = "found by the search"
        rows = {row["who"]: row for row in result["rows"]}
        best = [who for who in rows if who not in ("smallest", "full")] if self.searches else []
        series[front] = [(rows[who]["flops"], 100 * rows[who]["accuracy"]) for who in best]
        picture = {
            "title": "Accuracy against cost",
            "caption": f"Uniform sub-networks ({len(series[self.name])} each) after calibration, all cut from one training each; test data. "
            "The stars were chosen on validation data.",
            "png": front_png(series, "FLOPs per sample", "test accuracy, %", starred=[front]),
        }
        return {**result, "pictures": [picture, *result.get("pictures", [])]}

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The student as a plain model; the other kept sub-networks in ``subnets/``, and all shared weights in ``supernet/``."""
        table = []
        self.supernet.set_active(self.supernet.largest)
        save_model(self.supernet, folder / "supernet", {**description, "measures": None})
        for who, code in self.kept().items():
            about = {"options": self.supernet.space.options(code), **self.supernet.costs(code)}
            target = folder if who == "student" else folder / "subnets" / who.replace(" ", "-").replace("%", "")
            own = description if who == "student" else {**description, "measures": None}
            save_model(self.subnetwork(code), target, {**own, "subnetwork": about})
            table.append({"who": who, "code": list(code), **about})
        write_json(folder / "subnetworks.json", {"subnetworks": table})


class _AllSizes(SearchSpace):
    """Draws small members as often as large ones: each draw has a largest share of the options that it may take.

    Uniform members of a space of many choices are nearly all of middling size, and none would be within a small budget.
    """

    def sample(self, generator: torch.Generator) -> Code:
        share = float(torch.rand((), generator=generator))
        counts = (1 + int(share * len(options)) for options in self.choices.values())
        return tuple(int(torch.randint(count, (), generator=generator)) for count in counts)


def check_finite(losses: Losses) -> None:
    """That no term of a first loss is NaN or infinite.

    Raises:
        InputError: one is.
    """
    for name, value in losses.items():
        if not bool(torch.isfinite(value)):
            raise InputError(f"loss term '{name}' is {value.item()} on the first batch: check inputs and settings")


def make_supernet(name: str | None, task: Task, seed: int) -> SuperNetwork:
    """A super-network for a task, initialised from ``seed`` without touching the caller's random state.

    Raises:
        InputError: the name is that of a plain network.
    """
    small = len(task.in_shape) != 3 or max(task.in_shape[1:]) <= 8
    wanted = name or ("elasticmlp-d128-m512-l3" if small else "elasticcnn-w8-s3-d2")
    with preserved_random_state():
        seed_everything(mix_seed(seed, 1))
        made = networks.build(wanted, in_shape=task.in_shape, num_classes=task.num_classes)
    if not isinstance(made, SuperNetwork):
        known = ", ".join(n for n in networks.names() if n.startswith("elastic"))
        raise InputError(f"'{wanted}' cannot be cut: it is one network, not a super-network such as {known}")
    return made

"""LightHGNN and LightHGNN+: a hypergraph network's answers, and those of its reliable hyperedges, taught to a perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Losses
from limbeck.core.data import Data, mix_seed
from limbeck.core.hypergraphs import Hypergraph
from limbeck.losses.logits import forward_kl
from limbeck.methods.graphs.base import NodeDistiller
from limbeck.metrics.hypergraphs import purity, topology_score
from limbeck.networks.node_networks import hypergraph_of
from limbeck.tasks.judging_nodes import on_device

SMALLEST = 1e-12
"""Below this a probability counts as this, before its logarithm."""


@dataclass(frozen=True)
class HyperedgeKnowledge:
    """What the teacher says of hyperedges; made once.

    Attributes:
        targets: (M, K) the mean of the members' probabilities.
        reliability: (M,) in [0, 1].
    """

    targets: Tensor
    reliability: Tensor


class LightHGNN(NodeDistiller):
    r"""A hypergraph network into a perceptron on a vertex' own features.

    With the logits :math:`z^t` of the trained teacher, :math:`p = \mathrm{softmax}(z)` and means over the members of a hyperedge
    :math:`\bar p_e = \frac{1}{|e|}\sum_{v \in e} p_v`,

    .. math:: L = \lambda L_{ce} + (1 - \lambda)(L_{soft} + L_{hc}), \quad
              L_{soft} = \frac1N \sum_v KL(p^t_v \| p^s_v), \quad
              L_{hc} = \frac{1}{|E'|} \sum_{e \in E'} KL(\bar p^t_e \| \bar p^s_e).

    :math:`L_{ce}` is over labelled vertices, :math:`L_{soft}` over all that are there in training. :math:`L_{hc}` belongs to LightHGNN+
    (``plus``); :math:`E'` holds hyperedge e with probability :math:`\rho_e`, drawn anew in each update, 0 where it is empty. A hyperedge is reliable if its
    mean entropy is the same for noised features:

    .. math:: \bar h_e = \frac{1}{|e|} \sum_{v \in e} H(p^t_v), \quad \tilde X = X \odot (1 + s\,\epsilon), \; \epsilon \sim N(0, I), \quad
              \rho_e = 1 - \frac{|\tilde h_e - \bar h_e|}{\max_{e'} |\tilde h_{e'} - \bar h_{e'}|},

    and all are where no entropy changes. :math:`\rho` is computed once, with the teacher in evaluation mode; gradients reach the student only.

    With ``node_batch`` an update takes so many vertices for :math:`L_{soft}`, and the same share of all hyperedges, of which the reliable ones
    stay, for :math:`L_{hc}`.

    A plain graph becomes a hypergraph of its edges and of every node with its neighbours; isolated vertices have a hyperedge of their own.

    Args:
        task, teacher, student, config, train_teacher, seed: see :class:`~limbeck.methods.graphs.base.NodeDistiller`; the teacher is a ``hgnn`` unless
            said otherwise.

    Differences: the divergences are those of the paper's equations; its published code gives probabilities where its KL wants logarithms. There the noise level
    multiplies the whole of :math:`X(1 + \epsilon)`, which is the same at the published level 1; here it is that of the noise (our
    decision). The temperature softens the vertices' probabilities before their mean (our decision); published is 1.

    Source: "LightHGNN: Distilling Hypergraph Neural Networks into MLPs for 100x Faster Inference" (2024).
    """

    name = "lighthgnn"
    default_teacher = "hgnn"

    class Config(NodeDistiller.Config):
        plus: bool = Field(True, description="LightHGNN+: learn from reliable hyperedges too")
        label_weight: float = Field(
            0.0, ge=0, le=1, description="weight lambda of the labels; the teacher has the rest"
        )
        temperature: float = Field(1.0, gt=0, description="softens probabilities before their mean over a hyperedge")
        noise: float = Field(1.0, ge=0, description="level s of the noise that reliability is found with")
        sampling: bool = Field(
            True, description="draw hyperedges by their reliability; no: learn from all of them in every update"
        )

        presets = {
            "paper": {
                "epochs": 200,
                "teacher_epochs": 200,
                "lr": 0.01,
                "weight_decay": 5e-4,
                "teacher_lr": 0.01,
                "teacher_weight_decay": 5e-4,
                "label_weight": 0.0,
                "temperature": 1.0,
                "noise": 1.0,
            }
        }

    class Setup(NodeDistiller.Setup):
        task: str = Field(
            "hypergraph-sbm",
            description="hypergraph-sbm, sbm (both generated), cocitation-cora, cocitation-citeseer, coauthorship-cora, cora, citeseer (files), or any name that --data explains",
        )

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._knowledge: HyperedgeKnowledge | None = None
        self._knower: Tensor | None = None

    # ---- the hyperedges ---------------------------------------------------------------------------------------------------

    @property
    def hypergraph(self) -> Hypergraph:
        """Over the watched vertices, none of them isolated."""
        return hypergraph_of(self.structure)

    def reliability(self, epsilon: Tensor | None = None) -> Tensor:
        r""":math:`\rho` (M,).

        Args:
            epsilon: (n, F) the noise; None: drawn from the method's seed.
        """
        if epsilon is None:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, 67))
            epsilon = torch.randn(self.features.shape, generator=generator)
        noised = self.features * (1 + self.config.noise * epsilon.to(self.features))
        calm = self._mean_entropy(self.ask_teacher())
        shaken = self._mean_entropy(self._quietly(self.teacher, lambda: self.teacher_logits(noised)))
        change = (shaken - calm).abs()
        largest = change.max()
        return torch.ones_like(change) if not float(largest) else 1 - change / largest

    def _mean_entropy(self, logits: Tensor) -> Tensor:
        return self.hypergraph.vertex_to_edge(entropies(logits)[:, None])[:, 0]

    def knowledge(self) -> HyperedgeKnowledge:
        """What the teacher says of hyperedges, which is asked once."""
        said = self.ask_teacher()
        if self._knowledge is None or self._knower is not self.said:
            means = self.hypergraph.vertex_to_edge(torch.softmax(said / self.config.temperature, 1))
            self._knowledge, self._knower = HyperedgeKnowledge(means, self.reliability()), self.said
        return self._knowledge

    def draw_hyperedges(self, reliability: Tensor) -> Tensor:
        """The numbers of the hyperedges of one update, from torch's random state."""
        count, size = len(reliability), self.config.node_batch
        candidates = torch.arange(count)
        if size is not None and size < self.watched.num_nodes:
            candidates = torch.randperm(count)[: -(-count * size // self.watched.num_nodes)]
        if self.config.sampling:
            candidates = candidates[torch.rand(len(candidates)) < reliability.cpu()[candidates]]
        return candidates.to(reliability.device)

    # ---- the loss ---------------------------------------------------------------------------------------------------------

    def student_losses(self) -> Losses:
        share = self.config.label_weight
        known = self.knowledge() if self.config.plus else None
        nodes = self.draw_nodes()
        edges = nodes[:0] if known is None else self.draw_hyperedges(known.reliability)
        asked, place, owner = self._asked(nodes, edges)
        logits = self.student_logits(None if self._everyone(nodes) else asked)
        found = Losses(
            labels=(share, self.labelled_loss(logits[: len(nodes)], nodes)),
            soft=(1 - share, forward_kl(logits[: len(nodes)], self.ask_teacher()[nodes])),
        )
        if known is None:
            return found
        found.add("hyperedges", self._hyperedge_loss(logits, place, owner, known.targets[edges]), 1 - share)
        return found.observe(hyperedges_drawn=len(edges) / max(1, len(known.reliability)))

    def _everyone(self, nodes: Tensor) -> bool:
        """Whether ``nodes`` are all watched vertices, which are then in their order."""
        return len(nodes) == self.watched.num_nodes

    def _asked(self, nodes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The vertices that the student is asked about (``nodes`` first, then further members), where each member of the hyperedges
        stands among them, and which of the hyperedges it belongs to."""
        graph = self.hypergraph
        sizes = graph.sizes[edges]
        owner = torch.repeat_interleave(torch.arange(len(edges), device=edges.device), sizes)
        within = torch.arange(len(owner), device=edges.device) - (sizes.cumsum(0) - sizes)[owner]
        members = graph.members[graph.pointer[edges][owner] + within]
        place = torch.full((graph.num_nodes,), -1, dtype=torch.long, device=edges.device)
        place[nodes] = torch.arange(len(nodes), device=edges.device)
        more = torch.unique(members[place[members] < 0])
        place[more] = len(nodes) + torch.arange(len(more), device=edges.device)
        return torch.cat([nodes, more]), place[members], owner

    def _hyperedge_loss(self, logits: Tensor, place: Tensor, owner: Tensor, targets: Tensor) -> Tensor:
        """The mean over hyperedges of KL(teacher's mean, student's mean); 0 where there is none."""
        if not len(targets):
            return logits.sum() * 0
        said = torch.softmax(logits / self.config.temperature, 1)[place]
        sums = torch.zeros_like(targets).index_add(0, owner, said)
        means = sums / torch.bincount(owner, minlength=len(targets))[:, None]
        terms = targets * (targets.clamp_min(SMALLEST).log() - means.clamp_min(SMALLEST).log())
        return terms.sum(1).mean()

    # ---- judging ----------------------------------------------------------------------------------------------------------

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """See the base; and how smooth hidden layers are over the hypergraph, and which hyperedges are reliable."""
        found = super().evaluate(test, class_names)
        hidden = self.hidden_layers()
        for row in found["rows"]:
            if row["who"] in hidden:
                row["topology_score"] = topology_score(hidden[row["who"]], self.hypergraph)
        return {**found, "pictures": self._pictures(hidden)}

    @torch.no_grad()
    def hidden_layers(self) -> dict[str, Tensor]:
        """(n, D) the last hidden layer of student and teacher on the watched vertices, of those that have an ``embed``."""
        x, structure = on_device(self.watched, self.device)
        found = {}
        for who, network, inputs in (("student", self.student, (x,)), ("teacher", self.teacher, (x, structure))):
            embed: Any = getattr(network, "embed", None)
            if embed is not None:
                found[who] = self._quietly(network, lambda embed=embed, inputs=inputs: embed(*inputs))  # type: ignore[misc]
        return found

    def _pictures(self, hidden: dict[str, Tensor]) -> list[dict[str, str]]:
        from limbeck.report.histograms import histogram_png
        from limbeck.report.scatters import scatter_png

        labels = self.watched.labels
        rho = self.knowledge().reliability.cpu()
        graph = self.hypergraph.to("cpu")
        pure = purity(graph, labels, self.task.num_classes) == 1
        several = graph.sizes > 1
        groups = {
            "members of one class": rho[pure & several].tolist(),
            "members of several classes": rho[~pure & several].tolist(),
        }
        pictures = [
            {
                "title": "Reliability of hyperedges",
                "caption": "1: the teacher's entropy on the members does not change when their features are noised. By true classes, which the method does not see; hyperedges of two members or more.",
                "png": histogram_png(groups, "reliability"),
            }
        ]
        if hidden:
            shown = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            panels = {who: z[shown].double().cpu().numpy() for who, z in hidden.items()}
            pictures.append(
                {
                    "title": "Hidden layers",
                    "caption": "The vertices by their true classes, in the principal plane of each model's last hidden layer.",
                    "png": scatter_png(panels, labels[shown].numpy(), list(self.task.class_names)),
                }
            )
        return pictures


def entropies(logits: Tensor) -> Tensor:
    """(n,) the entropy of each row's probabilities, in nats; 0 log 0 is 0."""
    p = torch.softmax(logits, 1)
    return -torch.special.xlogy(p, p).sum(1)

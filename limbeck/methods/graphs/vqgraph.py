"""VQGraph: a graph network that speaks through a codebook, and a perceptron that learns its answers and which codes it would use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.code_assignments import assignment_entropy, assignment_loss
from limbeck.blocks.edge_reconstruction import EdgeReconstruction
from limbeck.blocks.neighbour_sampling import NeighbourSampler
from limbeck.blocks.taps import Taps
from limbeck.blocks.vector_quantizer import VectorQuantizer, usage_of
from limbeck.core.batch import Losses, logits_of
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage, Stepper
from limbeck.losses.logits import forward_kl
from limbeck.methods.graphs.base import NodeDistiller
from limbeck.metrics.cuts import cut_consistency
from limbeck.networks.node_tokenizer import NodeTokenizer, Tokens
from limbeck.tasks.node_classification import NodeTask


class VQGraph(NodeDistiller):
    r"""A graph network with a codebook between its layers, distilled into a perceptron by soft labels and soft code assignments.

    *Tokenizer.* The teacher is a :class:`~limbeck.networks.node_tokenizer.NodeTokenizer`: first layer h, its codes
    :math:`q = e_{k}`, two linear decoders :math:`q^{edge} = W_1 q`, :math:`q^{node} = W_2 q`, and a second layer on
    :math:`q^{edge}`. It learns

    .. math:: L_T = CE + \lambda_n\,\mathrm{MSE}(h, q^{node}) + \lambda_e \sqrt{\mathrm{MSE}(A, \hat A)}
        + \beta\,\mathrm{mean}((\mathrm{sg}(q) - h)^2),

    with CE on the training nodes, :math:`\hat A` the inner products of :math:`q^{edge}` scaled to [0, 1], and A the adjacency with ones on its diagonal.
    The codes follow h by a running mean; no gradient reaches them. See :class:`~limbeck.blocks.vector_quantizer.VectorQuantizer` and
    :class:`~limbeck.blocks.edge_reconstruction.EdgeReconstruction`. With ``fanouts`` each update is on the surroundings of ``seed_batch`` training nodes,
    merged into one undirected graph, CE on these nodes alone.

    *Student.* With the student's first hidden layer a linear head makes :math:`g_i` (D,). With the similarities
    :math:`S^t_{im} = \mathrm{sim}(h_i, e_m)`, :math:`S^s_{im} = \mathrm{sim}(g_i, e_m)` to the frozen codes,

    .. math:: L = \lambda L_{ce} + (1 - \lambda)\,\mathrm{mean}_i\,KL(p^t_i \| p^s_i)
        + \alpha\,\tau^2\,\mathrm{mean}_i\,KL\big(\mathrm{softmax}(S^t_i/\tau)\,\|\,\mathrm{softmax}(S^s_i/\tau)\big)

    over all nodes that are there in training (:math:`L_{ce}` over the labelled ones). ``alternate`` is the published schedule: in each pass first the
    third term, then the first, then the second, each with mini-batches and steps of its own by one optimiser. Similarities are never held for all nodes and codes at
    once: the teacher's are computed from h where they are needed.

    Without the engine::

        method = VQGraph(task)
        teach = torch.optim.Adam(method.teacher.parameters(), lr=0.01)
        method.teacher_losses().total.backward()      # the codes follow; and a step of teach
        learn = torch.optim.Adam([*method.student.parameters(), *method.to_codes.parameters()], lr=0.01)
        method.student_losses().total.backward()      # and a step of learn

    Args:
        task, student, config, train_teacher, seed: see :class:`~limbeck.methods.graphs.base.NodeDistiller`.
        teacher: a :class:`~limbeck.networks.node_tokenizer.NodeTokenizer`, trained (it may have layers of one's own), or the kind of its layers.
        overrides: single hyper-parameters; those of the codebook belong to a teacher that is made here.

    Attributes:
        to_codes: the linear head of the student; it is not needed for answers.

    Raises:
        InputError: a teacher without a codebook, a student whose ``code_tap`` gives no rows of numbers, fan-outs with a teacher over hypergraphs.

    Differences: the published code gives probabilities where its KL wants logarithms, and compares the student by negative distances where the teacher is
    compared by cosines: here both are the same similarity and the divergence is the equation's. Its temperature 4 and weight 1e-8 belong to that and
    make assignments uniform: here they are 0.1 and 10, in the preset too, which also keeps the teacher's learning rate 0.01 in the place of its script's
    1e-4, with which small graphs are not learnt in 100 updates. Its weight decays are for counts of words as they are; where rows are divided by their
    sums, as in the tasks of this library, a tenth of them is better. D is free; there it is the number of input features. All updates are made and the best
    on validation nodes kept; there training stops 50 epochs after it, which is the same result in most runs.

    Source: "VQGraph: Rethinking Graph Representation Space for Bridging GNNs and MLPs" (2024).
    """

    name = "vqgraph"
    default_student = "nodemlp-128-p50-none"

    class Config(NodeDistiller.Config):
        epochs: int = Field(300, ge=1, description="passes of the student over the nodes")
        teacher_epochs: int = Field(
            150, ge=1, description="updates of the teacher, over the whole graph unless there are fan-outs"
        )
        teacher_weight_decay: float = Field(1e-4, ge=0, description="weight decay of the teacher")
        codes: int = Field(128, ge=1, description="codes M")
        code_dim: int = Field(64, ge=1, description="numbers D of a code, the width of the teacher's first layer")
        similarity: Literal["cosine", "euclidean"] = Field(
            "cosine", description="of features and codes; euclidean wants code_start kmeans"
        )
        code_decay: float = Field(0.8, ge=0, lt=1, description="what codes keep of themselves in an update")
        code_start: Literal["kaiming", "kmeans"] = Field(
            "kaiming", description="first codes: random, or k-means of the first features"
        )
        code_refresh: float = Field(
            0.0, ge=0, description="codes with a running count below this are put on random nodes; 0: never"
        )
        commitment: float = Field(0.25, ge=0, description="weight of the commitment of features to their codes")
        node_weight: float = Field(1e-3, ge=0, description="weight of the features' reconstruction")
        edge_weight: float = Field(0.03, ge=0, description="weight of the edges' reconstruction")
        edge_block: int | None = Field(
            None, ge=2, description="larger graphs reconstruct the edges among so many random nodes; none: all edges"
        )
        fanouts: tuple[int, ...] = Field(
            (), description="neighbours drawn in each hop around a batch of training nodes; none: the whole graph"
        )
        seed_batch: int = Field(512, ge=1, description="training nodes per update, with fan-outs")
        label_weight: float = Field(
            0.0, ge=0, le=1, description="weight lambda of the labels; soft labels have the rest"
        )
        code_weight: float = Field(10.0, ge=0, description="weight alpha of the code assignments")
        temperature: float = Field(0.1, gt=0, description="tau of the code assignments")
        code_tap: str = Field("layers.0", description="layer of the student that its code features are made from")
        alternate: bool = Field(False, description="a step for each of the student's three terms in turn")

        presets = {
            "paper": {
                "codes": 5000,
                "teacher_epochs": 100,
                "epochs": 500,
                "node_batch": 512,
                "alternate": True,
                "weight_decay": 0.005,
                "teacher_weight_decay": 1e-3,
            }
        }

    class Setup(NodeDistiller.Setup):
        teacher_hidden: int = Field(64, ge=1, description="width of the teacher's second layer")
        teacher_depth: int = Field(2, ge=2, le=2, description="layers of the teacher, the codebook between them")

    def __init__(
        self,
        task: NodeTask,
        teacher: NodeTokenizer | str | None = None,
        student: nn.Module | None = None,
        config: Any = None,
        *,
        train_teacher: bool | None = None,
        seed: int = 0,
        **overrides: Any,
    ) -> None:
        if config is None:
            config, overrides = type(self).Config.make(**overrides), {}
        if (teacher is None or isinstance(teacher, str)) and isinstance(task, NodeTask):
            train_teacher = True if train_teacher is None else train_teacher
            teacher = self.fresh_tokenizer(task, teacher or self.default_teacher, seed, config)
        super().__init__(task, teacher, student, config, train_teacher=train_teacher, seed=seed, **overrides)
        if not isinstance(self.teacher, NodeTokenizer):
            raise InputError(
                f"{self.name} needs a teacher with a codebook, a NodeTokenizer, not {type(teacher).__name__}: it takes first=, second= for "
                "layers of your own"
            )
        if self.config.fanouts and self.teacher.over != "graph":
            raise InputError("fan-outs draw neighbours in a graph: leave them out for a teacher over hypergraphs")
        self.to_codes = self._head(seed)
        self._told: tuple[Tensor, Tensor] | None = None
        self._reconstruction: EdgeReconstruction | None = None
        self._sampler: NeighbourSampler | None = None

    def _head(self, seed: int) -> nn.Linear:
        with preserved_random_state():
            tapped = self._quietly(self.student, lambda: self._student(torch.arange(1, device=self.device))[1])
            seed_everything(mix_seed(seed, 71))
            return nn.Linear(tapped.shape[1], self.tokenizer.dim).to(self.device)

    # ---- parts -----------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> NodeTokenizer:
        """The teacher."""
        assert isinstance(self.teacher, NodeTokenizer)
        return self.teacher

    @property
    def quantizer(self) -> VectorQuantizer:
        """The teacher's codebook."""
        return self.tokenizer.quantizer

    @classmethod
    def fresh_tokenizer(cls, task: NodeTask, kind: str, seed: int, config: Any, **options: Any) -> NodeTokenizer:
        """An untrained teacher with layers of a kind, initialised from the seed."""
        with preserved_random_state():
            seed_everything(mix_seed(seed, 59))
            quantizer = VectorQuantizer(
                config.code_dim,
                config.codes,
                similarity=config.similarity,
                decay=config.code_decay,
                commitment=config.commitment,
                start=config.code_start,
                refresh=config.code_refresh,
            )
            return NodeTokenizer(task.features.shape[1], task.num_classes, quantizer, kind=kind, **options)

    @classmethod
    def on_task(cls, task: NodeTask, config: Any, *, seed: int = 0, setup: Any = None) -> Self:
        setup = cls.Setup() if setup is None else setup
        kind = setup.teacher_kind or cls.default_teacher
        options = {"hidden": setup.teacher_hidden, "dropout": setup.teacher_dropout}
        teacher = cls.fresh_tokenizer(task, kind, seed, config, **options)
        student = cls.fresh_student(task, setup.student or cls.default_student, seed)
        return cls(task, teacher, student, config, train_teacher=True, seed=seed)

    # ---- the tokenizer ---------------------------------------------------------------------------------------------------

    def teacher_losses(self) -> Losses:
        if self.config.fanouts:
            return self._sampled_losses()
        train = self.watched.train.to(self.device)
        told = self.tokenizer.tokens(self.features_for(self.teacher), self.structure)
        return self.tokenizer_losses(told, self.edges(), train, self.labels[train])

    def edges(self) -> EdgeReconstruction:
        """What the reconstruction of the watched graph's edges is compared with."""
        if self._reconstruction is None or self._reconstruction.source.device != self.device:
            index = self.watched.graph.edge_index.to(self.device)
            self._reconstruction = EdgeReconstruction(index, self.watched.num_nodes, block=self.config.edge_block)
        return self._reconstruction

    def tokenizer_losses(self, told: Tokens, edges: EdgeReconstruction, nodes: Tensor, labels: Tensor) -> Losses:
        """The four terms.

        Args:
            told: what the tokenizer makes of a graph. edges: those of the graph.
            nodes: (m,) the labelled ones in it. labels: (m,) theirs.
        """
        codes = told.quantised.codes
        found = Losses(ce=F.cross_entropy(told.logits[nodes], labels), commitment=told.quantised.commitment)
        if self.config.node_weight:
            found.add("nodes", F.mse_loss(told.node_side, told.hidden), self.config.node_weight)
        if self.config.edge_weight:
            found.add("edges", edges(told.edge_side, codes), self.config.edge_weight)
        return found.observe(**usage_of(torch.bincount(codes, minlength=self.quantizer.num_codes)))

    def _sampled_losses(self) -> Losses:
        if self._sampler is None or self._sampler.graph.features.device != self.device:
            self._sampler = NeighbourSampler(self.watched.graph.to(self.device), self.config.fanouts)
        train = self.watched.train
        seeds = train[torch.randperm(len(train))[: self.config.seed_batch]].to(self.device)
        part, nodes = self._sampler.around(seeds)
        told = self.tokenizer.tokens(part.features, part)
        edges = EdgeReconstruction(part.edge_index, len(nodes), block=self.config.edge_block)
        return self.tokenizer_losses(told, edges, torch.arange(len(seeds), device=self.device), self.labels[seeds])

    # ---- the student -----------------------------------------------------------------------------------------------------

    def code_features(self) -> Tensor:
        """(n, D) the teacher's h of the watched nodes, in evaluation mode, without gradient; asked once."""
        said = self.ask_teacher()
        if self._told is None or self._told[0] is not self.said:
            assert self.said is not None
            h = self._quietly(
                self.teacher, lambda: self.tokenizer.embed(self.features_for(self.teacher), self.structure)
            )
            self._told = self.said, h
        return self._told[1].to(said.device)

    def _student(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (m, K), and the rows (m, H) that code features are made from; as many nodes as there are must be in their order."""
        everyone = len(nodes) == self.watched.num_nodes
        with Taps(self.student, [self.config.code_tap]) as taps:
            logits = logits_of(self.student(self.features_for(self.student) if everyone else self.features[nodes]))
        hidden: Tensor = taps[self.config.code_tap]
        if hidden.ndim != 2 or len(hidden) != len(nodes):
            raise InputError(
                f"the student's '{self.config.code_tap}' gives {tuple(hidden.shape)}, not one row for each node: choose another code_tap"
            )
        return logits, hidden

    def code_loss(self, hidden: Tensor, nodes: Tensor) -> Tensor:
        """The third term, of the student's hidden rows (m, H) for nodes (m,)."""
        told = self.code_features()[nodes]
        return assignment_loss(self.quantizer, self.to_codes(hidden), told, self.config.temperature)

    def student_losses(self) -> Losses:
        """All three terms on the nodes of one update."""
        config, nodes = self.config, self.draw_nodes()
        logits, hidden = self._student(nodes)
        found = Losses(
            labels=(config.label_weight, self.labelled_loss(logits, nodes)),
            soft=(1 - config.label_weight, forward_kl(logits, self.ask_teacher()[nodes])),
        )
        if config.code_weight:
            found.add("codes", self.code_loss(hidden, nodes), config.code_weight)
        return found

    def _batches(self, nodes: Tensor) -> Sequence[Tensor]:
        """The nodes in batches, drawn from torch's random state; all at once in their order."""
        size = self.config.node_batch or len(nodes)
        if size >= len(nodes):
            return [nodes]
        return nodes[torch.randperm(len(nodes)).to(nodes.device)].split(size)

    def _alternating(self, stepper: Stepper) -> Losses:
        """One pass of the published schedule. A term of weight 0 makes its steps, too, as there: momentum and weight decay act."""
        share = self.config.label_weight
        everyone = torch.arange(self.watched.num_nodes, device=self.device)
        train = self.watched.train.to(self.device)
        terms: Mapping[str, tuple[float, Tensor, Callable[[Tensor], Tensor]]] = {
            "codes": (self.config.code_weight, everyone, lambda i: self.code_loss(self._student(i)[1], i)),
            "labels": (share, train, lambda i: F.cross_entropy(self._student(i)[0], self.labels[i])),
            "soft": (1 - share, everyone, lambda i: forward_kl(self._student(i)[0], self.ask_teacher()[i])),
        }
        found = Losses()
        for name, (weight, among, loss) in terms.items():
            total = torch.zeros((), device=self.device)
            for nodes in self._batches(among):
                value = loss(nodes)
                stepper.minimise(weight * value)
                total += value.detach() * len(nodes) / len(among)
            found.add(name, total, weight)
        return found

    def student_stage(self) -> Stage:
        config = self.config
        size = min(config.node_batch or self.watched.num_nodes, self.watched.num_nodes)
        passes = math.ceil(self.watched.num_nodes / size)
        steps = config.epochs if config.alternate else config.epochs * passes
        updates = (
            config.epochs * (2 * passes + math.ceil(len(self.watched.train) / size)) if config.alternate else steps
        )

        def made() -> Mapping[str, Optimised]:
            learning = [*self.student.parameters(), *self.to_codes.parameters()]
            return {"student": make_optimised(learning, config, updates)}

        step = self._alternating if config.alternate else None
        return self.fitting_stage("student", self.student, steps, self.student_losses, None, made, step=step)

    # ---- judging ---------------------------------------------------------------------------------------------------------

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """See the base; and how the codes are used, how far the student's assignments agree, and whether joined nodes get the same answers."""
        found = super().evaluate(test, class_names)
        more = self.code_measures()
        for row in found["rows"]:
            row.update(more.get(row["who"], {}))
        return {**found, "pictures": self._pictures()}

    @torch.no_grad()
    def code_measures(self) -> dict[str, dict[str, float]]:
        """By model, on the watched nodes: ``codes_used``, ``code_perplexity``, ``assignment_entropy`` (nats), ``cut_consistency`` of the answers, and for
        the student ``same_code``, the share of nodes with the teacher's code."""
        edges = self.watched.graph.edge_index.to(self.device)
        answers = {"teacher": self.ask_teacher(), "student": self._quietly(self.student, self.student_logits)}
        rows = {"teacher": self.code_features(), "student": self.student_code_features()}
        codes = {who: self.quantizer.nearest(h) for who, h in rows.items()}
        found = {
            who: {
                **usage_of(torch.bincount(codes[who], minlength=self.quantizer.num_codes)),
                "assignment_entropy": assignment_entropy(self.quantizer, rows[who], self.config.temperature),
                "cut_consistency": cut_consistency(torch.softmax(answers[who], 1), edges),
            }
            for who in rows
        }
        found["student"]["same_code"] = float((codes["teacher"] == codes["student"]).double().mean())
        return found

    @torch.no_grad()
    def student_code_features(self) -> Tensor:
        """(n, D) the student's g of the watched nodes, in evaluation mode."""
        everyone = torch.arange(self.watched.num_nodes, device=self.device)
        found: Tensor = self.to_codes(self._quietly(self.student, lambda: self._student(everyone)[1]))
        return found

    def _pictures(self) -> list[dict[str, str]]:
        from limbeck.report.code_pictures import code_pictures

        h = self.code_features()
        features = {"student": self.student_code_features(), "teacher": h}
        panels = {who: z.cpu().double().numpy() for who, z in features.items()}
        codes, labels = self.quantizer.nearest(h).cpu().numpy(), self.watched.labels.numpy()
        return code_pictures(codes, labels, panels, list(self.task.class_names))

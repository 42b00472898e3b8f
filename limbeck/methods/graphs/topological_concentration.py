r"""Topological concentration: which nodes a link predictor will fail at, how links shift, and weights of message passing that follow the former."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.adapters.node_graphs import to_pyg_node
from limbeck.blocks.best_state import BestState
from limbeck.blocks.edge_reweighting import MessageGraph
from limbeck.blocks.negative_links import UnlinkedPairs
from limbeck.core.artifacts import DESCRIPTION, WEIGHTS, register_kind, save_weights
from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data, Stream
from limbeck.core.errors import InputError
from limbeck.core.files import atomic_path, write_json
from limbeck.core.method import Method
from limbeck.core.node_graphs import NodeGraph
from limbeck.core.optim import Optimised, TrainingConfig, make_optimised, trainable
from limbeck.core.seeding import preserved_random_state
from limbeck.core.stage import Stage
from limbeck.metrics.concentration import Concentration, topological_concentration
from limbeck.metrics.link_ranking import NodeRanking, Scorer
from limbeck.networks.feature_linear import thinned
from limbeck.networks.link_networks import LinkPredictor, link_predictor, pair_logits, read_link_predictor
from limbeck.tasks.judging_links import LinkStudy, Part
from limbeck.tasks.links import LinkData, LinkParts, LinkSetup, LinkTask, load_links

register_kind("link-predictor", read_link_predictor)

_EDGES = 1 << 18  # scored at a time


class TopologicalConcentration(Method):
    r"""A study of link prediction on one graph, and a link predictor with re-weighted message passing.

    The concentration :math:`C_i` (TC, :mod:`limbeck.metrics.concentration`) says how much of the computation tree of node i lies in those of its
    neighbours; it is set against how well each node's links are predicted, beside degree, density and distance. The predictor scores pairs as
    :math:`s_{uv} = f(h_u \odot h_v)`, :math:`h = g(X, A)`, with one unlinked pair for each link, drawn anew each time:

    .. math:: L = \tfrac12 \big[ \mathrm{mean}\,{-\log \sigma(s_{uv})} + \mathrm{mean}\,{-\log \sigma(-s_{u'v'})} \big].

    Re-weighting (``alpha`` above 0) lets message passing follow the links that surroundings speak for. After ``warm_up`` epochs, every ``interval``
    epochs and without gradients, with :math:`H = g(X, A)` and :math:`\bar H = A^0 H`,

    .. math:: s_{ij} = \sigma(f(\bar H_i \odot H_j)), \qquad
              A_{ij} \leftarrow A^0_{ij} + \alpha\,\mathrm{softmax}_{j \in N_i}(s_{ij}) \sum_l A^0_{il},

    always from the original :math:`A^0`, as published code does; the paper's listing adds to the weights in use (``pile_up``).

    As a plain object::

        method = TopologicalConcentration(LinkTask.from_edges(edges, features=x), my_encoder)
        optimizer = torch.optim.Adam(method.trainable_parameters())
        for epoch in range(100):
            optimizer.zero_grad(); method(pairs).backward(); optimizer.step()   # pairs (B, 2)
            method.reweight()                                                   # where alpha > 0
        tc, ranking = method.concentration("test"), method.ranking("test")

    Args:
        task: links in three parts, and features.
        encoder: ``encoder(x, adjacency) -> (N, d)`` with adjacency a sparse CSR matrix (N, N); a module is trained, a function is taken as it is. None:
            what the config says.
        predictor: ``predictor(h_u, h_v) -> logits``, symmetric; needed with an encoder of one's own. None: a perceptron on the product.
        config: hyper-parameters; or give single ones as keyword arguments.
        seed: of the pairs that validation and judging compare with.

    Attributes:
        model: the :class:`~limbeck.networks.link_networks.LinkPredictor`.
        messages: the graph of message passing and its weights.
        study: the analysis without a predictor, :class:`~limbeck.tasks.judging_links.LinkStudy`.

    Raises:
        InputError: all pairs are linked, or an encoder without a predictor.

    Our decisions, where the paper leaves it open: hits of links are counted among as many unlinked pairs as there are links (five times K at the
    least); the concentration as message passing sees it (``message_tc``) weighs neighbours by A; the shift is measured at K = 1, since from two hops on
    a training neighbour's tree holds part of the node's own by construction.

    Source: "A Topological Perspective on Demystifying GNN-Based Link Prediction Performance" (2024).
    """

    name = "topological-concentration"
    family = "graphs"

    class Config(TrainingConfig):
        epochs: float = Field(200, gt=0, description="passes over the training links")
        batch_size: int = Field(
            2048, ge=1, description="training links per update; the whole graph is propagated each time"
        )
        optimizer: Literal["adamw", "adam", "sgd"] = Field("adam", description="update rule")
        lr: float = Field(5e-3, gt=0, description="peak learning rate")
        weight_decay: float = Field(0.0, ge=0, description="weight decay (decoupled for adamw)")
        schedule: Literal["constant", "cosine", "linear", "poly", "step"] = Field(
            "constant", description="course of the learning rate after warm-up"
        )
        clip_grad: float | None = Field(
            1.0, gt=0, description="largest gradient norm, of encoder and predictor apart; none: no clipping"
        )
        network: Literal["gcn", "sage"] = Field(
            "gcn",
            description="encoder, and how the adjacency is normalised: symmetric with self loops, or rows without",
        )
        hidden: int = Field(128, ge=1, description="width of node states")
        depth: int = Field(1, ge=1, description="convolutions")
        dropout: float = Field(0.0, ge=0, lt=1, description="between convolutions")
        predictor_layers: int = Field(1, ge=1, description="linear maps of the predictor")
        embedding: int = Field(
            64, ge=1, description="width of the states that are learned where nodes have no features"
        )
        hops: int = Field(2, ge=1, le=4, description="K: steps of the walks that concentration counts")
        beta: float | None = Field(None, ge=0, description="decay of longer walks; none: 1 / mean degree")
        projection: int = Field(256, ge=1, description="d: columns of the random projection of the approximation")
        draws: int = Field(8, ge=1, description="projections that are averaged")
        alpha: float = Field(0.0, ge=0, description="weight that re-weighting adds; 0: none")
        interval: int = Field(1, ge=1, description="epochs between re-weightings")
        warm_up: int = Field(5, ge=0, description="epochs before intervals are counted")
        pile_up: bool = Field(False, description="re-weighting adds to the weights in use, not to the original ones")
        val_messages: bool = Field(False, description="validation links carry messages when test links are judged")
        cut: int = Field(10, ge=1, description="K of the ranking measures that concentration is set against")
        choose_at: int = Field(100, ge=1, description="K of the validation hits that choose the state that is kept")
        check_every: int = Field(5, ge=1, description="epochs between validations")

        presets = {
            "paper": {
                "epochs": 1000,
                "batch_size": 1152,
                "lr": 1e-3,
                "hidden": 256,
                "embedding": 256,
                "alpha": 2.0,
                "interval": 1,
                "warm_up": 1,
                "check_every": 1,
            }
        }

    class Setup(LinkSetup):
        """Which links to predict."""

    def __init__(
        self,
        task: LinkTask,
        encoder: Callable[[Tensor, Tensor], Tensor] | None = None,
        predictor: nn.Module | None = None,
        config: Config | None = None,
        *,
        seed: int = 0,
        **overrides: Any,
    ) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.on = task
        self.spec: dict[str, Any] | None = None
        self.model = self._own(encoder, predictor) if encoder is not None else self._built(predictor)
        self.messages = self._messages(task.graph)
        # Linear maps of counts of words are several times faster where the zeros are left out; an encoder of one's own gets them as they are.
        held = task.features if task.features is None or encoder is not None else thinned(task.features)
        self.features: Tensor | None
        self.register_buffer("features", held, persistent=False)
        self.unlinked = UnlinkedPairs(task.num_nodes, task.train, task.sides)
        self.study = LinkStudy(task, c.hops, c.beta, c.projection, c.draws, cut=c.cut, seed=seed)
        self.best = BestState(self)

    def _own(self, encoder: Callable[[Tensor, Tensor], Tensor], predictor: nn.Module | None) -> LinkPredictor:
        if predictor is None:
            raise InputError(
                "an encoder of your own needs predictor=…, for example HadamardPredictor(width of its states)"
            )
        module = encoder if isinstance(encoder, nn.Module) else _Function(encoder)
        embedding = None
        if self.on.features is None:
            embedding = torch.randn(self.on.num_nodes, self.config.embedding) / self.config.embedding**0.5
        return LinkPredictor(module, predictor, embedding)

    def _built(self, predictor: nn.Module | None) -> LinkPredictor:
        c, features = self.config, self.on.features
        self.spec = {
            "encoder": c.network,
            "width": c.embedding if features is None else features.shape[1],
            "hidden": c.hidden,
            "depth": c.depth,
            "dropout": c.dropout,
            "layers": c.predictor_layers,
            "embedded": self.on.num_nodes if features is None else 0,
        }
        made = link_predictor(**self.spec)
        if predictor is not None:
            made.predictor, self.spec = predictor, None
        return made

    def _messages(self, graph: NodeGraph) -> MessageGraph:
        gcn = self.config.network == "gcn"
        return MessageGraph(graph.adjacency("sym" if gcn else "row", self_loops=gcn))

    # ---- building --------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, LinkParts]:
        """The method on a task, and the task."""
        task = load_links(LinkSetup(**{k: getattr(setup, k) for k in LinkSetup.model_fields}))
        return cls(task, config=config, seed=seed), task.parts()

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        """The method on a user's own links (:class:`~limbeck.tasks.links.LinkData`)."""
        if not isinstance(data, LinkData):
            raise InputError(f"{cls.name} takes links: LinkTask.from_edges(edges, features=x).parts().train")
        if student is not None:
            raise InputError(f"an encoder of your own goes into an object: {cls.__name__}(task, encoder, predictor)")
        return cls(data.task, config=config, seed=seed)

    # ---- the predictor ---------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        """Both halves of the loss on links (B, 2) and as many unlinked pairs."""
        pairs = batch.inputs
        if not isinstance(pairs, Tensor) or pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
            raise InputError("a batch of links is (B, 2) numbers of nodes")
        negative = self.unlinked.sample(len(pairs)).to(pairs.device)
        logits = self.model(self.features, self.messages.matrix(), torch.cat([pairs, negative]))
        linked, unlinked = logits[: len(pairs)], logits[len(pairs) :]
        return Losses(linked=(0.5, F.softplus(-linked).mean()), unlinked=(0.5, F.softplus(unlinked).mean()))

    @torch.no_grad()
    def reweight(self, messages: MessageGraph | None = None) -> None:
        """Give message passing (of the training graph unless another is given) new weights by the predictor as it is now."""
        graph, was_training = self.messages if messages is None else messages, self.training
        self.eval()
        h = self.model.states(self.features, graph.matrix())
        around = graph.matrix(original=True) @ h
        parts = zip(graph.rows.split(_EDGES), graph.columns.split(_EDGES), strict=True)
        scores = [self.model.predictor(around[i], h[j]).sigmoid() for i, j in parts]
        graph.reweight(torch.cat(scores), self.config.alpha, accumulate=self.config.pile_up)
        self.train(was_training)

    @torch.no_grad()
    def states(self, part: Part = "test") -> Tensor:
        """(N, d) as they are when links of a part are judged."""
        graph = self.messages
        if part == "test" and self.config.val_messages:
            graph = self._messages(self.on.graph_with(torch.cat([self.on.train, self.on.val], 1))).to(graph.base.device)
            if self.config.alpha:
                self.reweight(graph)
        was_training = self.training
        self.eval()
        found = self.model.states(self.features, graph.matrix())
        self.train(was_training)
        return found

    def scorer(self, part: Part = "test") -> Scorer:
        """Nodes (B,) -> logits with all nodes (B, N)."""
        h = self.states(part)
        with_all = getattr(self.model.predictor, "with_all", None)

        def score(nodes: Tensor) -> Tensor:
            some = h[nodes.to(h.device)]
            found: Tensor = with_all(some, h) if with_all is not None else pair_logits(self.model.predictor, some, h)
            return found

        return score

    def pair_scorer(self, part: Part = "test") -> Callable[[Tensor], Tensor]:
        """Pairs (B, 2) -> logits (B,)."""
        h = self.states(part)
        return lambda pairs: self.model.predictor(h[pairs[:, 0].to(h.device)], h[pairs[:, 1].to(h.device)])

    # ---- training --------------------------------------------------------------------------------------------------------

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One stage: the predictor, re-weighted between epochs, kept as it was when validation links were found best."""
        c = self.config
        stream = Stream(train, c.batch_size, seed=seed)
        steps, epoch = c.total_steps(stream.steps_per_epoch), stream.steps_per_epoch
        if not any(p.requires_grad for p in self.model.parameters()):
            raise InputError("neither the encoder nor the predictor has anything to train: judge them with evaluate")

        def optimisers() -> Mapping[str, Optimised]:
            groups = {"encoder": self.model.encoder_parameters(), "predictor": trainable(self.model.predictor)}
            kept = {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
            return {name: make_optimised(group, c, steps) for name, group in kept.items() if group}

        def after(step: int) -> None:
            done, left = divmod(step, epoch)
            if c.alpha and not left and done > c.warm_up and not (done - c.warm_up) % c.interval:
                self.reweight()

        def validated() -> dict[str, float]:
            hits = self.study.link_hits(self.pair_scorer("val"), "val", (c.choose_at,))[c.choose_at]
            self.best.offer(hits)
            return {f"link_hits_at_{c.choose_at}": hits}

        judged = val is not None
        return [
            Stage(
                "predictor",
                steps,
                stream,
                losses=self.losses,
                optimisers=optimisers,
                accumulate=c.accumulate,
                after_step=after,
                evaluate=validated if judged else None,
                evaluate_every=c.check_every * epoch,
                end=self.best.restore if judged else None,
                state={"best": self.best},
            )
        ]

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        """Nothing is needed before a run."""

    def check(self, batch: Batch) -> None:
        """One loss on a few links.

        Raises:
            InputError: it is not finite.
        """
        with preserved_random_state(), torch.no_grad():
            total = self.losses(batch).total
        if not bool(torch.isfinite(total)):
            raise InputError("the loss of the first links is not finite: check features, encoder and predictor")

    # ---- what the links say ----------------------------------------------------------------------------------------------

    def concentration(self, part: Part = "train", *, hops: int | None = None, exact: bool = True) -> Concentration:
        """Of every node, towards its neighbours in a part; ``exact=False``: by random projections, in linear time."""
        return self.study.concentration(part, hops=hops, exact=exact)

    def message_tc(self, *, original: bool = False) -> Concentration:
        """The concentration in the training links with neighbours weighted as in message passing."""
        pairs, weights = self.messages.neighbours(original=original)
        c = self.config
        return topological_concentration(
            pairs.cpu(), self.on.num_nodes, hops=c.hops, beta=c.beta, weights=weights.cpu()
        )

    def ranking(self, part: Part = "test") -> NodeRanking:
        """How every node with links in a part ranks them among all nodes that it is not known to be linked with."""
        return self.study.ranking(self.scorer(part), part)

    # ---- judging and keeping the result ----------------------------------------------------------------------------------

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """How every indicator goes with how well nodes' test links are found; how well they are; the shift; and plots.

        Raises:
            InputError: the data are not the test (or validation) links of this object's task.
        """
        if not isinstance(test, LinkData) or test.task is not self.on or test.part == "train":
            raise InputError(f"{self.name} is judged on the test links of its own task: task.parts().test")
        part: Part = "val" if test.part == "val" else "test"
        found = self.study.judge(self.scorer(part), self.pair_scorer(part), part)
        if self.config.alpha and self.study.counted:
            weighted = {"before": self.message_tc(original=True), "after": self.message_tc()}
            found |= {f"message_tc_{when}": made.mean for when, made in weighted.items()}
        return found

    def to_pyg(self) -> Any:
        """A torch_geometric ``Data``: training links, weights of message passing (self loops left out), and ``tc_train``, ``tc_val``, ``tc_test`` (N,)."""
        pairs, weights = self.messages.neighbours()
        x = torch.ones(self.on.num_nodes, 1) if self.on.features is None else self.on.features
        made = to_pyg_node(NodeGraph(x, pairs.cpu(), None, weights.cpu()))
        parts: tuple[Part, ...] = ("train", "val", "test")
        for part in parts:
            setattr(made, f"tc_{part}", self.study.concentration(part).values)
        return made

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The link predictor as safetensors, and beside it ``nodes.npz`` (what the links say of every node) and ``messages.npz``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder / WEIGHTS)
        write_json(folder / DESCRIPTION, {**description, "kind": "link-predictor", "network": self.spec})
        pairs, weights = self.messages.neighbours()
        nodes: dict[str, Any] = {
            name.replace(", ", "_").replace(" ", "_"): v.numpy() for name, v in self.study.indicators().items()
        }
        messages: dict[str, Any] = {"edge_index": pairs.cpu().numpy(), "edge_weight": weights.cpu().numpy()}
        for name, held in (("nodes.npz", nodes), ("messages.npz", messages)):
            with atomic_path(folder / name) as temporary, open(temporary, "wb") as file:
                np.savez_compressed(file, **held)


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.function(x, adjacency)

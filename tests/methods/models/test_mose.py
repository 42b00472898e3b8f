"""MoSE: the losses by hand, weights by layer, what trains what, both stages resumed exactly, judging and artifacts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import limbeck
from limbeck import networks
from limbeck.blocks.masked_tokens import SpecialTokens
from limbeck.blocks.multi_exit import ExitEncoder, MultiExit
from limbeck.core.batch import Batch
from limbeck.core.data import Stream
from limbeck.core.errors import InputError
from limbeck.methods.models import MoSE
from limbeck.tasks.base import TaskConfig
from limbeck.tasks.code import make_task
from limbeck.tasks.pairs import PairTask, TextPairs
from limbeck.tasks.retrieval import judge_retrieval, search
from limbeck.tasks.tokens import HashTokenizer
from tests.helpers import resumed_equals_uninterrupted
from tests.tasks.test_code import corpus

TINY = {"exits": (1, 3), "dim": 6, "batch_size": 8, "evaluations": 0}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def encoder(seed: int = 0, tokens: int = 24, vocabulary: int = 4096) -> nn.Module:
    torch.manual_seed(seed)
    return networks.build("bert-d8-l3-h2", in_shape=(tokens,), num_classes=vocabulary)


def task() -> PairTask:
    return make_task("tiny", corpus(), TaskConfig.make(task="stdlib-code"), tokenizer=HashTokenizer(length=24))


def batch(n: int = 8, view: int = 0) -> Batch:
    return task().train.fetch(torch.arange(n), view)


def clip(a: Tensor, b: Tensor, scale: float, groups: Tensor) -> float:
    """Symmetric InfoNCE in numpy, pairs of one group left out."""
    s = scale * a.detach().double().numpy() @ b.detach().double().numpy().T
    same = (groups[:, None] == groups[None]).numpy() & ~np.eye(len(s), dtype=bool)
    total = 0.0
    for logits in (s, s.T):
        e = np.where(same, 0, np.exp(logits))
        total += -(np.diag(logits) - np.log(e.sum(1))).mean()
    return total / 2


# ---- the losses ------------------------------------------------------------------------------------------------------


def test_loss_is_the_sum_over_exits_weighted_by_layer() -> None:
    method = MoSE(encoder(), **TINY, scale=7.0, code_share=0.5).eval()
    b = batch()
    assert method.weights == {1: 1 / 3, 3: 1.0}
    q, d, o = (method.student(**b.inputs[s]) for s in ("query", "document", "other"))
    losses = method.losses(b)
    expected = {}
    for i in (1, 3):
        # The first half pairs text with code, the second code with code.
        a, other = torch.cat([q[i][:4], d[i][4:]]), torch.cat([d[i][:4], o[i][4:]])
        expected[i] = clip(a, other, 7.0, b.labels)
        assert losses[f"exit_{i}"].item() == pytest.approx(expected[i], rel=1e-4)
    assert losses.total.item() == pytest.approx(expected[1] / 3 + expected[3], rel=1e-4)
    assert MoSE(encoder(), exits=(2,)).weights == {2: 2 / 3}


def test_without_second_documents_all_pairs_are_of_text_and_code() -> None:
    method = MoSE(encoder(), **TINY).eval()
    b = batch()
    two = {k: b.inputs[k] for k in ("query", "document")}
    q, d = method.student(**two["query"]), method.student(**two["document"])
    expected = sum(w * clip(q[i], d[i], 10.0, b.labels) for i, w in method.weights.items())
    assert method(Batch(two, b.labels)).item() == pytest.approx(expected, rel=1e-4)
    none = MoSE(method.student, **TINY, code_share=0.0).eval()
    assert none(b).item() == pytest.approx(expected, rel=1e-4)


def test_equal_queries_are_no_negatives() -> None:
    method = MoSE(encoder(), **TINY, code_share=0.0).eval()
    query = batch().inputs["query"]
    same = {k: v[:1].expand(4, -1) for k, v in query.items()}
    document = {k: v[:4] for k, v in batch().inputs["document"].items()}
    pairs = {"query": same, "document": document}
    assert method(Batch(pairs, torch.zeros(4).long())).item() == pytest.approx(0, abs=1e-5)
    assert method(Batch(pairs)).item() > 0.5


def test_explicit_distillation_flows_into_shallow_exits_only() -> None:
    method = MoSE(encoder(), **TINY, exit_kd_weight=0.5, exit_kd_temperature=2.0, code_share=0.0).eval()
    b = batch()
    losses = method.losses(b)
    q, d = method.student(**b.inputs["query"]), method.student(**b.inputs["document"])
    same = (b.labels[:, None] == b.labels[None]) & ~torch.eye(8, dtype=torch.bool)
    s = {i: (10 * q[i] @ d[i].T).masked_fill(same, -1e4) for i in (1, 3)}
    t = {i: (10 * d[i] @ q[i].T).masked_fill(same, -1e4) for i in (1, 3)}
    expected = sum(
        0.5 * F.kl_div(F.log_softmax(v[1] / 2, -1), F.softmax(v[3] / 2, -1), reduction="batchmean") for v in (s, t)
    )
    torch.testing.assert_close(losses["exit_kd"], expected, rtol=1e-4, atol=1e-6)
    base = losses["exit_1"] / 3 + losses["exit_3"]
    torch.testing.assert_close(losses.total, base + 0.5 * losses["exit_kd"])
    losses["exit_kd"].backward()
    assert all(p.grad is None for p in method.student.heads["3"].parameters())
    assert all(p.grad is None for layer in method.student.encoder.encoder.layer[1:] for p in layer.parameters())
    assert method.student.heads["1"].linear.weight.grad.abs().max() > 0


def test_deep_exits_train_shallow_layers() -> None:
    method = MoSE(encoder(), **TINY)
    method.losses(batch())["exit_3"].backward()
    first = method.student.encoder.encoder.layer[0]
    assert all(p.grad.abs().max() > 0 for p in first.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in method.student.heads["1"].parameters())


def test_pretraining_losses_by_hand() -> None:
    method = MoSE(encoder(), **TINY, pretrain_epochs=1, mask_rate=0.4).eval()
    windows = task().train.contexts(24, 0).fetch(torch.arange(6), 1)
    torch.manual_seed(5)
    losses = method.pretraining_losses(windows)
    torch.manual_seed(5)
    from limbeck.blocks.masked_tokens import mask_tokens

    ids, mask = windows.inputs["input_ids"], windows.inputs["attention_mask"]
    seen, chosen = mask_tokens(ids, SpecialTokens(), 4096, 0.4)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    states = method.student.encoder(seen, mask, position_ids=positions, output_hidden_states=True).hidden_states
    total = torch.zeros(())
    for i in (1, 3):
        logits = method.pretraining["mlm"](states[i], i)
        mlm = F.cross_entropy(logits[chosen], ids[chosen])
        last = torch.stack([h[int(m.sum()) - 1] for h, m in zip(states[i], mask, strict=True)])
        icc = F.cross_entropy(method.pretraining["icc"](last, i), windows.labels)
        torch.testing.assert_close(losses[f"mlm_{i}"], mlm, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses[f"icc_{i}"], icc, rtol=1e-4, atol=1e-5)
        total = total + i / 3 * (mlm + icc)
    torch.testing.assert_close(losses.total, total, rtol=1e-4, atol=1e-5)
    assert method.pretraining["mlm"].layers is method.pretraining["icc"].layers
    method.special = SpecialTokens(0, 1, 2, 3)
    nothing = Batch({"input_ids": torch.tensor([[3, 2]]), "attention_mask": torch.ones(1, 2).long()}, torch.tensor([1]))
    assert method.pretraining_losses(nothing)["mlm_3"].item() == 0


# ---- running ---------------------------------------------------------------------------------------------------------


def test_a_bare_loop_on_a_transformers_encoder_learns() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32, dropout=0.0, attention_dropout=0.0
    )
    method = MoSE(transformers.DistilBertModel(config), exits=(1, 2), dim=8)
    ids = torch.randint(4, 60, (16, 6))
    pairs = (
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": ids.flip(1), "attention_mask": torch.ones_like(ids)},
    )
    optimizer = torch.optim.Adam(method.trainable_parameters(), 5e-3)
    values = []
    for _ in range(25):
        loss = method(pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.3 * values[0]
    small = method.truncate(1).eval()
    torch.testing.assert_close(small(**pairs[0]), method.eval().student(**pairs[0])[1], rtol=1e-5, atol=1e-6)


def test_both_stages_resume_exactly(tmp_path: Path) -> None:
    made = task()

    def make() -> MoSE:
        torch.manual_seed(0)
        return MoSE(encoder(), steps=14, pretrain_epochs=1.5, pretrain_window=24, **TINY)

    stages = make().stages(made.train)
    assert [s.name for s in stages] == ["pretraining", "fine-tuning"] and stages[0].steps == 10
    method = resumed_equals_uninterrupted(make, made.train, tmp_path, stops=(7, 12), every=5)
    assert method.pretraining is not None


def test_pretraining_moves_the_encoder_and_fine_tuning_leaves_its_heads() -> None:
    torch.manual_seed(0)
    method = MoSE(encoder(), **TINY, pretrain_epochs=1)
    tuned = {id(p) for p in method.optimisers(5)["main"].parameters()}
    assert tuned == {id(p) for p in method.student.parameters()}
    first = method.stages(task().train)[0].optimisers()["main"].parameters()
    assert {id(p) for p in first} == {
        id(p) for p in (*method.student.encoder.parameters(), *method.pretraining.parameters())
    }


def test_fit_judge_and_load(tmp_path: Path) -> None:
    made = task()
    run = limbeck.fit(
        "mose",
        made.train,
        student=encoder(),
        val=made.val,
        test=made.test,
        out=tmp_path,
        engine={"progress": False},
        steps=4,
        **{**TINY, "evaluations": 1},
    )
    assert [r["who"] for r in run.result["rows"]] == ["exit 3", "exit 1"]
    deep, early = run.result["rows"]
    assert deep["flops"] > early["flops"] > 0 and deep["parameters"] > early["parameters"]
    assert run.result["pool"] == len(made.test)
    assert {"mrr_at_10", "recall_at_1", "ndcg_at_10", "code_mrr_at_10", "latency"} <= early.keys()
    assert any("mrr_exit_1" in r for r in run.rows)
    model = limbeck.load(tmp_path).content
    assert model.state_dict().keys() == run.method.student.state_dict().keys()
    assert search(model, made.test)[3]["mrr_at_10"] == pytest.approx(deep["mrr_at_10"])
    run.method.save_exit(1, tmp_path / "one")
    one = limbeck.load(tmp_path / "one").content
    assert isinstance(one, ExitEncoder)
    assert judge_retrieval({"x": one}, made.test)["rows"][0]["recall_at_1"] == pytest.approx(early["recall_at_1"])


def test_by_name_the_same_seed_gives_the_same_weights_and_instructions_are_recorded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("limbeck.methods.models.mose.load_task", lambda setup: task())
    setup = MoSE.Setup.make(student="modernbert-d8-l2-h2", instruction=True)
    first, made = MoSE.build(setup, MoSE.Config.make(), seed=3)
    second, _ = MoSE.build(setup, MoSE.Config.make(), seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert first.student.exits == (1, 2) and "represent" in first.preparation["query_instruction"]
    assert torch.unique(made.train.query[:, :6], dim=0).shape == (1, 6)
    assert not torch.equal(made.train.query, task().train.query)


def test_an_encoder_of_ones_own_through_taps() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(4096, 8)
            self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            h = self.words(input_ids)
            for block in self.blocks:
                h = h + torch.tanh(block(h))
            return h

    torch.manual_seed(0)
    method = MoSE(MultiExit(Bag(), [1, 2], 4, layers=["blocks.0", "blocks.1"], width=8))
    method.check(batch())
    method(batch()).backward()
    assert all(p.grad is not None for p in method.parameters())


# ---- mistakes --------------------------------------------------------------------------------------------------------


def _too_long() -> Batch:
    ids = torch.full((3, 25), 9)
    long = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch({"query": long, "document": long})


def _sides(first: Tensor, second: Tensor) -> Batch:
    return Batch({"query": {"input_ids": first}, "document": {"input_ids": second}})


IDS = torch.full((3, 4), 9)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: MoSE(encoder(), accumulate=2), "accumulate must be 1: the negatives"),
        (lambda: MoSE(encoder(), exits=(7,)), "exit 7 is no layer"),
        (lambda: MoSE("bert"), "must be an nn.Module"),
        (lambda: MoSE(encoder(), **TINY).check(_too_long()), "25 tokens is longer than the encoder's window of 24"),
        (lambda: MoSE(encoder(), **TINY).check(_sides(IDS, IDS + 5000)), "document tokens go from 5009 to 5009"),
        (lambda: MoSE(encoder(), **TINY).check(_sides(IDS, IDS[:2])), "must be as many: 3 query, 2 document"),
        (lambda: MoSE(encoder(), **TINY).check(_sides(IDS[:1], IDS[:1])), "at least two pairs"),
        (lambda: MoSE(encoder(), **TINY)(torch.rand(3, 4)), "a batch of pairs is"),
        (lambda: MoSE(encoder(), **TINY).truncate(2), "no exit 2; the exits are 1, 3"),
        (lambda: MoSE(encoder(), **TINY).pretraining_losses(batch()), "without pre-training heads"),
        (lambda: limbeck.fit("mose", task().train, student=encoder(), teacher=encoder()), "has no teacher"),
        (lambda: limbeck.fit("mose", task().train), "mose needs student="),
        (lambda: limbeck.fit("mose", task="digits"), "the task 'digits' has none: use stdlib-code"),
        (
            lambda: MoSE(encoder(), **TINY, pretrain_epochs=1).stages(TextPairs(IDS, IDS)),
            "names none: give repository",
        ),
        (
            lambda: MoSE(encoder(), **TINY, pretrain_epochs=1).stages(Stream(task().train, 4).data.contexts(24)),
            "joins snippets of known repositories",
        ),
    ],
)
def test_bad_input(call, line: str) -> None:
    with pytest.raises(InputError, match=line):
        call()


def test_the_dry_run_passes_and_leaves_no_gradient() -> None:
    method = MoSE(encoder(), **TINY)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.check(batch())
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())

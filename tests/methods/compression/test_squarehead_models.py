"""SquareHead on all kinds of transformers, and what comes out: stored weights, judging, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import limbeck
from limbeck import networks
from limbeck.core.batch import Batch
from limbeck.core.data import MapData, TensorData
from limbeck.core.engine import Engine
from limbeck.core.errors import InputError
from tests.methods.compression.sparse_models import DATA, QUIET, batch, gpt, made, run

# ---- all kinds of models -----------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def rows(labels: Any, size: int = 12, **more: Tensor) -> MapData:
    ids = torch.randint(1, 12, (size, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(size, 6, dtype=torch.long)
    mask[::2, 4:] = 0
    return MapData(
        [
            {
                "input_ids": ids[n],
                "attention_mask": mask[n],
                "labels": labels(ids, mask)[n],
                **{k: v[n] for k, v in more.items()},
            }
            for n in range(size)
        ]
    )


def causal(ids: Tensor, mask: Tensor) -> Tensor:
    return ids.masked_fill(mask == 0, -100)


KINDS: dict[str, Any] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, pad_token_id=0)), rows(causal), 2),
    "gpt2 with tied weights": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2)), rows(causal), 2),
    "bert, texts": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3)), rows(lambda i, m: i[:, 0] % 3), 2),
    "bert, tokens": (lambda: hf.BertForTokenClassification(hf.BertConfig(**SMALL, num_labels=3)), rows(lambda i, m: causal(i % 3, m)), 2),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=12, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        rows(lambda i, m: causal(i, m)[:, :5]),
        4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_transformers_go_in_as_they_are(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, data, blocks = KINDS[kind]
    student = make()
    found = limbeck.fit(
        "squarehead", data, test=data, out=tmp_path, student=student, sparsity=0.75, steps=6, batch_size=4,
        engine={"progress": False},
    )  # fmt: skip
    method: Any = found.method
    assert method.student is student and len(method._pairs) == blocks
    first, teacher = found.result["rows"]
    assert first["sparsity"] == 0.75 and teacher["who"] == "teacher"
    assert first["stored_bytes"] < first["bytes"]
    assert ("perplexity" in first) == ("bert" not in kind)
    again = limbeck.load(tmp_path).content
    assert set(again.state_dict()) == set(student.state_dict())
    loaded = method.load_compact(tmp_path / "artifact")
    given = method.completed(data.fetch(torch.arange(4), None)).inputs
    with torch.no_grad():
        expected = method.compressed()(**given).logits
        torch.testing.assert_close(again(**given).logits, expected)
        assert torch.equal(loaded(**given).logits, expected)
        torch.testing.assert_close(method.sparse("scipy")(**given).logits, expected, rtol=1e-4, atol=1e-5)


def test_tokens_of_the_two_halves_have_their_own_masks() -> None:
    torch.manual_seed(0)
    make, data, _ = KINDS["t5"]
    student = make()
    method = made(student, make(), ce_weight=0.0).eval()
    given = data.fetch(torch.arange(4), None)
    total = method.losses(given)["features"]
    whole = method.completed(given)
    with torch.no_grad(), method._taps as own:
        student(**whole.inputs)
    taught = method.teach(whole).features
    expected = torch.tensor(0.0)
    for block, there in method._pairs:
        valid = whole.labels != -100 if block.path.startswith("decoder") else whole.inputs["attention_mask"].bool()
        s, t = own[block.path][valid], taught[there.path][valid]
        expected += (s - t).square().mean() / (t.square().mean() + 1e-8)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)


def test_an_image_classifier_and_micro_batches() -> None:
    torch.manual_seed(0)
    student = networks.build("vit-d16-l2-h2-p4", in_shape=(1, 8, 8), num_classes=3)
    data = TensorData(torch.randn(24, 1, 8, 8), torch.arange(24) % 3)
    method = made(student, sparsity=0.5, steps=4, batch_size=8, accumulate=2)
    Engine(None, QUIET, seed=1).run(method, method.stages(data, data, seed=0))
    assert method.held.sparsity == 0.5
    found = method.evaluate(data)
    assert {"accuracy", "sparsity", "stored_bytes"} <= set(found["rows"][0])
    assert found["pictures"][0]["title"] == "Sparsity by layer"


def test_text_without_labels_distils_alone() -> None:
    method = made(gpt(0), gpt(1), sparsity=0.0, ce_weight=0.0, kd_weight=1.0)
    losses = method.losses(Batch(batch().inputs))
    assert set(losses) == {"kd", "features"} and losses.total > 0
    with pytest.raises(InputError, match="needs labels"):
        made(sparsity=0.0)(Batch(batch().inputs))


def test_micro_batches_weigh_by_their_tokens() -> None:
    method = made(sparsity=0.0)
    labels = batch().labels.clone()
    labels[0, 3:] = -100
    assert method.normalisers(Batch(batch().inputs, labels)) == {"": 4 * 7 - 5}


# ---- what comes out ----------------------------------------------------------------------------------------------------


def test_what_is_stored_is_what_is_judged(tmp_path: Path) -> None:
    method = made(sparsity=0.75, values="bfloat16")
    method.prune()
    packed = method.packed()
    assert {p.form for p in packed.values()} == {"bitmask"}
    expected = sum(
        t.numel() * ((1 - 0.75) * 16 + 1) for t in (method.student.get_parameter(n) for n in method.held.names)
    )
    assert method.storage().by_form()["bitmask"] * 8 == expected
    method.save_compact(tmp_path)
    loaded, compressed = method.load_compact(tmp_path), method.compressed()
    for name, value in compressed.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    weight = compressed.get_parameter(method.held.names[0])
    assert torch.equal(weight, weight.bfloat16().float()) and float((weight == 0).double().mean()) == 0.75


def test_judged_on_text_with_pictures() -> None:
    method = run(made(sparsity=0.75, steps=4, batch_size=8))
    found = method.evaluate(DATA, [chr(97 + n) for n in range(11)])
    student, teacher = found["rows"]
    assert {"nll", "perplexity", "accuracy", "stored_bytes", "compression", "sparsity"} <= set(student)
    assert found["agreement"]["kl"] >= 0 and found["sparse_latency_ratio"] > 0
    assert [p["title"] for p in found["pictures"]] == [
        "Sparsity by layer",
        "Loss over sparsity",
        "What the models write",
    ]
    assert teacher["compression"] == 1.0

"""Embeddings of whole data sets: features, gradients against autograd, pixels, texts."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.embeddings import (
    TextEmbedder,
    embed,
    gradient_embedding,
    instruction_text,
    penultimate,
    raw_pixels,
    read_instructions,
    text_embeddings,
)
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError, UnknownNameError

torch.set_num_threads(1)


class Small(nn.Module):
    """A foreign classifier: nothing of this library's conventions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def model() -> Small:
    torch.manual_seed(0)
    return Small()


def images(n: int = 11) -> Tensor:
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def test_features_of_a_tapped_layer_in_batches_leave_the_model_alone():
    net, x = model(), images()
    net.body[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = embed(net, x, layer="body", batch_size=4)
    modes = [m.training for m in net.modules()]
    assert modes.count(False) == 1 and not net.body[1].training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.eval()
    torch.testing.assert_close(found, net.body(x).mean((2, 3)).detach())
    torch.testing.assert_close(embed(net, x, layer=penultimate(net)), found)
    assert embed(net, x, layer="body", pooling="flatten").shape == (11, 4 * 36)
    assert not found.requires_grad
    with pytest.raises(UnknownNameError):
        embed(net, x, layer="boddy")


def test_networks_of_the_library_are_asked_by_embed():
    from limbeck import networks

    net = networks.build("convnet-w4-d2", in_shape=(1, 8, 8), num_classes=3)
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(embed(net, (x, torch.zeros(5).long())), net.embed(x).detach())
    assert penultimate(net).path == "head"
    torch.testing.assert_close(embed(net, x, layer=penultimate(net)), net.embed(x).detach())


@pytest.mark.parametrize("double", [False, True])
def test_gradient_embedding_is_the_gradient_at_the_last_layer(double):
    net, x = model().eval(), images()
    y = torch.arange(11) % 3
    found = gradient_embedding(net, (x, y), double_softmax=double, batch_size=4)
    for i in range(11):
        z = net(x[i : i + 1])
        loss = F.cross_entropy(torch.softmax(z, 1) if double else z, y[i : i + 1])
        bias, weight = torch.autograd.grad(loss, [net.fc.bias, net.fc.weight])
        torch.testing.assert_close(found[i], torch.cat([bias, weight.flatten()]), rtol=1e-4, atol=1e-6)


def test_gradient_embedding_takes_given_or_predicted_labels():
    net, x = model().eval(), images()
    y = net(x).argmax(1)
    predicted = gradient_embedding(net, x)
    torch.testing.assert_close(predicted, gradient_embedding(net, x, y, batch_size=3))
    assert not torch.allclose(predicted, gradient_embedding(net, x, (y + 1) % 3))
    with pytest.raises(InputError, match="11 samples but 4 labels"):
        gradient_embedding(net, x, y[:4])
    with pytest.raises(InputError, match="class indices below 3"):
        gradient_embedding(net, x, y + 3)
    with pytest.raises(InputError, match="no linear layer"):
        gradient_embedding(nn.Conv2d(1, 2, 3), x)


def test_raw_pixels():
    x = (torch.rand(9, 1, 4, 4) * 255).to(torch.uint8)
    data = TensorData(x, mean=[0.5], std=[0.25])
    flat = raw_pixels(data, batch_size=4)
    expected = ((x.float() / 255 - 0.5) / 0.25).flatten(1)
    torch.testing.assert_close(flat, expected - expected.mean(0))
    torch.testing.assert_close(raw_pixels(data, centred=False), expected)


def test_text_embeddings_put_like_texts_together():
    texts = [
        *(f"the cat sleeps on mat number {i} in the sun" for i in range(6)),
        *(f"compute the integral of function {i} over the interval" for i in range(6)),
        "...",
    ]
    rows = text_embeddings(texts, 5)
    assert rows.shape == (13, 5)
    torch.testing.assert_close(rows[:12].norm(dim=1), torch.ones(12))
    assert rows[12].abs().sum() == 0
    like = rows @ rows.T
    assert like[:6, :6].min() > 0.5 > like[:6, 6:12].max()
    torch.testing.assert_close(rows, text_embeddings(texts, 5))
    assert text_embeddings(["a few words", "other words"], 50).shape[1] <= 2
    fitted = TextEmbedder(5).fit(texts)
    torch.testing.assert_close(fitted.transform(texts[:3]), rows[:3])
    assert fitted.transform(["zebra"]).abs().sum() == 0
    with pytest.raises(InputError, match="fit the text embedder"):
        TextEmbedder().transform(texts)
    for bad in ([], "one string", [1, 2]):
        with pytest.raises(InputError, match="list of strings"):
            text_embeddings(bad)
    with pytest.raises(InputError, match="cannot be embedded"):
        text_embeddings([".", "!"])


def test_instruction_files(tmp_path):
    records = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Say hello.", "input": "", "output": "Hello"},
    ]
    assert instruction_text(records[0]) == "Add.\n1 + 1\n2" and instruction_text(records[1]) == "Say hello.\nHello"
    assert instruction_text("as it is") == "as it is"
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    assert read_instructions(tmp_path / "a.json") == read_instructions(tmp_path / "a.jsonl") == records
    (tmp_path / "bad.json").write_text("[1, 2")
    (tmp_path / "numbers.json").write_text("[1, 2]")
    for name, line in (
        ("bad.json", "no JSON"),
        ("numbers.json", "no list of records"),
        ("none.json", "cannot be read"),
    ):
        with pytest.raises(InputError, match=line):
            read_instructions(tmp_path / name)
    with pytest.raises(InputError, match="instruction, input and output"):
        instruction_text({"text": "x"})

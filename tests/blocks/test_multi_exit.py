"""Encoders with exits: exact truncation, padding on either side, taps, gradients, artifacts."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import limbeck
from limbeck import networks
from limbeck.blocks.depth_heads import DepthConditionedHead
from limbeck.blocks.masked_tokens import SpecialTokens, mask_tokens
from limbeck.blocks.multi_exit import ExitEncoder, MultiExit, check_exits, pool
from limbeck.core.errors import InputError
from limbeck.networks.multi_exit import save_exits

NAMES = ["bert-d16-l3-h2", "modernbert-d16-l3-h2"]


def encoder(name: str = NAMES[1], tokens: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return networks.build(name, in_shape=(tokens,), num_classes=50)


def inputs(b: int = 4, t: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (b, t), generator=generator)
    lengths = torch.tensor([t, 2, 5, 7])[:b, None]
    mask = (torch.arange(t)[None] < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens with the padding in front."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    return {k: v.gather(1, order) for k, v in batch.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_truncation_is_exact_and_smaller(name: str, pooling) -> None:
    model = MultiExit(encoder(name), [1, 2, 3], 8, pooling).eval()
    whole = model(**inputs())
    sizes = []
    for i, expected in whole.items():
        small = model.truncate(i).eval()
        torch.testing.assert_close(small(**inputs()), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(expected.norm(dim=-1), torch.ones(4))
        sizes.append(sum(p.numel() for p in small.parameters()))
        assert not set(map(id, small.parameters())) & set(map(id, model.parameters()))
    assert sizes == sorted(set(sizes)) and model.encoder.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_padding_left_or_right_gives_the_same_embedding(name: str, pooling) -> None:
    model = MultiExit(encoder(name), None, 8, pooling).eval()
    right, before = model(**inputs()), model(**left(inputs()))
    for i in model.exits:
        torch.testing.assert_close(right[i], before[i], rtol=1e-4, atol=1e-5)
    alone = model(input_ids=inputs()["input_ids"][1:2, :2], attention_mask=torch.ones(1, 2).long())
    torch.testing.assert_close(alone[3], right[3][1:2], rtol=1e-4, atol=1e-5)


def test_an_exit_is_head_of_pooled_hidden_state() -> None:
    model = MultiExit(encoder(), [2], 8).eval()
    batch = inputs()
    hidden = model.encoder(**batch, output_hidden_states=True).hidden_states[2]
    weight = batch["attention_mask"].float()
    mean = (hidden * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    head = model.heads["2"]
    expected = F.normalize(F.linear(F.layer_norm(mean, (16,)), head.linear.weight, head.linear.bias), dim=-1)
    torch.testing.assert_close(model(**batch)[2], expected, rtol=1e-4, atol=1e-5)


def test_pooling_goes_by_the_mask() -> None:
    hidden = torch.arange(12.0).view(1, 4, 3)
    mask = torch.tensor([[0, 1, 1, 0]])
    assert pool(hidden, mask, "cls").tolist() == [[3, 4, 5]]
    assert pool(hidden, mask, "last").tolist() == [[6, 7, 8]]
    assert pool(hidden, mask, "mean").tolist() == [[4.5, 5.5, 6.5]]
    assert pool(hidden, None, "last").tolist() == [[9, 10, 11]]


def test_deep_exits_train_shallow_layers_and_heads_only_their_own_exit() -> None:
    model = MultiExit(encoder(), [1, 3], 8)
    model(**inputs())[3][:, 0].sum().backward()
    layers = model.encoder.layers
    assert all(any(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters()) for layer in layers)
    assert all(p.grad is None for p in model.heads["1"].parameters())
    assert all(p.grad is not None for p in model.heads["3"].parameters())
    model.zero_grad(set_to_none=True)
    model(**inputs())[1][:, 0].sum().backward()
    assert all(p.grad is None for layer in layers[1:] for p in layer.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.RobertaModel(
            transformers.RobertaConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=32,
                pad_token_id=0,
            )
        ),
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
            )
        ),
        lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=32)
        ),
        lambda: transformers.LlamaModel(
            transformers.LlamaConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
            )
        ),
    ],
    ids=["roberta-with-pooler", "with-mlm-head", "distilbert", "llama"],
)
def test_other_encoders_of_transformers(make) -> None:
    torch.manual_seed(0)
    model = MultiExit(make(), [1, 3], 8).eval()
    for i, expected in model(**inputs()).items():
        small = model.truncate(i).eval()
        torch.testing.assert_close(small(**inputs()), expected, rtol=1e-5, atol=1e-6)
        assert not any("pooler" in n for n, _ in small.named_parameters())


class Stack(nn.Module):
    """Somebody's own encoder: tokens (B, T, D) through residual blocks and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)])
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))


def test_other_encoders_through_taps() -> None:
    torch.manual_seed(0)
    stack, x = Stack(), torch.randn(3, 5, 6)
    model = MultiExit(stack, [2, 4], 7, layers=[f"blocks.{i}" for i in range(4)], width=6).eval()
    whole = model(x)
    for i in (2, 4):
        mean = stack.blocks[:i](x).mean(1)
        torch.testing.assert_close(whole[i], model.heads[str(i)](mean))
        small = model.truncate(i)
        torch.testing.assert_close(small(x), whole[i])
        assert len(small.encoder.blocks) == i
    with pytest.raises(InputError, match="no item of a ModuleList"):
        MultiExit(stack, [1], 7, layers=["norm"], width=6).truncate(1)


@pytest.mark.parametrize("name", NAMES)
def test_artifacts_come_back_whole_or_one_exit(name: str, tmp_path) -> None:
    model = MultiExit(encoder(name), [1, 3], 8, "last").eval()
    save_exits(model, tmp_path / "all", {"method": "mose"})
    back = limbeck.load(tmp_path / "all").content
    assert isinstance(back, MultiExit) and back.state_dict().keys() == model.state_dict().keys()
    whole = model(**inputs())
    for i in (1, 3):
        torch.testing.assert_close(back(**inputs())[i], whole[i])
        one = limbeck.load(tmp_path / "all", exit=i).content
        assert isinstance(one, ExitEncoder)
        torch.testing.assert_close(one(**inputs()), whole[i], rtol=1e-5, atol=1e-6)
    save_exits(model.truncate(1), tmp_path / "one", {})
    one = limbeck.load(tmp_path / "one").content
    torch.testing.assert_close(one(**inputs()), whole[1], rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["num_hidden_layers"] == 1
    with pytest.raises(InputError, match="no exit 2"):
        limbeck.load(tmp_path / "all", exit=2)
    with pytest.raises(InputError, match="holds exit 1 alone"):
        limbeck.load(tmp_path / "one", exit=3)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: MultiExit(encoder())(**inputs(4, 13)), "13 tokens is longer than the encoder's window of 12"),
        (lambda: MultiExit(encoder(), [4]), "exit 4 is no layer: the encoder has layers 1 to 3"),
        (lambda: MultiExit(encoder(), []), "there is no exit"),
        (lambda: MultiExit(encoder(), [1]).truncate(2), "no exit 2; the exits are 1"),
        (lambda: MultiExit(encoder(), pooling="max"), "pooling must be mean, last, cls"),
        (lambda: MultiExit(nn.Linear(3, 3)), "does not say its number of layers"),
        (lambda: MultiExit(Stack(), layers=["blocks.0"]), "need layers=.*and width"),
        (lambda: MultiExit(Stack(), layers=["block.0"], width=6), "blocks.0"),
        (lambda: pool(torch.rand(2, 3)), "tokens"),
        (lambda: pool(torch.rand(2, 3, 4), torch.ones(2, 4)), "does not fit"),
        (lambda: DepthConditionedHead(4, 3, 2)(torch.rand(1, 4), 3), "layer 3 is none of the layers 1 to 2"),
    ],
)
def test_bad_input(call, line) -> None:
    with pytest.raises((InputError, LookupError), match=line):
        call()


def test_default_exits() -> None:
    assert check_exits(None, 6) == (1, 2, 4, 6)
    assert check_exits(None, 36) == (6, 12, 24, 36)
    assert check_exits(None, 1) == (1,)
    assert check_exits([3, 1, 3], 4) == (1, 3)


def test_shared_head_knows_the_depth() -> None:
    torch.manual_seed(0)
    head = DepthConditionedHead(6, 5, 3)
    h = torch.randn(2, 4, 6)
    joined = torch.cat([h, head.layers.weight[1].expand(2, 4, 4)], -1)
    expected = head.output(head.norm(F.gelu(head.dense(joined))))
    torch.testing.assert_close(head(h, 2), expected)
    assert not torch.allclose(head(h, 1), head(h, 2))
    head(h, 2).square().sum().backward()
    rows = head.layers.weight.grad.abs().sum(1)
    assert rows[1] > 0 and rows[0] == 0 and rows[2] == 0


def test_masking_spares_special_tokens_and_hits_the_rate() -> None:
    special = SpecialTokens()
    ids = torch.randint(4, 100, (200, 50), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1], ids[:, 10] = special.cls, special.pad, special.sep
    seen, chosen = mask_tokens(ids, special, 100, 0.15, torch.Generator().manual_seed(1))
    assert not chosen[:, [0, 10, -1]].any() and torch.equal(seen[~chosen], ids[~chosen])
    content = chosen.sum() / (200 * 47)
    assert content == pytest.approx(0.15, abs=0.015)
    assert (seen[chosen] == special.mask).float().mean() == pytest.approx(0.8, abs=0.04)
    assert (seen[chosen] == ids[chosen]).float().mean() == pytest.approx(0.1, abs=0.03)
    assert seen[chosen & (seen != special.mask)].min() >= 4 and seen.max() < 100


def test_special_tokens_of_a_tokenizer() -> None:
    class Tokenizer:
        pad_token_id, mask_token_id, cls_token_id, sep_token_id = 9, 8, 7, None

    with pytest.raises(InputError, match="no sep token"):
        SpecialTokens.of(Tokenizer())
    Tokenizer.sep_token_id = 6
    assert SpecialTokens.of(Tokenizer()) == SpecialTokens(9, 8, 7, 6)

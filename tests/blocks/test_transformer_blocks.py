"""Blocks are found in models of all kinds; which tokens count in them; what decoders take."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from limbeck import networks
from limbeck.blocks.transformer_blocks import Block, find_blocks, predicts_next, valid_tokens, with_decoder_inputs
from limbeck.core.batch import Batch
from limbeck.core.errors import InputError

SMALL = {"vocab_size": 20, "num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def t5() -> hf.T5ForConditionalGeneration:
    config = hf.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config)


def test_blocks_of_transformers() -> None:
    gpt = networks.build("gpt-d16-l2-h2", in_shape=(8,), num_classes=20)
    assert [b.path for b in find_blocks(gpt)] == ["transformer.h.0", "transformer.h.1"]
    llama = networks.build("llama-d16-l3-h2", in_shape=(8,), num_classes=20)
    assert [b.path for b in find_blocks(llama)] == [f"model.layers.{n}" for n in range(3)]
    bert = hf.BertForSequenceClassification(hf.BertConfig(**SMALL))
    assert [b.path for b in find_blocks(bert)] == [f"bert.encoder.layer.{n}" for n in range(3)]
    found = find_blocks(t5())
    assert [b.path for b in found] == [f"{half}.block.{n}" for half in ("encoder", "decoder") for n in (0, 1)]
    assert [b.side for b in found] == ["encoder"] * 2 + ["decoder"] * 2
    assert [predicts_next(m) for m in (gpt, llama, bert, t5(), nn.Linear(2, 2))] == [True, True, False, False, False]


def test_blocks_of_other_modules() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    own = nn.ModuleDict({"embed": nn.Linear(3, 4), "layers": nn.ModuleList([block(), block()])})
    assert [b.path for b in find_blocks(own)] == ["layers.0", "layers.1"]
    assert find_blocks(own, (r"layers\.1",)) == [Block("layers.1")]
    assert find_blocks(networks.build("cnn-w4-s3", in_shape=(1, 8, 8), num_classes=3))
    with pytest.raises(InputError, match="no blocks are found in Linear"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no module's path matches 'h'"):
        find_blocks(own, ("h",))
    with pytest.raises(InputError, match="no regular expression"):
        find_blocks(own, ("(",))


def test_tokens_that_count() -> None:
    mask, labels = torch.tensor([[1, 1, 0]]), torch.tensor([[4, -100]])
    batch = Batch({"input_ids": torch.zeros(1, 3), "attention_mask": mask}, labels)
    assert valid_tokens(Block("e"), batch) is mask
    assert valid_tokens(Block("d", "decoder"), batch).tolist() == [[True, False]]
    assert valid_tokens(Block("e"), Batch(torch.zeros(1, 3))) is None


def test_decoders_take_labels_one_place_later() -> None:
    batch = Batch(torch.ones(1, 4, dtype=torch.long), torch.tensor([[5, 6, 1, -100, -100]]))
    made = with_decoder_inputs(t5(), batch)
    assert made.inputs["decoder_input_ids"].tolist() == [[0, 5, 6, 1, 0]]
    assert with_decoder_inputs(t5(), made) is not None
    assert with_decoder_inputs(nn.Linear(2, 2), batch) is batch
    model = t5()
    model.config.decoder_start_token_id = None
    with pytest.raises(InputError, match="give decoder_input_ids"):
        with_decoder_inputs(model, batch)
    own = Batch({"input_ids": batch.inputs, "decoder_input_ids": batch.labels}, batch.labels)
    assert with_decoder_inputs(t5(), own).inputs["decoder_input_ids"] is batch.labels

"""Language models export to ONNX as functions from token ids to logits, and their zeros stay zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from limbeck import networks
from limbeck.adapters.export import export_onnx
from limbeck.adapters.token_export import FromTokens, takes_tokens, token_sample
from limbeck.methods.compression import SquareHead

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", ["gpt-d16-l2-h2", "llama-d16-l2-h2", "berttagger-d16-l2-h2-v11"])
def test_models_of_tokens_become_onnx(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = networks.build(name, in_shape=(8,), num_classes=11)
    method = SquareHead(model, networks.build(name, in_shape=(8,), num_classes=11), sparsity=0.75)
    method.prune()
    sample = token_sample(model, 8)
    assert takes_tokens(model) and sample.max() < 11
    path = export_onnx(FromTokens(method.compressed()), sample, tmp_path / "model.onnx")
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    zeros = sum(int((w == 0).sum()) for w in weights.values() if w.ndim == 2)
    assert zeros >= 0.75 * method.held.masks().size


def test_other_models_take_no_tokens() -> None:
    assert not takes_tokens(nn.Linear(2, 2))
    t5 = hf.T5Config(vocab_size=12, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    assert not takes_tokens(hf.T5ForConditionalGeneration(t5))

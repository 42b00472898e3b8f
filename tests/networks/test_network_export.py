from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from limbeck.networks import build

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TINY = [
    "convnet-w8-d3",
    "convnet-w8-d2-batch",
    "convnet-w8-d2-layer",
    "cnn-w4-s3",
    "resnet8",
    "wrn-10-1",
    "vit-d16-l2-h4-p4",
    "mixer-d16-l2-p4",
    "mlp-32-16",
]


def onnx_error(name: str, path: Path, dynamo: bool) -> float:
    torch.manual_seed(0)
    net = build(name, in_shape=(1, 8, 8), num_classes=4)
    net.train()(torch.randn(16, 1, 8, 8))  # batch norms with statistics other than 0 and 1
    net.eval()
    x = torch.randn(3, 1, 8, 8)
    batch = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), path, input_names=["x"], dynamo=dynamo, verbose=False, **batch)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    more = torch.randn(5, 1, 8, 8)
    (logits,) = session.run(None, {"x": more.numpy()})
    assert logits.shape == (5, 4)
    return (torch.from_numpy(logits) - net(more)).abs().max().item()


@pytest.mark.parametrize("name", TINY)
def test_onnx_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    assert onnx_error(name, tmp_path / "net.onnx", dynamo=False) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_onnx_by_torch_export_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    assert onnx_error(name, tmp_path / "net.onnx", dynamo=True) < 1e-4

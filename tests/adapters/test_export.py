"""Exports agree with the original, and a file that does not is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import limbeck
from limbeck import networks
from limbeck.adapters.export import export_artifact, export_onnx
from limbeck.core.errors import InputError, RunError
from limbeck.networks.artifacts import save_model

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", ["cnn-w4-s2", "mlp-16", "mixer-d16-l2-p2", "vit-d16-l2-h2-p2"])
def test_an_artifact_exports_and_agrees(tmp_path: Path, name: str) -> None:
    import onnxruntime

    model = networks.build(name, in_shape=(1, 8, 8), num_classes=10).eval()
    save_model(model, tmp_path, {"method": "kd"})
    file = export_artifact(tmp_path, "onnx")
    x = torch.randn(7, 1, 8, 8)
    found = onnxruntime.InferenceSession(str(file)).run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-4)


def test_safetensors_hold_the_students_keys_and_nothing_else(tmp_path: Path) -> None:
    model = networks.build("cnn-w4-s2", in_shape=(1, 8, 8), num_classes=10)
    save_model(model, tmp_path, {})
    stored = load_file(export_artifact(tmp_path, "safetensors", tmp_path / "x.safetensors"))
    assert set(stored) == set(model.state_dict())
    again = limbeck.load(tmp_path)
    assert again.kind == "model"
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(again.content(x), model.eval()(x))


class Sly(nn.Module):
    """Computes something else while it is being traced, as a model with data-dependent branches does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (1.0 if torch.jit.is_tracing() else 0.0)


def test_a_file_that_disagrees_is_not_kept(tmp_path: Path) -> None:
    model = Sly().train()
    with pytest.raises(RunError, match="disagrees with the model"):
        export_onnx(model, torch.randn(2, 4), tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []
    assert model.training


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    save_model(nn.Linear(4, 3), tmp_path, {})
    with pytest.raises(InputError, match="pass model=…"):
        export_artifact(tmp_path, "onnx")
    with pytest.raises(RunError, match="no artifact in"):
        export_artifact(tmp_path / "nowhere", "onnx")


def test_loading_fills_a_users_module_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    source = nn.Linear(4, 3)
    save_model(source, tmp_path, {})
    filled = limbeck.load(tmp_path, model=nn.Linear(4, 3)).content
    assert torch.equal(filled.weight, source.weight)
    with pytest.raises(RunError, match="does not fit Linear"):
        limbeck.load(tmp_path, model=nn.Linear(4, 5))
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(RunError, match="not a safetensors file"):
        limbeck.load(tmp_path, model=nn.Linear(4, 3))


def test_a_factory_is_not_imported_unasked(tmp_path: Path) -> None:
    model = networks.build("tests.adapters.test_export:Small", in_shape=(1, 8, 8), num_classes=10)
    save_model(model, tmp_path, {})
    with pytest.raises(InputError, match="allow_import=True"):
        limbeck.load(tmp_path)
    assert isinstance(limbeck.load(tmp_path, allow_import=True).content, Small)


class Small(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))

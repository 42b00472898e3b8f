"""ONNX files in 8-bit integers: weights are int8, answers are the float model's, and bad files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck import cli, networks
from limbeck.adapters.export import export_artifact
from limbeck.adapters.onnx_int8 import export_onnx_int8
from limbeck.core.errors import InputError, RunError
from limbeck.networks.artifacts import save_model
from limbeck.tasks.calibration import calibration_inputs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = networks.build(name, in_shape=(1, 8, 8), num_classes=10), torch.randn(160, 1, 8, 8)
    model.train()
    model(x)
    return model.eval(), x


@pytest.mark.parametrize(("name", "calibrate"), [("cnn-w8-s2", True), ("mlp-64", False)])
def test_weights_are_int8_and_answers_agree(tmp_path: Path, name: str, calibrate: bool) -> None:
    model, x = network(name)
    file = export_onnx_int8(model, x[:100], tmp_path / "m.onnx", calibrate=calibrate, check=x[100:])
    graph = onnx.load(file)
    kinds = {t.data_type for t in graph.graph.initializer if len(t.dims) > 1}
    assert kinds == {onnx.TensorProto.INT8}
    said = {p.key: p.value for p in graph.metadata_props}
    assert said["limbeck.quantisation"] == ("static" if calibrate else "dynamic")
    found = onnxruntime.InferenceSession(str(file)).run(None, {"input": x[100:].numpy()})[0]
    same = (torch.tensor(found).argmax(1) == model(x[100:]).argmax(1)).float().mean().item()
    assert same >= 0.9
    assert float(said["limbeck.agreement"]) == pytest.approx(same, abs=1e-3)


def test_an_artifact_exports(tmp_path: Path) -> None:
    model, x = network("cnn-w8-s2")
    save_model(model, tmp_path, {"method": "kd"})
    assert export_artifact(tmp_path, "onnx-int8", samples=x).name == "student-int8.onnx"


def test_a_file_that_disagrees_is_not_kept(tmp_path: Path) -> None:
    """Ranges from inputs a thousand times too small."""
    model, x = network("cnn-w8-s2")
    with pytest.raises(RunError, match=r"of 60 samples only \(wanted 90%\): not kept"):
        export_onnx_int8(model, x[:100] / 1000, tmp_path / "m.onnx", check=x[100:])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="two samples"):
        export_onnx_int8(model, x[:1], tmp_path / "m.onnx")
    with pytest.raises(RunError, match="convolutions need them"):
        export_onnx_int8(nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()), x, tmp_path / "m.onnx", calibrate=False)


def test_a_runs_training_data_calibrates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibration_inputs(tmp_path) is None
    folder = tmp_path / "run"
    asked = ["run", "supervised", "--out", str(folder), "--student", "cnn-w4-s2", "--steps", "150", "--no-progress"]
    assert cli.main([*asked, "--no-report"]) == 0
    inputs = calibration_inputs(folder, 40)
    assert inputs is not None
    assert inputs.shape == (40, 1, 8, 8)
    assert cli.main(["export", str(folder), "--to", "onnx-int8"]) == 0
    assert "student-int8.onnx" in capsys.readouterr().out
    graph = onnx.load(folder / "student-int8.onnx")
    assert {p.key: p.value for p in graph.metadata_props}["limbeck.quantisation"] == "static"

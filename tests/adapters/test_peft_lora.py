from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")

from limbeck.adapters.diffusers_transformers import wrap
from limbeck.adapters.peft_lora import load_lora, save_lora
from limbeck.blocks.lora import LoRA
from limbeck.core.errors import InputError, RunError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import VPDiscrete
from tests.adapters import tiny_pipelines as tiny

torch.set_num_threads(1)


class Net(nn.Module):
    """Layers whose paths end alike, a strided convolution, and one with groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.fc = nn.Linear(16, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.grouped(self.conv(x)).flatten(1)
        return self.block["fc"](torch.relu(self.fc(hidden)))


def filled(lora: LoRA, seed: int = 0) -> LoRA:
    torch.manual_seed(seed)
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.3)
    return lora


X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3.0, 700.0])
LATENTS, TEXT = torch.randn(2, 4, 8, 8), torch.randn(2, 5, tiny.WIDTH)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("scale", [None, 0.25])
def test_peft_reads_what_is_written(tmp_path: Path, scale: float | None) -> None:
    lora = filled(LoRA(Net(), 2, alpha=6.0))
    if scale is not None:
        lora.scale = scale
    expected = lora(X)
    save_lora(tmp_path, lora, base="my/model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == (6 if scale is None else 0.5)
    assert config["base_model_name_or_path"] == "my/model"
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(theirs(X), expected)
    assert not torch.allclose(expected, Net()(X), atol=1e-2)
    again = load_lora(tmp_path, Net())
    torch.testing.assert_close(again(X), expected)
    assert again.paths == lora.paths and again.scale == pytest.approx(lora.scale)
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_only_the_adapted_layers_match(tmp_path: Path) -> None:
    lora = filled(LoRA(Net(), 2, targets=["block.fc"]))
    save_lora(tmp_path, lora)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    adapted = {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert adapted == {"base_model.model.block.fc"}
    torch.testing.assert_close(theirs(X), lora(X))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_groups_that_are_mixed_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["grouped"], init_lora_weights=False)
    peft.get_peft_model(Net(), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'grouped' mix the groups"):
        load_lora(tmp_path, Net())


@pytest.mark.parametrize("rslora", [False, True])
def test_reads_what_peft_writes(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["fc", "conv"], init_lora_weights=False, use_rslora=rslora
    )
    theirs = peft.get_peft_model(Net(), config)
    theirs.save_pretrained(tmp_path)
    mine = load_lora(tmp_path, Net())
    assert set(mine.paths) == {"conv", "fc", "block.fc"}
    torch.testing.assert_close(mine(X), theirs.eval()(X))


def test_diffusers_reads_it_and_back(tmp_path: Path) -> None:
    denoiser = Denoiser(wrap(tiny.text_unet()), VPDiscrete("scaled_linear"))
    lora = filled(LoRA(denoiser, 2, alpha=8.0, targets=["to_q", "to_out", "conv_in"]))
    expected = denoiser.module(LATENTS, T, TEXT)
    save_lora(tmp_path, lora)
    assert all(name.startswith("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert all(name.startswith("unet.") for name in load_file(tmp_path / "pytorch_lora_weights.safetensors"))

    theirs = tiny.text_unet()
    assert not torch.allclose(theirs(LATENTS, T, TEXT).sample, expected, atol=1e-2)
    theirs.load_lora_adapter(tmp_path, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(theirs(LATENTS, T, TEXT).sample, expected, rtol=1e-4, atol=1e-5)
    wrapped = peft.PeftModel.from_pretrained(tiny.text_unet(), tmp_path)
    torch.testing.assert_close(wrapped(LATENTS, T, TEXT).sample, expected, rtol=1e-4, atol=1e-5)

    plain = tiny.text_unet()
    kept = load_lora(tmp_path, plain)
    assert kept.paths == tuple(path.removeprefix("module.network.") for path in lora.paths)
    torch.testing.assert_close(plain(LATENTS, T, TEXT).sample, expected)
    (tmp_path / "adapter_config.json").unlink()
    other = wrap(tiny.text_unet())
    again = load_lora(tmp_path, other)  # from the file of diffusers, onto a wrapper
    torch.testing.assert_close(other(LATENTS, T, TEXT), expected)
    assert again.scale == 4.0 and again.base is other


def test_the_pipeline_loads_it(tmp_path: Path) -> None:
    pipeline = tiny.stable_diffusion(tmp_path / "tokenizer")
    lora = filled(LoRA(pipeline.unet, 2, alpha=4.0, targets=["to_k", "to_v"]))
    expected = pipeline.unet(LATENTS, T, TEXT).sample
    save_lora(tmp_path / "lora", lora)
    lora.remove()
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(pipeline.unet(LATENTS, T, TEXT).sample, expected, rtol=1e-4, atol=1e-5)


def test_refuses_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no adapters in .*: expected adapter_config\.json"):
        load_lora(tmp_path, Net())
    save_lora(tmp_path, filled(LoRA(Net(), 2, targets=["fc"])))
    with pytest.raises(InputError, match=r"Linear has no layer 'block.fc': the adapters are for another model"):
        load_lora(tmp_path, nn.Linear(2, 2))
    narrow = Net()
    narrow.fc = nn.Linear(16, 5)
    with pytest.raises(InputError, match=r"the adapters of 'fc' have shape \(6, 2\), its layer needs \(5, 2\)"):
        load_lora(tmp_path, narrow)
    assert all(p.requires_grad for p in narrow.parameters())
    with pytest.raises(InputError, match="single layer that is the whole module"):
        save_lora(tmp_path, LoRA(nn.Linear(2, 2), 1))
    with pytest.raises(InputError, match="pads with 'circular'"):
        save_lora(tmp_path, LoRA(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")), 1))
    with pytest.raises(InputError, match=r"has dilation \(2, 2\)"):
        save_lora(tmp_path, LoRA(nn.Sequential(nn.Conv2d(2, 2, 3, dilation=2)), 1))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    state = load_file(tmp_path / "adapter_model.safetensors")

    def changed(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **settings}))
        save_file(tensors, tmp_path / "adapter_model.safetensors")

    first = next(iter(state))
    for settings, tensors, line in (
        ({"use_dora": True}, state, "only plain LoRA"),
        ({"peft_type": "LOHA"}, state, "LOHA"),
        ({"rank_pattern": {"fc": 3}}, state, "of its own for some layers"),
        (
            {},
            {**state, "base_model.model.fc.lora_magnitude_vector": torch.ones(1)},
            "which plain LoRA adapters have not",
        ),
    ):
        changed(settings, tensors)
        with pytest.raises(InputError, match=line):
            load_lora(tmp_path, Net())
    changed({}, {first: state[first]})
    with pytest.raises(RunError, match="has only lora_"):
        load_lora(tmp_path, Net())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RunError, match="is not a safetensors file"):
        load_lora(tmp_path, Net())
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="does not exist"):
        load_lora(tmp_path, Net())

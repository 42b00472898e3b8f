from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.networks import build, names, rebuild, spec_of

DIGITS = (1, 8, 8)


def digits(name: str) -> nn.Module:
    return build(name, in_shape=DIGITS, num_classes=10)


def test_names_cost_no_torch_import() -> None:
    code = "import sys; from limbeck.networks import names; names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_are_unique_and_sized() -> None:
    assert len(set(names())) == len(names())
    assert {"resnet20", "wrn-40-2", "mlp-256-256", "vit-d64-l6-h4-p2"} <= set(names())


def test_options_reach_the_network() -> None:
    net = digits("convnet-d2-w12-batch")  # keys in any order
    assert [type(layer) for layer in net.blocks[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AvgPool2d]
    assert len(net.blocks) == 2 and net.blocks[1][0].out_channels == 12
    assert [digits("cnn-w4-s2-b3").stages[i][0].out_channels for i in range(2)] == [4, 8]
    assert len(digits("cnn-w4-s2-b3").stages[1]) == 9
    assert [layer[0].out_features for layer in digits("mlp-32-16-8").layers] == [32, 16, 8]
    assert digits("mlp").feature_dim == 256
    mixer = digits("mixer-d24-l3-p4")
    assert (mixer.feature_dim, len(mixer.blocks), mixer.grid) == (24, 3, (2, 2))
    vit = digits("vit-l2-d24-h3-p4")
    assert (vit.config.hidden_size, vit.config.num_hidden_layers, vit.config.num_attention_heads) == (24, 2, 3)


@pytest.mark.parametrize(
    ("name", "near"),
    [("convent-w16-d3", "convnet-w16-d3"), ("ResNet20", "resnet20"), ("vitt-d64-l6-h4-p2", "vit-d64-l6-h4-p2")],
)
def test_unknown_family_lists_near_names(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        digits(name)
    assert near in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("convnet-q3", "convnet[-w<width>]"),
        ("convnet-w16-w32", "convnet[-w<width>]"),
        ("convnet-w", "convnet[-w<width>]"),
        ("convnet-16", "convnet[-w<width>]"),
        ("convnet-batch-layer", "convnet[-w<width>]"),
        ("convnet-w16-", "convnet[-w<width>]"),
        ("convnet-w16--d3", "convnet[-w<width>]"),
        ("convnet-w1.5", "convnet[-w<width>]"),
        ("resnet", "resnet<depth>"),
        ("wrn-40", "wrn-<depth>-<widening>"),
        ("wrn-40-2-3", "wrn-<depth>-<widening>"),
        ("mlp-w3", "mlp[-<width>...]"),
    ],
)
def test_unreadable_options_show_the_form(name: str, form: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        digits(name)
    assert form in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "-w3", "128"])
def test_names_without_a_family(name: str) -> None:
    with pytest.raises(UnknownNameError, match="Families are convnet"):
        digits(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("convnet-d4", "depth 4 shrinks a 8x8 image below 1x1"),
        ("cnn-s5", "4 stages at most"),
        ("resnet21", "6n \\+ 2"),
        ("resnet2", "6n \\+ 2"),
        ("wrn-20-2", "6n \\+ 4"),
        ("vit-p3", "patch size 3 does not divide the image size 8x8; choose one of 1, 2, 4, 8"),
        ("mixer-p5", "patch size 5 does not divide the image size 8x8"),
        ("vit-d10-h4-p2", "4 attention heads do not divide the width 10"),
        ("convnet-w0", "'w0'"),
        ("mlp-0", "'0'"),
    ],
)
def test_sizes_that_do_not_fit(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        digits(name)


def test_wrong_shapes_and_class_counts() -> None:
    for in_shape, num_classes in [((), 10), ((1, 8, 0), 10), (DIGITS, 0)]:
        with pytest.raises(InputError):
            build("mlp-8", in_shape=in_shape, num_classes=num_classes)
    with pytest.raises(InputError, match=r"CNN takes inputs of shape \(channels, height, width\), not \(14,\).*mlp"):
        build("cnn-w8-s3", in_shape=(14,), num_classes=2)


def test_a_perceptron_takes_rows_of_a_table() -> None:
    assert build("mlp-8", in_shape=(14,), num_classes=2)(torch.zeros(3, 14)).shape == (3, 2)


def test_spec_rebuilds_the_same_network() -> None:
    net = build("convnet-w8-d2", in_shape=(3, 12, 8), num_classes=5)
    spec = spec_of(net)
    assert spec == {"name": "convnet-w8-d2", "in_shape": [3, 12, 8], "num_classes": 5}
    assert net.limbeck_name == "convnet-w8-d2"
    again = rebuild(json.loads(json.dumps(spec)))
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 12, 8)
    torch.testing.assert_close(again(x), net(x))
    spec["in_shape"][0] = 99
    assert spec_of(net)["in_shape"] == [3, 12, 8]


def test_spec_of_foreign_modules_and_broken_specs() -> None:
    assert spec_of(nn.Linear(2, 2)) is None
    with pytest.raises(InputError, match="lacks in_shape, num_classes"):
        rebuild({"name": "mlp-8"})


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_nets.py").write_text(
        "import math\n"
        "import torch.nn as nn\n"
        "class Both(nn.Module):\n"
        "    def __init__(self, num_classes, in_shape, width=4):\n"
        "        super().__init__()\n"
        "        self.line = nn.Linear(math.prod(in_shape), num_classes)\n"
        "    def forward(self, x):\n"
        "        return self.line(x.flatten(1))\n"
        "def neither():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "def classes(num_classes=1000):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "def like_torchvision(*, weights=None, **kwargs):\n"
        "    return classes(**kwargs)\n"
        "def needs_more(depth):\n"
        "    return nn.Identity()\n"
        "def no_module(in_shape):\n"
        "    return 3\n"
        "constant = 4\n"
        "class Space:\n"
        "    make = staticmethod(neither)\n"
    )
    (tmp_path / "users_broken.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "users_syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for module in ("users_nets", "users_broken", "users_syntax"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return "users_nets"


@pytest.mark.parametrize("factory", ["Both", "neither", "classes", "like_torchvision", "Space.make"])
def test_users_factories(users_module: str, factory: str) -> None:
    name = f"{users_module}:{factory}"
    net = digits(name)
    assert net(torch.randn(2, *DIGITS)).shape == (2, 10)
    assert spec_of(net) == {"name": name, "in_shape": [1, 8, 8], "num_classes": 10}
    assert type(rebuild(spec_of(net))) is type(net)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("users_absent:Net", "cannot import 'users_absent'"),
        ("users_broken:Net", "a_library_that_is_not_there"),
        ("users_syntax:Net", "SyntaxError"),
        ("users_nets:Bothh", "no attribute 'Bothh'; did you mean Both"),
        ("users_nets:constant", "must be callable"),
        ("users_nets:no_module", "returned int, not a torch.nn.Module"),
        ("users_nets:needs_more", "missing 1 required positional argument: 'depth'"),
        (":Net", "package.module:factory"),
        ("users_nets:", "package.module:factory"),
    ],
)
def test_broken_factories_fail_in_one_line(users_module: str, name: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        digits(name)
    assert says in str(caught.value) and "\n" not in str(caught.value)

"""Cell networks and residual networks with a depth for each stage, and the spaces of both."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.blocks.search_spaces import SearchSpace
from limbeck.core.artifacts import load
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.metrics.cost import count_parameters
from limbeck.networks import build, rebuild, spec_of
from limbeck.networks.artifacts import save_model
from limbeck.networks.cells import Cell, cell_digits, cell_operations, cell_text
from limbeck.networks.spaces import cell_space, depth_space, named_space


def test_a_cell_is_the_sum_over_edges():
    torch.manual_seed(0)
    cell = Cell(3, ["nor_conv_3x3", "skip_connect", "avg_pool_3x3", "none", "nor_conv_1x1", "skip_connect"]).eval()
    x = torch.randn(2, 3, 5, 5)
    first = cell.edges["0_1"](x)
    second = x + nn.functional.avg_pool2d(first, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(cell(x), cell.edges["1_3"](first) + second)


@pytest.mark.parametrize("operations", [["none"] * 6, ["nor_conv_3x3", "none", "none", "none", "none", "skip_connect"]])
def test_a_cell_without_a_way_through_gives_zeros(operations: list[str]):
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(Cell(3, operations)(x), torch.zeros_like(x))


def test_sizes_are_those_of_the_benchmark():
    # NAS-Bench-201 gives 1.53 M parameters for the network of 3x3 convolutions throughout on CIFAR-100
    largest = build("cell-444444-w16-n5-s3", in_shape=(3, 32, 32), num_classes=100)
    assert count_parameters(largest) == pytest.approx(1.53e6, rel=0.01)
    deep = build("stageresnet-9-9-9", in_shape=(3, 32, 32), num_classes=100)
    same = build("resnet56", in_shape=(3, 32, 32), num_classes=100)
    assert count_parameters(deep) == count_parameters(same)


def test_architectures_of_the_benchmark_are_read():
    text = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_3x3~2|"
    assert cell_text(cell_digits(text)) == text
    assert cell_operations(413254) == [
        "nor_conv_3x3",
        "none",
        "nor_conv_1x1",
        "skip_connect",
        "avg_pool_3x3",
        "nor_conv_3x3",
    ]
    assert cell_digits(text) == 413254
    with pytest.raises(InputError, match="no cell of NAS-Bench-201"):
        cell_digits("|nor_conv_3x3~0|+|none~0|")
    with pytest.raises(InputError, match="6 digits"):
        build("cell-466666", in_shape=(1, 8, 8), num_classes=10)


@pytest.mark.parametrize("made", [cell_space((1, 8, 8), 10, width=4), depth_space((1, 8, 8), 10, width=4)])
def test_members_are_built_by_name_and_come_back_from_artifacts(made, tmp_path):
    code = made.space.sample(torch.Generator().manual_seed(3))
    network = made.space.build(code)
    x = torch.randn(3, 1, 8, 8)
    network(x)
    again = rebuild(spec_of(network))
    assert [p.shape for p in again.parameters()] == [p.shape for p in network.parameters()]
    save_model(network, tmp_path, {})
    network.eval()
    torch.testing.assert_close(load(tmp_path).content(x), network(x))
    teacher = build(made.teacher, in_shape=(1, 8, 8), num_classes=10)
    assert teacher.feature_dim == network.feature_dim
    assert count_parameters(teacher) > max(
        count_parameters(made.space.build(c)) for c in [code, tuple(3 for _ in code)]
    )


def test_spaces_have_the_published_sizes():
    assert len(cell_space((1, 8, 8), 10).space) == 15625
    assert len(depth_space((1, 8, 8), 10).space) == 64
    depths = depth_space((1, 8, 8), 10, width=4).space
    assert [len(stage) for stage in depths.build(depths.code(stage1=1, stage2=5, stage3=7)).stages] == [1, 5, 7]


def own_space(in_shape, num_classes):
    return SearchSpace("own", {"bias": (True, False)}, lambda bias: nn.Linear(4, num_classes, bias=bias))


def test_spaces_by_name():
    listed = named_space("mlp-8, mlp-16-16", (1, 8, 8), 10).space
    assert len(listed) == 2 and listed.build((1,)).limbeck_name == "mlp-16-16"
    assert named_space("tests.networks.test_cells:own_space", (4,), 3).space.build((0,)).out_features == 3
    with pytest.raises(UnknownNameError, match="search space 'cell'"):
        named_space("cell", (1, 8, 8), 10)
    with pytest.raises(UnknownNameError, match="network 'mlpp'"):
        named_space("mlp-8,mlpp", (1, 8, 8), 10)
    with pytest.raises(InputError, match="not a SearchSpace"):
        named_space("builtins:dict", (1, 8, 8), 10)

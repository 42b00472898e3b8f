from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.blocks.exits import ConvExit, PatchMerging, SepConv, TokenExit, make_exit, merge_count
from limbeck.core.errors import InputError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sep_conv_parameters(a: int, b: int) -> int:
    return 9 * a + a * a + 2 * a + 9 * a + a * b + 2 * b


@pytest.mark.parametrize(("size", "out"), [(8, 4), (7, 4), (2, 1), (1, 1)])
def test_sep_conv_halves_the_map(size: int, out: int) -> None:
    block = SepConv(6, 10)
    assert block(torch.randn(3, 6, size, size)).shape == (3, 10, out, out)
    assert sum(p.numel() for p in block.parameters()) == sep_conv_parameters(6, 10)
    assert [conv.bias for conv in block.layers if isinstance(conv, nn.Conv2d)] == [None] * 4


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_conv_exits_deepen_towards_the_input(num_stages: int) -> None:
    for k in range(1, num_stages + 1):
        branch = make_exit((5, 8, 16, 16), k, num_stages, out_width=40, num_classes=7)
        assert isinstance(branch, ConvExit)
        blocks = [m for m in branch.modules() if isinstance(m, SepConv)]
        assert len(blocks) == num_stages - k
        widths = [(block.layers[0].in_channels, block.layers[5].out_channels) for block in blocks]
        doubling = [(8 * 2**j, 8 * 2 ** (j + 1)) for j in range(len(blocks))]
        assert widths == [*doubling[:-1], *((doubling[-1][0], 40) for _ in blocks[:1])]
        assert (branch.head.in_features, branch.head.out_features) == (40, 7)
        assert branch(torch.randn(5, 8, 16, 16)).shape == (5, 7)


def test_paper_stage_1_parameter_count() -> None:
    branch = ConvExit(64, 1, 4, 512, 100)
    expected = sep_conv_parameters(64, 128) + sep_conv_parameters(128, 256) + sep_conv_parameters(256, 512)
    assert sum(p.numel() for p in branch.parameters()) == expected + 512 * 100 + 100


def test_last_conv_exit_is_a_linear_map_of_the_mean() -> None:
    branch = ConvExit(6, 3, 3, 10, 4)
    x = torch.randn(2, 6, 5, 5)
    conv = branch.body[0]
    expected = branch.head(x.mean((2, 3)) @ conv.weight.flatten(1).T + conv.bias)
    torch.testing.assert_close(branch(x), expected)


@pytest.mark.parametrize(
    ("grid", "target", "count"),
    [
        ((14, 14), 7, 1),  # the paper's ViT: 224 / 16
        ((56, 56), 7, 3),
        ((7, 7), 7, 0),
        ((4, 4), 7, 0),
        ((16, 16), 7, 1),
        ((8, 8), 2, 2),
        ((4, 4), 1, 2),
        ((6, 6), 1, 1),  # 6 -> 3, and 3 is odd
        ((9, 9), 2, 0),
        ((8, 4), 2, 1),
    ],
)
def test_merge_count(grid: tuple[int, int], target: int, count: int) -> None:
    assert merge_count(grid, target) == count


def test_merge_count_is_the_floor_of_the_logarithm_on_powers_of_two() -> None:
    for exponent in range(8):
        for target in range(1, 20):
            expected = max(int(torch.log2(torch.tensor(2.0**exponent / target, dtype=torch.float64)).floor()), 0)
            assert merge_count((2**exponent, 2**exponent), target) == expected


def test_patch_merging_joins_the_right_neighbours() -> None:
    merge = PatchMerging(1, 4, (4, 6), activate=False)
    merge.norm = nn.Identity()
    merge.linear.weight.data = torch.eye(4)
    image = torch.arange(24.0).view(4, 6)
    out = merge(image.view(1, 24, 1)).view(2, 3, 4)
    for row in range(2):
        for column in range(3):
            square = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert out[row, column].tolist() == square.flatten().tolist()


def test_patch_merging_layers() -> None:
    merge = PatchMerging(6, 10, (4, 4))
    x = torch.randn(2, 16, 6)
    x4 = x.view(2, 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(2, 4, 24)
    normed = (x4 - x4.mean(-1, keepdim=True)) / (x4.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(merge(x), nn.functional.gelu(normed @ merge.linear.weight.T))
    with pytest.raises(InputError, match="3x4"):
        PatchMerging(6, 10, (3, 4))


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_token_exit(prefix: int, k: int) -> None:
    branch = make_exit((3, 64 + prefix, 12), k, 4, 16, 7, prefix_tokens=prefix, target_grid=2)
    assert isinstance(branch, TokenExit)
    assert len(branch.merging) == 2
    assert [type(m.activation) for m in branch.merging] == [nn.GELU, nn.Identity]
    assert [m.linear.in_features for m in branch.merging] == [48, 64]
    assert len(branch.blocks) == max(4 - k, 1)
    seen: list[torch.Size] = []
    branch.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    assert branch(torch.randn(3, 64 + prefix, 12)).shape == (3, 7)
    assert seen == [torch.Size((3, prefix + 4, 16))]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(("width", "out", "target"), [(8, 8, 2), (8, 12, 2), (8, 12, 4)])
def test_every_parameter_of_a_branch_gets_a_gradient(prefix: int, width: int, out: int, target: int) -> None:
    branch = make_exit((4, 16 + prefix, width), 2, 3, out, 5, prefix_tokens=prefix, target_grid=target)
    branch(torch.randn(4, 16 + prefix, width)).square().sum().backward()
    assert [name for name, p in branch.named_parameters() if p.grad is None] == []
    names = list(branch.state_dict())
    assert len({branch.state_dict()[name].data_ptr() for name in names}) == len(names)  # no shared storage to save


def test_prefix_tokens_skip_the_merging() -> None:
    branch = TokenExit(8, 4, 3, 3, 8, 5, prefix_tokens=1, target_grid=2)
    seen: list[torch.Tensor] = []
    branch.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, 17, 8)
    branch(x)
    torch.testing.assert_close(seen[0][:, :1], x[:, :1])
    torch.testing.assert_close(seen[0][:, 1:], branch.merging(x[:, 1:]))


def test_token_exit_reads_the_first_prefix_token_or_the_mean() -> None:
    x = torch.randn(2, 18, 8)
    for prefix in (0, 2):
        branch = TokenExit(8, (4, 4), 3, 3, 8, 5, prefix_tokens=prefix)
        part = x[:, : 16 + prefix]
        tokens = branch.blocks(part)
        torch.testing.assert_close(branch(part), branch.head(tokens[:, 0] if prefix else tokens.mean(1)))


@pytest.mark.parametrize(("width", "heads"), [(48, 4), (6, 3), (10, 2), (7, 1), (12, 4)])
def test_heads_divide_the_width(width: int, heads: int) -> None:
    branch = make_exit((2, 16, width), 1, 2, width, 3)
    assert branch.blocks[0].self_attn.num_heads == heads
    assert branch(torch.randn(2, 16, width)).shape == (2, 3)


def test_initialisation() -> None:
    for branch in (ConvExit(32, 1, 4, 256, 10), TokenExit(64, 8, 1, 4, 64, 10, target_grid=2, prefix_tokens=1)):
        for name, module in branch.named_modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                if module.weight.numel() > 2000 and module.groups == 1:
                    assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
            elif isinstance(module, nn.Linear):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.15), name
                assert module.bias is None or not module.bias.any()
            elif isinstance(module, nn.MultiheadAttention):
                assert module.in_proj_weight.std().item() == pytest.approx(0.02, rel=0.1), name
                assert not module.in_proj_bias.any()
            elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                assert (module.weight == 1).all() and not module.bias.any()


def test_rectangular_grids() -> None:
    branch = make_exit((2, 1 + 32, 8), 1, 3, 8, 4, prefix_tokens=1, grid=(8, 4), target_grid=2)
    assert len(branch.merging) == 1
    assert branch(torch.randn(2, 33, 8)).shape == (2, 4)


@pytest.mark.parametrize("shape", [(4, 8), (4,), (2, 3, 4, 5, 6)])
def test_other_features_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(B, C, H, W\) or tokens \(B, N, D\)"):
        make_exit(shape, 1, 3, 8, 4)


def test_wrong_grids_stages_and_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="17 patch tokens"):
        make_exit((2, 17, 8), 1, 3, 8, 4)
    with pytest.raises(InputError, match="prefix_tokens"):
        make_exit((2, 17, 8), 1, 3, 8, 4, prefix_tokens=1, grid=(4, 3))
    with pytest.raises(InputError, match="stage 4"):
        make_exit((2, 8, 4, 4), 4, 3, 8, 4)
    with pytest.raises(InputError, match="stage 0"):
        make_exit((2, 16, 8), 0, 3, 8, 4)
    with pytest.raises(InputError, match="num_classes"):
        make_exit((2, 8, 4, 4), 1, 3, 8, 0)
    with pytest.raises(InputError, match="target_grid"):
        make_exit((2, 16, 8), 1, 3, 8, 4, target_grid=0)
    with pytest.raises(InputError, match="negative"):
        TokenExit(8, 4, 1, 3, 8, 4, prefix_tokens=-1)
    with pytest.raises(InputError, match="reads 17 tokens"):
        make_exit((2, 17, 8), 1, 3, 8, 4, prefix_tokens=1)(torch.randn(2, 16, 8))

"""One-shot pruners: exact counts, n:m, the solver against a plain transcription and against magnitude, what cannot be cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from limbeck.blocks.one_shot_pruning import (
    Pattern,
    as_matrix,
    calibrated,
    check_prunable,
    collected_grams,
    fast_obc,
    from_matrix,
    lowest,
    magnitude,
    prunable,
)
from limbeck.core.errors import InputError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.33, 0.5, 0.9])
def test_magnitude_takes_exactly_the_smallest(share: float) -> None:
    weight = random(7, 12)
    kept = magnitude(weight, Pattern(share))
    gone = round(share * 84)
    assert int((~kept).sum()) == gone
    if gone:
        assert weight[~kept].abs().max() < weight[kept].abs().min()


def test_equal_weights_go_in_order() -> None:
    kept = magnitude(torch.ones(2, 4), Pattern(0.5))
    assert kept.tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (16, 32), (3, 3)])
def test_n_of_every_m_stay_and_they_are_the_largest(keep: int, of: int) -> None:
    weight = random(6, 96)
    kept = magnitude(weight, Pattern.parse(f"{keep}:{of}"))
    groups, sizes = kept.view(-1, of), weight.abs().view(-1, of)
    assert (groups.sum(1) == keep).all()
    assert bool((sizes.masked_fill(~groups, torch.inf).amin(1) >= sizes.masked_fill(groups, 0).amax(1)).all())


def test_what_was_pruned_stays_pruned() -> None:
    weight = random(5, 8)
    before = magnitude(weight, Pattern(0.5))
    weight[~before] = 9.0  # large again, but gone
    after = magnitude(weight, Pattern(0.75), before)
    assert not bool((after & ~before).any())
    assert int(after.sum()) == 10
    assert torch.equal(magnitude(weight, Pattern(0.25), before), before)


def test_patterns_are_read() -> None:
    assert Pattern.parse("2:4") == Pattern(0.5, 2, 4)
    assert str(Pattern.parse("2:4")) == "2:4"
    assert Pattern.parse(0.75).sparsity == Pattern.parse("0.75").sparsity == 0.75
    for wrong in (1.0, -0.1, "1.5"):
        with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\)"):
            Pattern.parse(wrong)
    with pytest.raises(InputError, match="keeps n of m weights"):
        Pattern.parse("5:4")
    with pytest.raises(InputError, match="such as 2:4"):
        Pattern.parse("half")
    with pytest.raises(InputError, match="4 divides, not 6 inputs"):
        lowest(random(2, 6), Pattern.parse("2:4"))


def reference(weight: Tensor, gram: Tensor, share: float, block: int, damp: float) -> Tensor:
    """SparseGPT as its pseudo-code has it, entry by entry."""
    w = weight.double().clone()
    h = gram.double() + damp * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    rows, columns = w.shape
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        scores = torch.stack([w[:, j] ** 2 / u[j, j] ** 2 for j in range(start, stop)], 1)
        order = scores.flatten().argsort(stable=True)[: round(share * scores.numel())]
        gone = torch.zeros(scores.numel(), dtype=torch.bool)
        gone[order] = True
        gone = gone.view(rows, stop - start)
        for j in range(start, stop):
            for i in range(rows):
                error = w[i, j] / u[j, j] if gone[i, j - start] else 0.0
                for k in range(j, columns):
                    w[i, k] -= error * u[j, k]
                if gone[i, j - start]:
                    w[i, j] = 0
    return w


def test_the_solver_is_the_published_one() -> None:
    weight, inputs = random(4, 10), random(50, 10, seed=1) @ random(10, 10, seed=2)
    gram = inputs.T @ inputs
    for block, damp in ((4, 0.01), (16, 1.0)):
        found, stays = fast_obc(weight, gram, Pattern(0.5), block=block, damp=damp)
        torch.testing.assert_close(found.double(), reference(weight, gram, 0.5, block, damp), rtol=1e-4, atol=1e-5)
        assert torch.equal(found != 0, stays)


@pytest.mark.parametrize("pattern", ["0.5", "0.75", "2:4"])
def test_the_solver_keeps_outputs_better_than_magnitude(pattern: str) -> None:
    weight, inputs = random(32, 64), random(500, 64, seed=1) @ random(64, 64, seed=2)
    chosen = Pattern.parse(pattern)
    found, stays = fast_obc(weight, inputs.T @ inputs, chosen, block=32)
    by_size = weight * magnitude(weight, chosen)
    assert float((~stays).double().mean()) == pytest.approx(chosen.sparsity, abs=0.01)
    if chosen.structured:
        assert (stays.view(-1, 4).sum(1) == 2).all()
    error = [float((inputs @ (w - weight).T).square().mean()) for w in (found, by_size)]
    assert error[0] < 0.85 * error[1]


def test_with_independent_inputs_the_solver_is_magnitude() -> None:
    weight = random(6, 8)
    found, stays = fast_obc(weight, 3 * torch.eye(8), Pattern(0.5), block=8)
    assert torch.equal(stays, magnitude(weight, Pattern(0.5)))
    torch.testing.assert_close(found, weight * stays)


def test_the_solver_never_brings_weights_back() -> None:
    weight, inputs = random(8, 16), random(100, 16, seed=1) @ random(16, 16, seed=2)
    gram = inputs.T @ inputs
    first, stays = fast_obc(weight, gram, Pattern(0.5), block=8)
    second, less = fast_obc(first, gram, Pattern(0.75), stays, block=8)
    assert not bool((less & ~stays).any())
    assert torch.equal(second != 0, less)


def test_dead_inputs_are_pruned_and_nothing_breaks() -> None:
    inputs = random(50, 6, seed=1)
    inputs[:, 2] = 0
    found, _ = fast_obc(random(3, 6), inputs.T @ inputs, Pattern(0.5), block=6)
    assert torch.isfinite(found).all() and not found[:, 2].any()
    with pytest.raises(InputError, match="are all 0"):
        fast_obc(random(3, 6), torch.zeros(6, 6), Pattern(0.5))
    with pytest.raises(InputError, match="5 features do not belong to a layer that takes 6"):
        fast_obc(random(3, 6), torch.eye(5), Pattern(0.5))


def test_layers_are_matrices() -> None:
    for layer, inputs, shape in (
        (nn.Linear(5, 3), random(7, 4, 5), (3, 5)),
        (Conv1D(3, 5), random(7, 4, 5), (3, 5)),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1), random(7, 2, 6, 6), (3, 18)),
    ):
        matrix = as_matrix(layer)
        assert prunable(layer) and matrix.shape == shape
        torch.testing.assert_close(from_matrix(layer, matrix), layer.weight.detach())
        with collected_grams({"layer": layer}) as grams:
            output = layer(inputs)
            layer(inputs)  # a second call adds up
        gram = grams["layer"] / 2
        bias = layer.bias.view(-1, *[1] * (output.ndim - 2)) if isinstance(layer, nn.Conv2d) else layer.bias
        power = (output - bias).double().square().sum()
        torch.testing.assert_close((matrix.double() @ gram * matrix.double()).sum(), power, rtol=1e-4, atol=1e-4)
        assert not layer._forward_pre_hooks


def test_grams_are_collected_group_after_group() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = {"0": net[0], "1": net[1]}
    x = random(9, 4)
    seen = []
    for grams in calibrated(layers, [["0"], ["1"]], lambda: net(x)):
        seen.append(list(grams))
        with torch.no_grad():
            net[0].weight.zero_()
            net[0].bias.fill_(1.0)
    assert seen == [["0"], ["1"]]
    torch.testing.assert_close(grams["1"], torch.full((4, 4), 9.0, dtype=torch.float64))
    with pytest.raises(InputError, match="'1' is not called"):
        list(calibrated(layers, [["1"]], lambda: net[0](x)))


def test_layers_that_cannot_be_cut_are_named() -> None:
    tied = nn.ModuleDict({"embed": nn.Embedding(6, 6), "head": nn.Linear(6, 6, bias=False)})
    tied["head"].weight = tied["embed"].weight
    with pytest.raises(InputError, match="'head' shares its weight with 'embed'"):
        check_prunable({"head": tied["head"]}, Pattern(0.5), tied.named_modules())
    net = nn.Sequential(nn.Linear(6, 2))
    with pytest.raises(InputError, match="'0' has 6 inputs, which 4 does not divide: 2:4"):
        check_prunable({"0": net[0]}, Pattern.parse("2:4"), net.named_modules())
    with pytest.raises(InputError, match="leaves nothing of layer '0' with its 12 weights"):
        check_prunable({"0": net[0]}, Pattern(0.99), net.named_modules())
    with pytest.raises(InputError, match="'0' has groups"), collected_grams({"0": nn.Conv2d(4, 4, 1, groups=2)}):
        pass
    conv = nn.Conv1d(2, 2, 1)
    with pytest.raises(InputError, match="'c' is a convolution that cannot be cut"), collected_grams({"c": conv}):
        conv(random(1, 2, 3))

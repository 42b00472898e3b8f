"""Packed matrices: exact round trips, bits by the formula, files, damage."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from limbeck.blocks.one_shot_pruning import Pattern, magnitude
from limbeck.blocks.sparse_containers import fill_from_packed, load_packed, own_tensors, pack, save_packed
from limbeck.blocks.storage import Storage
from limbeck.core.errors import InputError, RunError


def sparse(rows: int, columns: int, pattern: str) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return weight * magnitude(weight, Pattern.parse(pattern))


@pytest.mark.parametrize("form", ["bitmask", "csr", "nm", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrices_come_back_to_the_bit(form: str, dtype: torch.dtype) -> None:
    for pattern, nm in (("2:4", (2, 4)), ("3:7", (3, 7)), ("0.9", None)):
        if form == "nm" and nm is None:
            continue
        matrix = sparse(9, 28, pattern)
        matrix[3] = 0  # a row of nothing
        packed = pack(matrix, form, dtype, nm)
        assert torch.equal(packed.unpacked(), matrix.to(dtype))
        assert packed.bits == 8 * sum(t.numel() * t.element_size() for t in packed.tensors.values())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.float16, 16)])
def test_a_bitmask_takes_one_bit_more_than_the_values(share: float, dtype: torch.dtype, bits: int) -> None:
    packed = pack(sparse(40, 40, str(share)), "bitmask", dtype)
    assert packed.bits == pytest.approx(1600 * ((1 - share) * bits + 1), abs=1e-6)


def test_other_forms_take_what_they_say() -> None:
    assert pack(sparse(10, 40, "0.9"), "csr").bits == 40 * (32 + 16) + 32 * 11
    assert pack(sparse(8, 64, "2:4"), "nm", torch.float16, (2, 4)).bits == 8 * 64 / 4 * 2 * (16 + 2)
    assert pack(sparse(8, 64, "16:32"), "nm", torch.float16, (16, 32)).bits == 8 * 64 / 32 * 16 * (16 + 5)


def test_the_smallest_form_is_chosen() -> None:
    assert pack(sparse(64, 64, "0.75")).form == "bitmask"
    assert pack(sparse(64, 64, "0.99")).form == "csr"
    assert pack(sparse(64, 64, "1:4"), pattern=(1, 4)).form == "1:4"


def test_wide_matrices_have_unsigned_column_numbers() -> None:
    for columns in (1 << 16, (1 << 16) + 1):
        matrix = torch.zeros(2, columns)
        matrix[0, [0, 40_000, columns - 1]] = torch.tensor([1.0, 2.0, 3.0])
        packed = pack(matrix, "csr")
        assert torch.equal(packed.unpacked(), matrix)
        assert packed.tensors["columns"].element_size() == (2 if columns == 1 << 16 else 4)


def test_forms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="not 2:4 sparse"):
        pack(torch.ones(2, 4), "nm", pattern=(2, 4))
    with pytest.raises(InputError, match="prune to a pattern such as 2:4"):
        pack(torch.ones(2, 4), "nm")
    with pytest.raises(InputError, match="not 'zip'"):
        pack(torch.ones(2, 4), "zip")
    with pytest.raises(InputError, match="4 divides, not 6"):
        pack(torch.zeros(2, 6), "nm", pattern=(2, 4))
    with pytest.raises(InputError, match="two axes"):
        pack(torch.zeros(6))


def test_a_network_comes_back_from_its_file(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[3].weight = net[2].weight
    with torch.no_grad():
        net[0].weight.copy_(sparse(8, 16, "0.75"))
    packed = {"0.weight": pack(net[0].weight)}
    plain = {name: t for name, t in own_tensors(net).items() if name not in packed}
    assert "3.weight" not in plain
    path = tmp_path / "sparse.safetensors"
    save_packed(path, packed, plain)
    assert torch.equal(load_packed(path)[0]["0.weight"].unpacked(), net[0].weight)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for t in own_tensors(other).values():
            t.zero_()
    fill_from_packed(other, path, {})
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    storage = Storage.of(net, {name: p.stored() for name, p in packed.items()})
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert path.stat().st_size == header + storage.bytes
    assert storage.by_form()["bitmask"] == 32 * 4 + 128 / 8


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(RunError, match="no file of packed weights"):
        load_packed(path)
    save_packed(path, {}, {"a": torch.zeros(2)})
    with pytest.raises(RunError, match="does not fit Linear"):
        fill_from_packed(nn.Linear(2, 2), path, {})

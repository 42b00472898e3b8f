from __future__ import annotations

from itertools import permutations

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.contraction import FOLDED, ContractedField
from limbeck.rendering.fields import Density, HashField, MLPField, VMField, VoxelField, build_field
from limbeck.rendering.fields.occupied import OccupiedField
from limbeck.rendering.inheritance import core, heir, inherit, occupancy_of
from limbeck.rendering.scenes import scene

torch.set_num_threads(1)
COLOUR = [f"colour_head.net.{i}.weight" for i in (0, 2, 4)]
GEOMETRY = [f"geometry_head.{i}.weight" for i in (0, 2)]


def expected(student: str, teacher: str) -> list[str]:
    if "voxels" in (student, teacher):
        return []
    return COLOUR if "vm" in (student, teacher) else GEOMETRY + COLOUR


@pytest.mark.parametrize(("student", "teacher"), permutations(["mlp", "hash", "vm", "voxels"], 2))
def test_families_inherit_what_they_have_in_common_at_their_usual_sizes(student: str, teacher: str):
    torch.manual_seed(0)
    a, b = build_field(student), build_field(teacher)
    before = {k: v.clone() for k, v in a.state_dict().items()}
    copied = inherit(a, b)
    assert sorted(copied) == sorted(expected(student, teacher))
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name] if name in copied else before[name])


def test_inherited_heads_decode_alike():
    torch.manual_seed(0)
    a, b = MLPField(), HashField()
    inherit(a, b)
    h, d = torch.randn(5, 12), torch.nn.functional.normalize(torch.randn(5, 3), dim=1)
    for mine, other in zip(a.decode(h, d), b.decode(h, d), strict=True):
        assert torch.equal(mine, other)


def test_other_widths_inherit_what_still_fits():
    assert inherit(MLPField(features=8), HashField()) == [GEOMETRY[1], *COLOUR]
    assert inherit(MLPField(hidden=32), HashField()) == []


def test_which():
    torch.manual_seed(0)
    a, b = HashField(), HashField()
    table = a.encoding.table.clone()
    assert inherit(a, b, "none") == []
    assert inherit(a, b, "heads") == GEOMETRY + COLOUR and torch.equal(a.encoding.table, table)
    assert "encoding.table" in inherit(a, b) and torch.equal(a.encoding.table, b.encoding.table)
    with pytest.raises(InputError, match="all, heads or none"):
        inherit(a, b, "some")  # type: ignore[arg-type]


def test_buffers_stay():
    a, b = VoxelField(4, aabb=[[-2, -2, -2], [2, 2, 2]]), VoxelField(4)
    assert inherit(a, b) == ["data"]
    assert float(a.aabb.max()) == 2


def test_a_damaged_teacher_is_named():
    b = HashField()
    with torch.no_grad():
        b.colour_head.net[2].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"colour_head.net.2.weight"):
        inherit(MLPField(), b)


def test_an_heir_has_the_teachers_box_and_limits():
    law = Density(low=-5.0)
    teacher = HashField(aabb=[[0, 0, 0], [1, 2, 3]], density=law)
    made = heir(teacher, "vm", {"rank": 2})
    assert isinstance(made, VMField) and torch.equal(made.aabb, teacher.aabb) and made.density_law == law
    assert heir(teacher, "mlp", low=-100.0).density_law.low == -100
    assert heir(teacher, "mlp", low=-2.0).density_law.low == -5
    folded = heir(ContractedField(HashField(aabb=FOLDED), radius=2.0), "mlp")
    assert isinstance(folded, ContractedField) and folded.radius == 2 and core(folded).family == "mlp"
    assert torch.equal(core(folded).aabb, torch.tensor(FOLDED))


def test_the_occupancy_covers_what_is_there():
    field = scene("split_sphere")
    grid = occupancy_of(field, 16, 1.0)
    x = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    dense = field.density(x)["sigma"] > 1
    assert bool(grid(x)[dense].all())
    assert 0.1 < float(grid.occupied.float().mean()) < 0.5
    assert torch.equal(grid.occupied, occupancy_of(field, 16, 1.0).occupied)


def test_an_occupied_field_is_empty_elsewhere_and_comes_back(tmp_path):
    from limbeck.rendering.fields import load_field

    torch.manual_seed(0)
    cells = torch.zeros(4, 4, 4, dtype=torch.bool)
    cells[2:, :, :] = True
    inner = HashField()
    field = OccupiedField(inner, cells)
    x, d = torch.tensor([[0.3, -0.9, 0.2], [-0.3, -0.9, 0.2], [1.0, 1.0, 1.0]]), torch.eye(3)
    with torch.no_grad():
        found, whole = field(x, d), inner(x, d)
    assert found["sigma"].tolist() == [float(whole["sigma"][0]), 0.0, float(whole["sigma"][2])]
    assert torch.equal(found["rgb"], whole["rgb"]) and core(field) is inner
    field.save(tmp_path)
    again = load_field(tmp_path)
    assert isinstance(again, OccupiedField) and torch.equal(again.occupied, cells)
    assert torch.equal(again(x, d)["sigma"], found["sigma"])
    for wrong in (torch.zeros(2, 2, 2, dtype=torch.bool), torch.ones(2, 2, 3, dtype=torch.bool), torch.ones(2, 2, 2)):
        with pytest.raises(InputError, match="an occupancy is"):
            OccupiedField(inner, wrong)


def test_nothing_to_be_found_is_named():
    class Nothing(torch.nn.Module):
        aabb = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])

        def density(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sigma": torch.zeros(len(x))}

    with pytest.raises(InputError, match="no density above 0"):
        occupancy_of(Nothing(), 4, 1.0)

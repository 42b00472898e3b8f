"""Words for where cameras stand."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras, orbit
from limbeck.rendering.view_words import WORDS, angles_of, view_word_ids, view_words, with_view

torch.set_num_threads(1)


def test_each_side_has_its_word_and_later_rules_win() -> None:
    azimuth = torch.tensor([0.0, 44.9, 45.0, -44.9, 90.0, -90.0, 135.0, 135.1, 180.0, -179.0, 0.0, 180.0])
    elevation = torch.tensor([0.0] * 10 + [61.0, 60.0])
    words = ["front", "front", "side", "front", "side", "side", "side", "back", "back", "back", "overhead", "back"]
    assert view_words(azimuth, elevation) == words
    assert [WORDS[k] for k in view_word_ids(azimuth, elevation)] == words


def test_any_turn_counts() -> None:
    azimuth = torch.linspace(-175, 175, 29)
    level = torch.zeros(29)
    for turns in (-720, 360):
        assert view_words(azimuth + turns, level) == view_words(azimuth, level)


def test_thresholds() -> None:
    one, level = torch.tensor([40.0]), torch.tensor([0.0])
    assert view_words(one, level, front=30) == ["side"]
    assert view_words(one, torch.tensor([20.0]), overhead=10) == ["overhead"]
    assert view_words(torch.tensor([100.0]), level, back=90) == ["back"]
    assert view_words(torch.tensor([60.0]), level, front=180, back=180) == ["back"]  # back comes after front


def test_prompts() -> None:
    assert with_view("a cat", "side") == "a cat, side view" and with_view("a cat", "") == "a cat"


def test_angles_come_from_the_cameras_or_from_where_they_stand() -> None:
    cameras = orbit([-170.0, 10.0, 100.0], torch.tensor([-5.0, 20.0, 70.0]), 2.0)
    azimuth, elevation = angles_of(cameras)
    assert azimuth is cameras.azimuth and elevation is cameras.elevation
    bare = Cameras(cameras.c2w, cameras.fx, cameras.fy, cameras.cx, cameras.cy, 8, 8)
    found = angles_of(bare)
    assert torch.allclose(found[0], azimuth, atol=1e-3) and torch.allclose(found[1], elevation, atol=1e-3)


def test_mistakes() -> None:
    with pytest.raises(InputError, match="must be as many"):
        view_word_ids(torch.zeros(2), torch.zeros(3))
    with pytest.raises(InputError, match="angles in degrees"):
        view_word_ids(torch.zeros(2), torch.zeros(2), front=-1)

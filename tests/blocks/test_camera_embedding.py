"""Telling a network the camera by a hook: what is added, when, for which rows, and what is left alone."""

from __future__ import annotations

import gc
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.camera_embedding import CameraEmbedding
from limbeck.blocks.lora import LoRA
from limbeck.core.errors import InputError
from limbeck.core.method import fingerprint

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 5))
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.time_embedding(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def moved(embedding: CameraEmbedding) -> CameraEmbedding:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in embedding.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    return embedding


def inputs(n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 4, generator=generator), torch.randn(n, 16, generator=generator)


def test_it_adds_the_cameras_vector_to_the_sub_modules_output() -> None:
    model = net()
    embedding = moved(CameraEmbedding(model, "time_embedding"))
    x, cameras = inputs()
    parts = embedding.vectors
    added = F.silu(cameras @ parts.inner.weight.T + parts.inner.bias) @ parts.outer.weight.T + parts.outer.bias
    assert embedding.width == 5 and torch.allclose(embedding(cameras), added, atol=1e-6)
    with embedding.seeing(cameras) as inside:
        assert inside is model
        assert torch.allclose(model(x), model.last(model.time_embedding[2](model.time_embedding[:2](x)) + added), atol=1e-5)  # fmt: skip


def test_it_begins_with_no_change_and_ends_with_none() -> None:
    model = net()
    x, cameras = inputs()
    plain, mark, keys = model(x).detach(), fingerprint(model), list(model.state_dict())
    embedding = CameraEmbedding(model, "time_embedding")
    for seen in (cameras, None):
        with embedding.seeing(seen):
            assert torch.equal(model(x), plain)
    moved(embedding)
    with embedding.seeing(cameras):
        assert not torch.allclose(model(x), plain)
    assert torch.equal(model(x), plain)
    with pytest.raises(RuntimeError, match="inside"), embedding.seeing(cameras):
        raise RuntimeError("inside")
    assert torch.equal(model(x), plain)
    assert fingerprint(model) == mark and list(model.state_dict()) == keys
    assert not any(name.startswith("time") for name in embedding.state_dict())
    assert embedding.remove() is model and not model.time_embedding._forward_hooks


def test_unknown_cameras_are_told_as_the_learned_vector() -> None:
    embedding = moved(CameraEmbedding(net(), "time_embedding"))
    x, cameras = inputs()
    model = embedding.base
    with embedding.seeing(cameras):
        every = model(x)
    with embedding.seeing(None):
        none = model(x)
        assert model(x[:2]).shape == (2, 2)  # any number of rows
    with embedding.seeing(cameras, torch.tensor([True, False, True])):
        some = model(x)
    assert torch.equal(some[[0, 2]], every[[0, 2]]) and torch.equal(some[1], none[1])
    assert torch.equal(embedding(None, rows=2), embedding.vectors.null.expand(2, -1))
    assert not torch.allclose(every[1], none[1])


def test_blocks_nest() -> None:
    embedding = moved(CameraEmbedding(net(), "time_embedding"))
    x, cameras = inputs()
    with embedding.seeing(cameras):
        outer = embedding.base(x)
        with embedding.seeing(None):
            assert not torch.allclose(embedding.base(x), outer)
        assert torch.equal(embedding.base(x), outer)


def test_a_doubled_batch_sees_the_cameras_twice() -> None:
    embedding = moved(CameraEmbedding(net(), "time_embedding"))
    x, cameras = inputs()
    known = torch.tensor([True, False, True])
    with embedding.seeing(cameras, known):
        once = embedding.base(x)
        twice = embedding.base(torch.cat([x, x]))
        assert torch.allclose(twice, torch.cat([once, once]), atol=1e-6)
        with pytest.raises(InputError, match="4 rows and 3 cameras"):
            embedding.base(torch.zeros(4, 4))


def test_gradients_reach_the_embedding_and_the_cameras_as_far_as_they_are_known() -> None:
    embedding = moved(CameraEmbedding(net(), "time_embedding"))
    x, cameras = inputs()
    cameras.requires_grad_()
    with embedding.seeing(cameras, torch.tensor([True, False, False])):
        embedding.base(x).square().sum().backward()
    assert bool(cameras.grad[0].any()) and not bool(cameras.grad[1:].any())
    assert all(p.grad is not None and bool(p.grad.any()) for p in embedding.parameters())
    embedding.zero_grad(set_to_none=True)
    with embedding.seeing(None):
        embedding.base(x).square().sum().backward()
    assert embedding.vectors.inner.weight.grad is None and bool(embedding.vectors.null.grad.any())


def test_at_the_start_the_last_layer_learns_first() -> None:
    embedding = CameraEmbedding(net(), "time_embedding")
    x, cameras = inputs()
    with embedding.seeing(cameras):
        embedding.base(x).square().sum().backward()
    assert bool(embedding.vectors.outer.weight.grad.any()) and not bool(embedding.vectors.inner.weight.grad.any())


def test_the_hook_goes_with_the_object() -> None:
    model = net()
    embedding = CameraEmbedding(model, "time_embedding")
    assert model.time_embedding._forward_hooks
    del embedding
    gc.collect()
    assert not model.time_embedding._forward_hooks


def test_a_copy_has_a_network_of_its_own() -> None:
    embedding = moved(CameraEmbedding(net(), "time_embedding"))
    x, cameras = inputs()
    copy = deepcopy(embedding)
    assert copy.base is not embedding.base
    with torch.no_grad():
        copy.vectors.outer.bias += 1
    with embedding.seeing(cameras), copy.seeing(cameras):
        assert not torch.allclose(copy.base(x), embedding.base(x))
    with copy.seeing(cameras):
        assert torch.equal(embedding.base(x), net()(x))


def test_it_stands_beside_adapters() -> None:
    model = net()
    lora = LoRA(model, rank=2)
    embedding = moved(CameraEmbedding(model, "time_embedding"))
    x, cameras = inputs()
    with embedding.seeing(cameras):
        before = model(x)
        with torch.no_grad():
            for p in lora.parameters():
                p.add_(0.3)
        after = model(x)
        with lora.disabled():
            assert torch.equal(model(x), before)
    assert not torch.allclose(before, after)


def test_it_works_on_a_unet_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    from limbeck.adapters.diffusers_transformers import wrap
    from tests.adapters.tiny_pipelines import text_unet

    wrapped = wrap(text_unet())
    embedding = moved(CameraEmbedding(wrapped, "network.time_embedding"))
    assert embedding.width == 32
    x, words, t = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16), torch.tensor([10.0, 500.0])
    cameras = torch.randn(2, 16)
    with torch.no_grad():
        plain = wrapped(x, t, words)
        with embedding.seeing(cameras):
            told = wrapped(x, t, words)
            both = wrapped(torch.cat([x, x]), t.repeat(2), words.repeat(2, 1, 1))
        assert torch.equal(wrapped(x, t, words), plain)
        direct = CameraEmbedding(wrapped.network, "time_embedding")
        with direct.seeing(cameras):
            assert torch.equal(wrapped(x, t, words), plain)  # nothing learned yet
    assert not torch.allclose(told, plain) and torch.allclose(both, torch.cat([told, told]), atol=1e-5)


def test_half_precision_networks_keep_their_kind() -> None:
    model = net().bfloat16()
    embedding = moved(CameraEmbedding(model, "time_embedding"))
    x, cameras = inputs()
    with embedding.seeing(cameras):
        assert model(x.bfloat16()).dtype == torch.bfloat16
    assert embedding.vectors.null.dtype == torch.float32


def test_mistakes() -> None:
    model = net()
    with pytest.raises(InputError, match=r"no sub-module 'time_embeding'.*did you mean time_embedding"):
        CameraEmbedding(model, "time_embeding")
    with pytest.raises(InputError, match="no linear layer"):
        CameraEmbedding(model, "time_embedding.1")
    with pytest.raises(InputError, match="1 or more"):
        CameraEmbedding(model, "time_embedding", features=0)
    embedding = CameraEmbedding(model, "time_embedding")
    with pytest.raises(InputError, match=r"\(B, 16\)"), embedding.seeing(torch.zeros(2, 4, 4)):
        pass
    with pytest.raises(InputError, match=r"known is \(2,\) bool"), embedding.seeing(torch.zeros(2, 16), torch.ones(2)):
        pass
    with pytest.raises(InputError, match="where there are cameras"), embedding.seeing(None, torch.ones(2).bool()):
        pass
    wrong = CameraEmbedding(model, "time_embedding", width=7)
    with wrong.seeing(None), pytest.raises(InputError, match=r"gives \(1, 5\)"):
        model(torch.zeros(1, 4))

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import UNet2DModel

from limbeck.adapters.diffusers_networks import SmallUNet, small_unet
from limbeck.adapters.diffusers_transformers import wrap
from limbeck.core.errors import InputError, UnknownNameError
from tests.adapters import tiny_pipelines as tiny

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


T = torch.tensor([3.0, 700.0])
TEXT = noise(2, 5, tiny.WIDTH)


def test_unconditional_unet_is_asked_as_diffusers_asks_it() -> None:
    plain, x = tiny.unet(), noise(2, 1, 8, 8)
    network = wrap(plain)
    expected = plain(x, T.long()).sample
    torch.testing.assert_close(network(x, T), expected)
    torch.testing.assert_close(wrap(plain, -1)(x, T), -expected)
    assert network.num_classes is None
    with pytest.raises(InputError, match="is unconditional"):
        network(x, T, torch.zeros(2, dtype=torch.long))


def test_class_ids_are_checked_before_the_lookup() -> None:
    plain, x = tiny.unet(classes=3), noise(2, 1, 8, 8)
    network = wrap(plain)
    ids = torch.tensor([0, 2])
    torch.testing.assert_close(network(x, T, ids), plain(x, T, class_labels=ids).sample)
    torch.testing.assert_close(network(x, T, {"class_labels": ids}), network(x, T, ids))
    assert network.num_classes == 3
    for wrong, line in (
        (torch.tensor([0, 3]), r"must lie in 0 … 2 \(got 0 to 3\)"),
        (torch.tensor([-1, 1]), "must lie in 0 … 2"),
        (torch.tensor([0.0, 1.0]), "must be integers"),
        (ids[None], "must have 1 axes"),
    ):
        with pytest.raises(InputError, match=line):
            network(x, T, wrong)
    with pytest.raises(InputError, match="needs 'class_labels'"):
        network(x, T)
    with pytest.raises(UnknownNameError, match="class_labels"):
        network(x, T, {"class_label": ids})


def test_learned_time_and_learned_variance() -> None:
    plain = tiny.unet(time_embedding_type="learned", num_train_timesteps=1000, out_channels=2)
    x = noise(2, 1, 8, 8)
    torch.testing.assert_close(wrap(plain)(x, torch.tensor([2.9, 700.1])), plain(x, T.long()).sample[:, :1])


def test_samples_and_networks_that_do_not_fit() -> None:
    network = wrap(tiny.unet())
    with pytest.raises(InputError, match=r"takes samples \(B, 1, H, W\), not \(2, 3, 8, 8\)"):
        network(noise(2, 3, 8, 8), T)
    with pytest.raises(InputError, match="multiples of 2"):
        network(noise(2, 1, 7, 8), T)
    with pytest.raises(InputError, match="takes 1 channels and gives 3"):
        wrap(tiny.unet(out_channels=3))
    with pytest.raises(InputError, match="fourier"):
        wrap(tiny.unet(time_embedding_type="fourier"))
    with pytest.raises(InputError, match="Linear is not known here"):
        wrap(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="1 or -1"):
        wrap(tiny.unet(), 0)
    with pytest.raises(InputError, match="does not take embedded_guidance"):
        wrap(tiny.unet(), embedded_guidance=1.0)


def test_text_unet() -> None:
    plain, x = tiny.text_unet(), noise(2, 4, 8, 8)
    network = wrap(plain)
    expected = plain(x, T, TEXT).sample
    torch.testing.assert_close(network(x, T, TEXT), expected)
    torch.testing.assert_close(network(x, T, {"encoder_hidden_states": TEXT}), expected)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    masked = network(x, T, {"encoder_hidden_states": TEXT, "encoder_attention_mask": mask})
    torch.testing.assert_close(masked, plain(x, T, TEXT, encoder_attention_mask=mask).sample)
    torch.testing.assert_close(masked[1], expected[1])
    assert not torch.allclose(masked[0], expected[0])
    for cond, line in (
        (TEXT[..., :7], "must be 16 wide, not 7"),
        (TEXT[0], "must have 3 axes"),
        (None, "needs 'encoder_hidden_states' in its condition, which has nothing"),
        ({"encoder_hidden_states": TEXT, "time_ids": torch.zeros(2, 6)}, "is not one of SDXL"),
        ({"encoder_hidden_states": TEXT, "class_labels": torch.zeros(2)}, "has no class embedding"),
    ):
        with pytest.raises(InputError, match=line):
            network(x, T, cond)
    with pytest.raises(InputError, match="time_cond_proj_dim"):
        wrap(tiny.text_unet(time_cond_proj_dim=4))


def test_unet_of_sdxl_needs_pooled_text_and_sizes() -> None:
    plain, x = tiny.text_unet(xl=True), noise(2, 4, 8, 8)
    network = wrap(plain)
    text, pooled, sizes = (
        noise(2, 5, 2 * tiny.WIDTH),
        noise(2, tiny.WIDTH),
        torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2),
    )
    cond = {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": sizes}
    expected = plain(x, T, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    torch.testing.assert_close(network(x, T, cond), expected)
    with pytest.raises(InputError, match="needs 'text_embeds'"):
        network(x, T, {"encoder_hidden_states": text, "time_ids": sizes})
    with pytest.raises(InputError, match="needs 'text_embeds'"):
        network(x, T, text)
    with pytest.raises(InputError, match="takes 16 pooled features"):
        network(x, T, {**cond, "text_embeds": pooled[:, :9]})


def test_dit_keeps_the_mean_and_drops_no_labels() -> None:
    plain, x = tiny.dit(classes=5).transformer, noise(2, 4, 8, 8)
    network = wrap(plain).train()
    ids = torch.tensor([1, 5])  # 5 is the null class
    first = network(x, T, ids)
    torch.testing.assert_close(first, network(x, T, ids))  # nothing random in training mode
    torch.testing.assert_close(first, plain.eval()(x, timestep=T, class_labels=ids).sample[:, :4])
    with pytest.raises(InputError, match="must lie in 0 … 5"):
        network(x, T, torch.tensor([0, 6]))
    with pytest.raises(InputError, match="square"):
        network(noise(2, 4, 8, 4), T, ids)


def test_pixart(folder: Path) -> None:
    plain, x = tiny.pixart(folder).transformer, noise(2, 4, 8, 8)
    network = wrap(plain)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    expected = plain(
        x,
        encoder_hidden_states=TEXT,
        encoder_attention_mask=mask,
        timestep=T,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample[:, :4]
    torch.testing.assert_close(network(x, T, {"encoder_hidden_states": TEXT, "encoder_attention_mask": mask}), expected)
    with pytest.raises(InputError, match="must be 5 wide, not 4"):
        network(x, T, {"encoder_hidden_states": TEXT, "encoder_attention_mask": mask[:, :4]})


def test_sd3(folder: Path) -> None:
    plain, x = tiny.sd3(folder).transformer, noise(2, 4, 8, 8)
    network = wrap(plain)
    cond = {"encoder_hidden_states": noise(2, 5, 32), "pooled_projections": noise(2, 32)}
    torch.testing.assert_close(network(x, T, cond), plain(x, timestep=T, **cond).sample)
    with pytest.raises(InputError, match="needs 'pooled_projections'"):
        network(x, T, cond["encoder_hidden_states"])
    with pytest.raises(InputError, match="positions for samples of up to 16 x 16"):
        network(noise(2, 4, 32, 8), T, cond)


@pytest.mark.parametrize("guided", [False, True])
def test_flux_packs_as_its_pipeline_does(folder: Path, guided: bool) -> None:
    pipeline = tiny.flux(folder, guided)
    plain, x = pipeline.transformer, noise(2, 4, 8, 6)
    network = wrap(plain, embedded_guidance=2.0)
    cond = {"encoder_hidden_states": TEXT, "pooled_projections": noise(2, tiny.WIDTH)}
    packed = pipeline._pack_latents(x, 2, 4, 8, 6)
    places = pipeline._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32)
    guidance: Any = torch.tensor([2.0, 2.0]) if guided else None
    asked = {"img_ids": places, "txt_ids": torch.zeros(5, 3), **cond}
    found = plain(packed, timestep=T / 1000, guidance=guidance, **asked).sample
    expected = pipeline._unpack_latents(found, 16, 12, 2)
    torch.testing.assert_close(network(x, T, cond), expected)
    if guided:
        torch.testing.assert_close(network(x, T, {**cond, "guidance": guidance}), expected)
    else:
        with pytest.raises(InputError, match="no embedded guidance"):
            network(x, T, {**cond, "guidance": torch.ones(2)})
    with pytest.raises(InputError, match="multiples of 2"):
        network(noise(2, 4, 7, 6), T, cond)


def test_gradients_reach_the_input_and_half_precision_stays_inside() -> None:
    network = wrap(tiny.text_unet())
    x = noise(2, 4, 8, 8).requires_grad_()
    network(x, T, TEXT).square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    half = wrap(tiny.text_unet().to(torch.bfloat16))
    found = half(x.detach(), T, TEXT)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, network(x, T, TEXT).detach(), rtol=0.1, atol=0.1)


def test_small_unet_is_built_from_its_spec() -> None:
    network = small_unet((1, 8, 8), width=8, levels=2, num_classes=3, time_scale=250.0).eval()
    assert isinstance(network.network, UNet2DModel) and network.num_classes == 4
    x, ids = noise(2, 1, 8, 8), torch.tensor([0, 3])
    again = SmallUNet.from_spec(network.spec).eval()
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(again(x, T / 1000, ids), network(x, T / 1000, ids))
    torch.testing.assert_close(network(x, T / 1000, ids), network.network(x, T / 4, class_labels=ids).sample)
    for shape, options, line in (
        ((2,), {}, "takes images"),
        ((1, 8, 6), {"levels": 3}, "multiples of 4"),
        ((1, 8, 8), {"width": 6}, "multiple of 4"),
    ):
        with pytest.raises(InputError, match=line):
            small_unet(shape, **options)  # type: ignore[arg-type]

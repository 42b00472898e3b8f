"""Dataset quantisation as a method: bins that resume, samples of any size, patches, texts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import limbeck
from limbeck.adapters.patch_tokens import patch_encoder
from limbeck.blocks.patch_store import PatchStore
from limbeck.blocks.similarity_kernels import similarity_kernel
from limbeck.blocks.submodular import GraphCut, greedy
from limbeck.blocks.submodular_bins import dq_bins, dq_sample
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.methods.datasets.dataset_quantization import DatasetQuantization, quantise_texts
from limbeck.methods.datasets.patches_base import as_reconstructor
from limbeck.networks.mae import MAEViT, build_decoder
from tests.helpers import resumed_equals_uninterrupted
from tests.methods.datasets.selections import SHORT, build, data, encoder, images

QUIET = EngineConfig(progress=False)


def run(method: DatasetQuantization) -> DatasetQuantization:
    Engine(None, QUIET).run(method, method.stages())
    return method


def test_bins_are_those_of_the_free_function():
    x, y = images()
    method = DatasetQuantization((x, y), encoder=encoder(), bins=4, ipc=3)
    bins = run(method).bins()
    expected = dq_bins(method.embeddings(), 4, y)
    for name in ("bin", "rank", "labels"):
        assert torch.equal(getattr(bins, name), getattr(expected, name))
    torch.testing.assert_close(bins.gain, expected.gain)
    alone = DatasetQuantization((x, y), encoder=encoder(), bins=4, ipc=3).quantise()
    assert torch.equal(alone.bin, bins.bin)
    assert bins.sizes().tolist() == [[5] * 4] * 3


def test_one_binning_serves_all_sizes():
    method = DatasetQuantization(images(), bins=5, ipc=5)
    made = method.select()
    assert torch.bincount(made.labels).tolist() == [5, 5, 5] and bool((made.labels.diff() >= 0).all())
    bins = method.bins()
    # one of each bin of each class
    assert torch.bincount(bins.bin[made.index] + 5 * made.labels, minlength=15).tolist() == [1] * 15
    for ratio in (0.1, 0.25, 0.5):
        found = method.sample(ratio, seed=1)
        assert len(found) == round(60 * ratio)
        assert torch.equal(found.index, method.sample(ratio, seed=1).index)
    assert not torch.equal(method.sample(0.25, 1).index, method.sample(0.25, 2).index)
    assert len(method.sample(count=7)) == 7 and len(method.sample(ipc=2)) == 6
    assert torch.equal(method.bins().bin, bins.bin)


def test_ratio_bins_and_ways_to_take():
    x, y = images()
    method = DatasetQuantization((x, y), ratio=0.2, bins=1, take="early")
    made = method.select()
    flat = method.embeddings()
    for c in range(3):
        ids = (y == c).nonzero().flatten()
        expected = ids[greedy(GraphCut(similarity_kernel(flat[ids])), 4).order]
        assert set(made.index[made.labels == c].tolist()) == set(expected.tolist())
    assert DatasetQuantization((x, y), ratio=0.2).n_bins == 4  # as many as are kept of a class
    assert DatasetQuantization((x, y), ipc=19).n_bins == 10
    free = DatasetQuantization((x, y), ipc=4, balanced=False, bins=3)
    made = free.select()
    assert len(made) == 12 and free.bins().labels is None and free.bins().sizes().tolist() == [[20, 20, 20]]
    assert torch.equal(free.bins().bin, dq_bins(free.embeddings(), 3).bin)


def test_other_functions_and_optimisers():
    settings = {"ipc": 3, "bins": 3}
    naive = DatasetQuantization(images(), function="facility-location", **settings).quantise()
    lazy = DatasetQuantization(images(), function="facility-location", optimiser="lazy", **settings).quantise()
    assert torch.equal(naive.bin, lazy.bin)
    logdet = DatasetQuantization(images(), function="log-det", **settings).quantise()
    graph = DatasetQuantization(images(), **settings).quantise()
    assert len({tuple(b.bin.tolist()) for b in (naive, logdet, graph)}) == 3
    stochastic = [DatasetQuantization(images(), optimiser="stochastic", **settings).quantise() for _ in range(2)]
    assert torch.equal(stochastic[0].bin, stochastic[1].bin)


def test_profile_goes_from_central_to_outlying():
    method = DatasetQuantization(images(150), ipc=10, bins=5)
    with pytest.raises(InputError, match="has made no bins yet"):
        method.bins()
    method.quantise()
    profile = method.profile()
    gains, central = profile["gain"], profile["centrality"]
    assert all(a > b for a, b in itertools.pairwise(gains))
    assert len(central) == 5 and central[0] > central[-1]


def test_resume_is_exact(tmp_path):
    def make() -> DatasetQuantization:
        return DatasetQuantization(images(), build, encoder(), bins=4, ipc=4, optimiser="stochastic")

    method = resumed_equals_uninterrupted(make, images(), tmp_path, stops=(3, 8), every=2)
    assert torch.equal(method.bins().bin, make().quantise().bin)


def test_resume_in_the_middle_of_the_autoencoder(tmp_path):
    def make() -> DatasetQuantization:
        return DatasetQuantization(data(), build, encoder(), bins=2, ipc=2, drop=0.25, autoencoder_steps=9)

    resumed_equals_uninterrupted(make, data(), tmp_path, stops=(4, 7), every=2)


def test_dropped_patches_are_filled_and_kept_pixels_are_exact():
    method = run(DatasetQuantization(data(), build, encoder(), ipc=3, drop=0.25, autoencoder_steps=120))
    made, store = method.distilled(), method.patches()
    kept = store.kept.reshape(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert store.kept.sum(1).tolist() == [12] * 9
    original = data().fetch(made.index, None).inputs
    torch.testing.assert_close(made.inputs[kept], original[kept])
    assert not torch.allclose(made.inputs[~kept], original[~kept])
    assert store.bytes == 9 * 12 * 4 + 9 * 2 < made.nbytes
    # better than the mean colour
    mean = run(DatasetQuantization(data(), build, encoder(), ipc=3, drop=0.25, fill="mean")).distilled()
    assert torch.equal(mean.index, made.index)
    errors = [float((m.inputs - original)[~kept].square().mean()) for m in (made, mean)]
    assert errors[0] < errors[1]
    assert method.reconstructor_bytes == sum(p.numel() * 4 for p in method.autoencoder.parameters())


def test_reconstructors_of_ones_own():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTMAEConfig(
        **sizes,
        image_size=8,
        patch_size=4,
        num_channels=1,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    settings = {"ipc": 2, "drop": 0.5}
    foreign = DatasetQuantization(data(), build, encoder(), reconstructor=ViTMAEForPreTraining(config), **settings)
    made = foreign.select()
    assert foreign.patch == 4 and foreign.patches().kept.shape == (6, 4) and len(foreign.stages()) == 1
    assert torch.isfinite(made.inputs).all() and list(foreign.trainable_parameters()) == []
    constant = DatasetQuantization(
        images(), build, encoder(), reconstructor=lambda x, mask: torch.full((len(x), 16, 4), 7.0), patch=2, **settings
    )
    made = constant.select()
    assert int((made.inputs == 7).sum()) == 6 * 8 * 4
    for options, line in (
        ({"patch": 2, "reconstructor": ViTMAEForPreTraining(config)}, "differs from the autoencoder's"),
        ({"patch": 3, "fill": "mean"}, "do not tile"),
        ({"reconstructor": MAEViT((1, 8, 8), 3, width=8, depth=1, heads=2, patch=2)}, "no decoder"),
    ):
        with pytest.raises(InputError, match=line):
            DatasetQuantization(data(), build, encoder(), **settings, **options)
    with pytest.raises(InputError, match="give encoder="):
        DatasetQuantization(data(), build, **settings)
    with pytest.raises(InputError, match="images"):
        DatasetQuantization((torch.randn(12, 5), torch.arange(12) % 3), None, nn.Linear(5, 3), **settings)
    with pytest.raises(InputError, match="set drop above 0"):
        DatasetQuantization(data(), build, encoder(), ipc=2).patches()
    untrained = DatasetQuantization(data(), build, encoder(), **settings)
    untrained.quantise()
    with pytest.raises(InputError, match="has learnt nothing yet"):
        untrained.distilled()
    model = MAEViT((1, 8, 8), 3, width=8, depth=1, heads=2, patch=2)
    whole = as_reconstructor(model, build_decoder(patch_encoder(model), width=8, depth=1, heads=2))
    assert as_reconstructor(whole) is whole


def test_a_run_and_its_artifact(tmp_path):
    result = limbeck.fit(
        DatasetQuantization,
        data(),
        student=build,
        teacher=encoder(),
        test=data(30),
        out=tmp_path / "run",
        engine={"progress": False},
        ratio=0.15,
        drop=0.25,
        fill="mean",
        **SHORT,
    )
    made = limbeck.load(tmp_path / "run").content
    assert len(made) == 9 and torch.equal(made.index, result.method.chosen)
    store = PatchStore.load(tmp_path / "run" / "artifact" / "patches.safetensors")
    assert store.bytes == result.result["patches"]["bytes"] and result.result["patches"]["reconstructor_bytes"] == 0
    torch.testing.assert_close((store.reconstruct().float() / 255 - 0.4) / 0.2, made.inputs)
    assert len(result.result["bins"]["gain"]) == 3
    rows = {row["who"]: row for row in result.result["rows"]}
    assert rows["random, same bytes"]["samples"] == rows["distilled"]["samples"] == 9


def test_instruction_records():
    topics = ["cook a soup with", "integrate the function of", "translate into French the word"]
    records = [
        {"instruction": f"{topics[i % 3]} {word}", "input": "", "output": f"{word} {i}"}
        for i, word in enumerate(["apple", "river", "stone", "cloud", "horse", "tower"] * 5)
    ]
    bins = quantise_texts(records, 5, dimensions=10)
    assert bins.sizes().tolist() == [[6] * 5]
    index = dq_sample(bins, count=10, seed=3)
    assert torch.bincount(bins.bin[index]).tolist() == [2] * 5
    given = quantise_texts(records, 5, embeddings=torch.randn(30, 4), labels=torch.arange(30) % 3)
    assert given.sizes().tolist() == [[2] * 5] * 3
    with pytest.raises(InputError, match="30 records but 3 embeddings"):
        quantise_texts(records, 5, embeddings=torch.zeros(3, 2))

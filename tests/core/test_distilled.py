import pytest
import torch

import limbeck
from limbeck.adapters.distilled import save_distilled
from limbeck.core.distilled import DistilledDataset, real_bytes
from limbeck.core.errors import InputError, LimbeckError, RunError

MEAN, STD = [0.2, 0.5, 0.4], [0.3, 0.25, 0.2]


def made(n=6, soft=False, **more):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 3, 4, 4, generator=generator)
    labels = torch.softmax(torch.randn(n, 5, generator=generator), 1) if soft else torch.arange(n) % 5
    return DistilledDataset(inputs, labels, 5, **{"mean": MEAN, "std": STD, **more})


def test_bytes_are_counted():
    assert made().nbytes == 6 * 48 + 24 + 6
    assert made(bits=16).nbytes == 2 * 6 * 48 + 6
    assert made(bits=32, soft=True).nbytes == 4 * 6 * 48 + 2 * 6 * 5
    assert made(extra_bytes=1000).nbytes == made().nbytes + 1000
    assert real_bytes((3, 4, 4), 5) == 49
    assert made().share_of(12) == pytest.approx((6 * 49 + 24) / (12 * 49))


def test_real_pixels_are_stored_exactly():
    pixels = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    dataset = DistilledDataset((pixels / 255 - mean) / std, torch.arange(6) % 5, 5, mean=MEAN, std=STD)
    assert torch.equal(dataset.codes(), pixels) and torch.equal(dataset.pixels(), pixels)
    assert torch.allclose(dataset.stored().inputs, dataset.inputs, atol=1e-5)


def test_values_out_of_range_widen_the_scale():
    dataset = made()
    error = (dataset.stored().inputs - dataset.inputs).abs().max()
    low, high = dataset.scale()
    assert 0 < float(error) <= float((high - low).max()) / 255
    assert torch.equal(dataset.stored().stored().inputs, dataset.stored().stored().stored().inputs)


@pytest.mark.parametrize("more", [{}, {"soft": True}, {"bits": 16}, {"bits": 32, "soft": True}])
def test_what_is_saved_comes_back(tmp_path, more):
    dataset = made(**more, recipe={"lr": 0.05}, class_names=list("abcde"))
    save_distilled(dataset, tmp_path, {"method": "x"})
    found = limbeck.load(tmp_path).content
    assert torch.allclose(found.inputs, dataset.stored().inputs, atol=1e-6)
    assert torch.allclose(found.labels, dataset.stored().labels)
    assert found.recipe == {"lr": 0.05} and found.nbytes == dataset.nbytes
    assert list(found.class_names) == list("abcde") and found.bits == dataset.bits


def test_latents_and_selections_come_back(tmp_path):
    latents = DistilledDataset(
        torch.randn(3, 7), torch.tensor([0, 1, 1]), 2, kind="vectors", bits=32, index=torch.tensor([5, 2, 9])
    )
    save_distilled(latents, tmp_path, {})
    found = limbeck.load(tmp_path).content
    assert torch.equal(found.inputs, latents.inputs) and found.index.tolist() == [5, 2, 9]


def test_datasets_reads_the_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = made(class_names=list("abcde"))
    save_distilled(dataset, tmp_path / "out", {})
    table = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert table.num_rows == 6 and table.features["label"].names == list("abcde")
    assert table[0]["image"].size == (4, 4)


def test_a_damaged_folder_is_one_clear_line(tmp_path):
    save_distilled(made(), tmp_path, {})
    parquet = next(tmp_path.rglob("*.parquet"))
    parquet.write_bytes(b"nothing of the kind")
    with pytest.raises(RunError, match="no parquet file or is damaged"):
        limbeck.load(tmp_path)
    parquet.unlink()
    with pytest.raises(RunError, match="is missing"):
        limbeck.load(tmp_path)
    with pytest.raises(LimbeckError, match="without options"):
        limbeck.load(tmp_path, device="cpu")


def test_wrong_labels():
    with pytest.raises(InputError, match="as many labels as samples"):
        DistilledDataset(torch.zeros(2, 1, 2, 2), torch.zeros(3, dtype=torch.long), 2)
    with pytest.raises(InputError, match="neither class indices"):
        DistilledDataset(torch.zeros(2, 1, 2, 2), torch.zeros(2, 3), 2)

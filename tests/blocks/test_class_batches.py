import pytest
import torch

from limbeck.blocks.class_batches import ClassIndex, ClassStream
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError

LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1, 0])


def test_index_finds_the_samples_of_each_class():
    index = ClassIndex(LABELS)
    assert index.counts.tolist() == [4, 3, 3]
    assert index.ids(1).tolist() == [2, 3, 8]


def test_draws_are_of_the_class_and_without_replacement():
    index = ClassIndex(LABELS)
    ids = index.sample(3, torch.Generator().manual_seed(0))
    assert ids.shape == (3, 3)
    assert torch.equal(LABELS[ids], torch.arange(3)[:, None].expand(3, 3))
    assert all(len(set(row)) == 3 for row in ids.tolist())
    counts = torch.zeros(len(LABELS))
    for seed in range(600):
        counts[index.sample(1, torch.Generator().manual_seed(seed)).flatten()] += 1
    assert torch.allclose(counts, 600 / index.counts[LABELS], rtol=0.25)


def test_a_class_with_fewer_repeats_its_own():
    ids = ClassIndex(LABELS).sample(5, torch.Generator().manual_seed(0))
    assert torch.equal(LABELS[ids], torch.arange(3)[:, None].expand(3, 5))


def test_stream_is_a_function_of_seed_and_step():
    data = TensorData(torch.arange(10.0)[:, None], LABELS)
    stream = ClassStream(data, ClassIndex(LABELS), 2, seed=4)
    again = ClassStream(data, ClassIndex(LABELS), 2, seed=4)
    assert torch.equal(stream.batch(7).inputs, again.batch(7).inputs)
    assert not torch.equal(stream.batch(7).inputs, stream.batch(8).inputs)
    assert stream.batch(3).labels.tolist() == [0, 0, 1, 1, 2, 2]
    parts = [stream.shard(rank, 2).batch(3).inputs for rank in (0, 1)]
    assert sorted(torch.cat(parts).flatten().tolist()) == sorted(stream.batch(3).inputs.flatten().tolist())
    with pytest.raises(InputError, match="cannot be divided among 3"):
        stream.shard(0, 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.rand(4), "needs one integer class"),
        (torch.zeros(4, 2, dtype=torch.long), "needs one integer class"),
        (torch.zeros(4, dtype=torch.long), "one class only"),
        (torch.tensor([0, 2, 2]), "class 1 has no samples"),
        (torch.tensor([-1, 0, 1]), "numbered from 0"),
    ],
)
def test_labels_that_are_no_classes(labels, message):
    with pytest.raises(InputError, match=message):
        ClassIndex(labels)


def test_more_than_a_class_has():
    with pytest.raises(InputError, match="ipc 4 is more than the 3 samples of class 1"):
        ClassIndex(LABELS).check(4)

import pytest
import torch

import limbeck
from limbeck.core.batch import Batch, join
from limbeck.core.data import MapData, TensorData
from limbeck.core.errors import InputError
from limbeck.core.semi import Joined, SemiSupervisedData, SemiSupervisedStream, Unlabelled, keep_labels
from limbeck.tasks.base import TaskConfig, load_task


def numbered(n: int, start: int = 0) -> TensorData:
    return TensorData(torch.arange(start, start + n).float()[:, None], torch.arange(n) % 3)


def test_it_is_its_labelled_part_and_hides_the_other_labels() -> None:
    data = SemiSupervisedData(numbered(6), numbered(9, 100))
    assert len(data) == 6 and data.fetch(torch.tensor([2]), None).labels.tolist() == [2]
    assert data.unlabelled.fetch(torch.tensor([0, 8]), None).labels is None
    assert data.labels_tensor().tolist() == [0, 1, 2, 0, 1, 2]


def test_everything_is_both_parts_in_the_order_asked_for() -> None:
    everything = SemiSupervisedData(numbered(3), numbered(4, 100)).everything()
    batch = everything.fetch(torch.tensor([4, 0, 6, 2]), None)
    assert batch.inputs.flatten().tolist() == [101, 0, 103, 2] and batch.labels is None
    assert batch.index.tolist() == [4, 0, 6, 2] and len(everything) == 7
    assert everything.fetch(torch.tensor([1]), None).inputs.item() == 1


def test_joined_rows_may_be_mappings() -> None:
    rows = [{"inputs": {"a": torch.tensor([i]), "b": torch.tensor(float(i))}} for i in range(5)]
    first, second = (MapData(part, replayable=True) for part in (rows[:2], rows[2:]))
    batch = Joined(Unlabelled(first), Unlabelled(second)).fetch(torch.tensor([4, 1, 3]), None)
    assert batch.inputs["b"].tolist() == [4, 1, 3] and batch.inputs["a"].flatten().tolist() == [4, 1, 3]


def test_structures_that_differ_cannot_be_joined() -> None:
    with pytest.raises(InputError, match="different structure"):
        join({"a": torch.zeros(1)}, torch.zeros(1))


def test_the_stream_brings_unlabelled_batches_of_their_own_size() -> None:
    data = SemiSupervisedData(numbered(4), numbered(12, 100))
    stream = SemiSupervisedStream(data, 2, 3, copies=2, seed=5)
    assert stream.steps_per_epoch == 4  # the unlabelled part is the longer one
    seen = [stream.batch(step) for step in range(4)]
    for copy in range(2):
        values = torch.cat([b.unlabelled[copy] for b in seen]).flatten()
        assert sorted(values.tolist()) == [float(v) for v in range(100, 112)]
    assert not torch.equal(seen[0].unlabelled[0], seen[0].unlabelled[1])
    labelled = torch.cat([b.inputs for b in seen[:2]]).flatten()
    assert sorted(labelled.tolist()) == [0, 1, 2, 3]  # and is repeated meanwhile
    again = SemiSupervisedStream(data, 2, 3, copies=2, seed=5).batch(3)
    assert torch.equal(again.inputs, seen[3].inputs) and torch.equal(again.unlabelled[1], seen[3].unlabelled[1])


def test_processes_share_a_batch() -> None:
    stream = SemiSupervisedStream(SemiSupervisedData(numbered(8), numbered(12, 100)), 4, 6, seed=1)
    whole, parts = stream.batch(1), [stream.shard(rank, 2).batch(1) for rank in range(2)]
    assert torch.equal(torch.cat([p.inputs for p in parts]), whole.inputs)
    assert torch.equal(torch.cat([p.unlabelled[0] for p in parts]), whole.unlabelled[0])


def test_micro_batches_divide_both_parts() -> None:
    batch = Batch(torch.arange(4), unlabelled=(torch.arange(6),))
    parts = batch.chunks(2)
    assert [p.inputs.tolist() for p in parts] == [[0, 1], [2, 3]]
    assert [p.unlabelled[0].tolist() for p in parts] == [[0, 1, 2], [3, 4, 5]]
    assert Batch.of({"inputs": batch.inputs, "unlabelled": batch.unlabelled}).unlabelled is batch.unlabelled


def test_a_task_keeps_a_stratified_part_of_its_labels() -> None:
    whole, task = (load_task(TaskConfig(labelled=n)) for n in (None, 50))
    assert len(task.train) == 50 and len(task.train.unlabelled) == len(whole.train) - 50
    assert torch.bincount(task.train.labels_tensor()).tolist() == [5] * 10
    assert task.describe()["unlabelled"] == 950 and task.fingerprint != whole.fingerprint
    rows = torch.cat([b.inputs for b in task.train.everything().batches()]).flatten(1)
    original = torch.cat([b.inputs for b in whole.train.batches()]).flatten(1)
    assert torch.equal(rows.sum(0), original.sum(0)) or torch.allclose(rows.sum(0), original.sum(0), rtol=1e-4)
    assert len({tuple(r) for r in rows.tolist()} ^ {tuple(r) for r in original.tolist()}) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SemiSupervisedData(numbered(3), None), "unlabelled set is empty"),
        (lambda: SemiSupervisedData(numbered(3), torch.zeros(0, 1)), "unlabelled set is empty"),
        (lambda: SemiSupervisedData(torch.zeros(3, 1), numbered(3)), "labelled part has no labels"),
        (lambda: keep_labels(numbered(3), torch.arange(3)), "unlabelled set is empty"),
        (lambda: SemiSupervisedStream(numbered(3), 2), "learns from unlabelled samples"),
        (lambda: load_task(TaskConfig(labelled=1001)), "labelled 1001 is more than the 1000"),
        (lambda: limbeck.fit("kd", unlabelled=torch.zeros(3, 1)), "goes with data of your own"),
    ],
)
def test_mistakes(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()

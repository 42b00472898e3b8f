"""A step of shrinking against the passes that its equations need, and judging a sub-network against training it for one epoch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from limbeck import networks
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.methods.search.deps import DepS
from limbeck.networks.supernets import SuperNetwork

ALLOWED_STEP, ALLOWED_JUDGING = 1.25, 0.5
TRAIN, VAL, BATCH = 1000, 300, 64


def _method() -> DepS:
    torch.manual_seed(0)
    net = networks.build("elasticmlp-d128-m512-l3", in_shape=(1, 8, 8), num_classes=10)
    assert isinstance(net, SuperNetwork)
    return DepS(net, steps=1000, batch_size=BATCH)


def _data(count: int) -> TensorData:
    generator = torch.Generator().manual_seed(count)
    return TensorData(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 10)


def steps() -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of the method once sub-networks are trained, and the same four networks by hand."""
    method = _method()
    method.steps_done.fill_(900)
    net = method.supernet
    batch = _data(BATCH).fetch(torch.arange(BATCH), None)
    small, *others = [net.extract(code).train() for code in list(method.codes(900).values())[1:]]
    full = net.extract(net.largest).train()

    def ours() -> None:
        method.losses(batch).total.backward()

    def bare() -> None:
        logits = full(batch.inputs)
        target = logits.detach().softmax(1)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
        for each in (small, *others):
            loss = loss - (target * each(batch.inputs).log_softmax(1)).sum(1).mean()
        loss.backward()

    return ours, bare


def judging() -> tuple[Callable[[], None], Callable[[], None]]:
    """Cutting a sub-network out, calibrating it and its accuracy on validation data; and an epoch of training it by itself."""
    method, train, val = _method(), _data(TRAIN), _data(VAL)
    method.calibrate_on(train)
    code = method.supernet.space.code(depth=2, hidden1=256, hidden2=128, hidden3=64)
    plain = method.supernet.extract(code).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)

    def ours() -> None:
        method.quality(code, val)

    def epoch() -> None:
        for start in range(0, TRAIN, BATCH):
            batch: Batch = train.fetch(torch.arange(start, min(start + BATCH, TRAIN)), None)
            optimizer.zero_grad()
            assert batch.labels is not None
            F.cross_entropy(plain(batch.inputs), batch.labels).backward()
            optimizer.step()

    return ours, epoch


def measure(
    ways: tuple[Callable[[], None], Callable[[], None]], allowed: float, rounds: int = 7, repeats: int = 10
) -> dict[str, float]:
    """The median over rounds of the first way's time over the second's, in turn first."""
    ratios = []
    for number in range(rounds + 1):
        spent = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            for _ in range(repeats):
                ways[which]()
            spent[which] = time.perf_counter() - began
        if number:  # the first round warms up
            ratios.append(spent[0] / spent[1])
    return {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": allowed}

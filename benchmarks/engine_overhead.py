"""A training step of ``kd`` through the engine against the same step written by hand in plain PyTorch."""

from __future__ import annotations

import copy
import statistics
import time

import torch
import torch.nn.functional as F

from limbeck import networks
from limbeck.core.data import Stream, TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.methods.models import KD
from limbeck.tasks.augment import ShiftFlip

ALLOWED = 1.05
STEPS = 200  # enough that starting the engine, once per run, does not count as the cost of a step


def data(n: int = 2048) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(n, 1, 28, 28, generator=generator) * 255).to(torch.uint8)
    labels = torch.randint(0, 10, (n,), generator=generator)
    return TensorData(pixels, labels, mean=[0.5], std=[0.3], augment=ShiftFlip(2))


def by_hand(student: torch.nn.Module, teacher: torch.nn.Module, train: TensorData) -> float:
    """Seconds for ``STEPS`` steps of what a careful person would write for this method."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    stream = Stream(train, 64)
    student.train()
    teacher.eval()
    began = time.perf_counter()
    for step in range(STEPS):
        batch = stream.batch(step)
        with torch.no_grad():
            zt = teacher(batch.inputs)
        zs = student(batch.inputs)
        kl = F.kl_div(F.log_softmax(zs / 4, -1), F.log_softmax(zt / 4, -1), reduction="batchmean", log_target=True)
        loss = 0.1 * F.cross_entropy(zs, batch.labels) + 0.9 * 16 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss.item()  # people log their loss
    return time.perf_counter() - began


def through_engine(student: torch.nn.Module, teacher: torch.nn.Module, train: TensorData) -> float:
    method = KD(student, teacher, steps=STEPS, batch_size=64, evaluations=0)
    engine = Engine(None, EngineConfig(progress=False))
    stages = method.stages(train)
    began = time.perf_counter()
    engine.run(method, stages)
    return time.perf_counter() - began


def measure(rounds: int = 12) -> dict[str, float]:
    """The median over rounds of engine / by hand; both run in every round, in turn first."""
    train = data()
    build = networks.build
    student = build("cnn-w8-s3", in_shape=(1, 28, 28), num_classes=10)
    teacher = build("cnn-w16-s3", in_shape=(1, 28, 28), num_classes=10)
    ratios = []
    for number in range(rounds + 1):
        runs = [("hand", by_hand), ("engine", through_engine)]
        seconds = {
            name: run(copy.deepcopy(student), copy.deepcopy(teacher), train)
            for name, run in runs[:: 1 if number % 2 else -1]
        }
        if number:  # the first round warms up
            ratios.append(seconds["engine"] / seconds["hand"])
    return {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": ALLOWED}

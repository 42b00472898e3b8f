"""An epoch with the teacher cache against one without, with a teacher of ten times the student's FLOPs."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.engine_overhead import data
from limbeck import networks
from limbeck.core.engine import Engine, EngineConfig
from limbeck.methods.models import KD
from limbeck.metrics.cost import count_flops

ALLOWED = 0.6
EPOCH = 32  # steps of 64 on 2,048 samples


def measure(rounds: int = 5) -> dict[str, float]:
    """The median over rounds of a warm cached epoch / an uncached epoch, both in every round."""
    train = data()
    sample = torch.zeros(2, 1, 28, 28)
    student = networks.build("cnn-w8-s3", in_shape=(1, 28, 28), num_classes=10)
    teacher = networks.build("cnn-w26-s3", in_shape=(1, 28, 28), num_classes=10)
    flops = count_flops(teacher, sample) / count_flops(student, sample)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            seconds = {}
            for cached in (False, True):
                method = KD(
                    copy.deepcopy(student), copy.deepcopy(teacher), steps=EPOCH, batch_size=64, views=1, evaluations=0
                )
                if cached:
                    method.cache_teacher(train, Path(folder))
                began = time.perf_counter()
                Engine(None, EngineConfig(progress=False)).run(method, method.stages(train))
                seconds[cached] = time.perf_counter() - began
            if number:  # the first round fills the cache
                ratios.append(seconds[True] / seconds[False])
    return {
        "ratio": statistics.median(ratios),
        "best": min(ratios),
        "worst": max(ratios),
        "allowed": ALLOWED,
        "flops_ratio": flops,
    }

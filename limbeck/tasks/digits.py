"""The 1,797 handwritten digits of scikit-learn (8x8, from the UCI repository): real data that is always there."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from limbeck.core.data import TensorData
from limbeck.tasks.augment import ShiftFlip
from limbeck.tasks.base import Task, TaskConfig, channel_statistics, flip_labels, stratified_order, take

TRAIN, VAL = 1000, 297  # and 500 for testing


def load(config: TaskConfig) -> Task:
    """1,000 training, 297 validation and 500 test images, (1, 8, 8) or resized, split by class proportions with a fixed seed."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy((raw.images * (255 / 16)).round().astype("uint8"))[:, None]
    if config.image_size is not None:
        size = (config.image_size, config.image_size)
        images = F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().to(torch.uint8)
    labels = torch.from_numpy(raw.target).long()
    order = stratified_order(labels, 0)
    parts = order[:TRAIN], order[TRAIN : TRAIN + VAL], order[TRAIN + VAL :]
    train = parts[0][take(labels[parts[0]], config.train_size, config.split_seed)]
    mean, std = channel_statistics(images[parts[0]])
    augment = ShiftFlip(1) if config.augment else None
    noisy = flip_labels(labels[train], config.label_noise, 10, config.split_seed)
    return Task(
        name="digits",
        train=TensorData(images[train], noisy, mean=mean, std=std, augment=augment, seed=config.split_seed),
        val=TensorData(images[parts[1]], labels[parts[1]], mean=mean, std=std),
        test=TensorData(images[parts[2]], labels[parts[2]], mean=mean, std=std),
        num_classes=10,
        in_shape=tuple(images.shape[1:]),
        class_names=[str(c) for c in range(10)],
        networks={"student": "cnn-w8-s3", "teacher": "cnn-w32-s3"},
        teacher_epochs=40,
        source="scikit-learn's digits (UCI Optical Recognition of Handwritten Digits, test part), 1,797 images",
    )

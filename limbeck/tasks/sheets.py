"""Pictures of data sets, for reports."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch

from limbeck.core.distilled import DistilledDataset

MOST = 10  # images of a class, and classes, that are shown
_GAP = 2


def distilled_sheet(dataset: DistilledDataset) -> str | None:
    """A PNG (base64) with a row of images for each class; None where the samples are no images of 1 or 3 channels.

    Args:
        dataset: its first ``MOST`` images of the first ``2 * MOST`` classes are shown.
    """
    from PIL import Image

    if dataset.kind != "images" or dataset.inputs.ndim != 4 or dataset.inputs.shape[1] not in (1, 3):
        return None
    pixels, labels = dataset.pixels().cpu(), dataset.hard_labels.cpu()
    _, channels, height, width = pixels.shape
    grow = max(1, 48 // max(height, width))
    shown = labels.unique()[: 2 * MOST]
    most = min(MOST, int(torch.bincount(labels).max()))
    cell_h, cell_w = height * grow + _GAP, width * grow + _GAP
    sheet = np.full((len(shown) * cell_h + _GAP, most * cell_w + _GAP, channels), 255, dtype=np.uint8)
    for row, label in enumerate(shown.tolist()):
        for column, image in enumerate(pixels[labels == label][:most]):
            large = image.numpy().transpose(1, 2, 0).repeat(grow, 0).repeat(grow, 1)
            top, left = row * cell_h + _GAP, column * cell_w + _GAP
            sheet[top : top + height * grow, left : left + width * grow] = large
    buffer = io.BytesIO()
    Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()

"""Images with their unimportant patches dropped: what is kept, what it weighs, and how the rest is filled in again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck.blocks.embeddings import evaluating
from limbeck.blocks.masking import TokenMask, patchify, unpatchify
from limbeck.blocks.patch_tokens import PatchDecoder, PatchEncoder
from limbeck.core.errors import InputError, RunError
from limbeck.core.files import atomic_path

Reconstructor = Callable[[Tensor, TokenMask], Tensor]
"""(images (B, C, H, W) whose dropped patches are zero, mask) -> pixels of all patches (B, L, p p C), on the images' scale."""


@dataclass(frozen=True)
class PatchStore:
    """Kept patches of N images and a bit per patch that says which they are.

    Attributes:
        patches: (N, K, p p C), uint8 or floating point as the images were, in the order of the grid.
        bits: (N, ⌈L / 8⌉) uint8, most significant bit first; 1 where a patch is kept.
        patch: p, the side of a patch in pixels.
        in_shape: (C, H, W).
    """

    patches: Tensor
    bits: Tensor
    patch: int
    in_shape: tuple[int, int, int]

    @classmethod
    def of(cls, images: Tensor, kept: Tensor, patch: int) -> PatchStore:
        """Keep the patches of images (N, C, H, W) where ``kept`` (N, L) is True, as many of each image.

        Raises:
            InputError: patches that do not tile the images, a mask of another size, or numbers of kept patches that differ.
        """
        rows = patchify(images, patch)
        if kept.shape != rows.shape[:2] or kept.dtype != torch.bool:
            raise InputError(
                f"a mask of kept patches is bool {tuple(rows.shape[:2])} for these images, not {tuple(kept.shape)}"
            )
        counts = kept.sum(1)
        if len(counts) == 0 or int(counts.min()) != int(counts.max()) or int(counts[0]) == 0:
            raise InputError("every image must keep the same number of patches, and at least one")
        bits = torch.from_numpy(np.packbits(kept.cpu().numpy(), axis=1))
        shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        return cls(rows[kept].reshape(len(rows), int(counts[0]), -1).cpu(), bits, patch, shape)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.in_shape[1] // self.patch, self.in_shape[2] // self.patch

    @property
    def kept(self) -> Tensor:
        """(N, L) bool, True where a patch is kept."""
        total = self.grid[0] * self.grid[1]
        return torch.from_numpy(np.unpackbits(self.bits.numpy(), axis=1, count=total)).bool()

    @property
    def bytes(self) -> int:
        """What it takes to store: kept pixels and the bit mask. A reconstructor is not counted, and must be there to fill the rest."""
        return self.patches.numel() * self.patches.element_size() + self.bits.numel()

    def __len__(self) -> int:
        return len(self.patches)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: ``patches``, ``bits``, and the sizes as metadata."""
        sizes = {"patch": str(self.patch), "in_shape": json.dumps(self.in_shape)}
        with atomic_path(Path(path)) as temporary:
            save_file({"patches": self.patches.contiguous(), "bits": self.bits.contiguous()}, temporary, sizes)

    @classmethod
    def load(cls, path: str | Path) -> PatchStore:
        """What :meth:`save` wrote.

        Raises:
            RunError: no such file, or one of another kind.
        """
        try:
            with safe_open(path, framework="pt") as file:
                sizes = file.metadata()
                channels, height, width = json.loads(sizes["in_shape"])
                parts = file.get_tensor("patches"), file.get_tensor("bits")
                return cls(*parts, int(sizes["patch"]), (channels, height, width))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path} is no store of patches: {error}") from None

    def holed(self) -> Tensor:
        """The images (N, C, H, W) with zeros in the place of dropped patches."""
        kept = self.kept
        rows = self.patches.new_zeros(*kept.shape, self.patches.shape[2])
        rows[kept] = self.patches.flatten(0, 1)
        return unpatchify(rows, self.patch, self.grid)

    @torch.no_grad()
    def reconstruct(
        self,
        reconstructor: Reconstructor | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The images with dropped patches filled in; kept pixels come back exactly: x̂ = x (1 - m) + y m.

        Args:
            reconstructor: fills dropped patches (:class:`MaskedAutoencoder`); None: each channel's mean over the kept pixels of the image.
            mean, std: (C,) of the normalisation that the reconstructor's images have, on the scale [0, 1] for uint8 images.
            batch_size: images at a time.
            device: where the reconstructor is.

        Returns:
            (N, C, H, W) in the type of the images, on the CPU; filled uint8 pixels are rounded and clipped.

        Raises:
            InputError: the reconstructor gives no patches of this size.
        """
        holed, kept = self.holed(), self.kept
        if reconstructor is None:
            filled = self._mean_patches().expand(-1, kept.shape[1], -1)
            return self._paste(filled)
        unit = 255.0 if self.patches.dtype == torch.uint8 else 1.0
        shape = (1, -1, 1, 1)
        centre = torch.zeros(1) if mean is None else torch.tensor(mean, dtype=torch.float32).view(shape)
        spread = torch.ones(1) if std is None else torch.tensor(std, dtype=torch.float32).view(shape)
        parts = []
        for images, visible in zip(holed.split(batch_size), kept.split(batch_size), strict=True):
            scaled = (images.float() / unit - centre) / spread
            scaled = scaled * self._pixel_mask(visible)  # zero on the normalised scale
            rows = reconstructor(scaled.to(device), token_mask(visible.to(device))).cpu().float()
            if rows.shape != (*visible.shape, self.patches.shape[2]):
                raise InputError(
                    f"the reconstructor gives {tuple(rows.shape)}, and the images have patches {(*visible.shape, self.patches.shape[2])}"
                )
            pixels = unpatchify(rows, self.patch, self.grid)
            parts.append(patchify((pixels * spread + centre) * unit, self.patch))
        return self._paste(torch.cat(parts))

    def _pixel_mask(self, kept: Tensor) -> Tensor:
        """(B, 1, H, W) float, 1 on kept pixels."""
        return unpatchify(kept[:, :, None].float().expand(-1, -1, self.patch**2), self.patch, self.grid)

    def _mean_patches(self) -> Tensor:
        """(N, 1, p p C): the mean colour of the kept pixels, all over a patch."""
        colour = self.patches.float().unflatten(2, (self.patch**2, self.in_shape[0])).mean((1, 2))
        return colour[:, None].repeat(1, self.patch**2, 1).flatten(1)[:, None]

    def _paste(self, rows: Tensor) -> Tensor:
        kept, dtype = self.kept, self.patches.dtype
        whole = rows.round().clamp(0, 255).to(dtype) if dtype == torch.uint8 else rows.to(dtype)
        whole = whole.clone()  # an expanded tensor cannot be written into
        whole[kept] = self.patches.flatten(0, 1)
        return unpatchify(whole, self.patch, self.grid)


class MaskedAutoencoder(nn.Module):
    """A masked autoencoder as a reconstructor: the encoder sees the kept patches alone, the decoder predicts all.

    Its decoder must predict pixels on the scale of its inputs (``norm_pix_loss`` off): patches that were standardised one by one in
    training cannot be put back, since the mean and spread of a dropped patch are not known.

    Args:
        encoder, decoder: views of a model's parts, such as :mod:`limbeck.adapters.patch_tokens` makes.

    Raises:
        InputError: a decoder for another number of patches than the encoder's.
    """

    def __init__(self, encoder: PatchEncoder, decoder: PatchDecoder) -> None:
        super().__init__()
        if decoder.positions.shape[1] != encoder.patches + 1:
            raise InputError(
                f"the decoder is for {decoder.positions.shape[1] - 1} patches, and the encoder cuts images into {encoder.patches}"
            )
        self.encoder, self.decoder = encoder, decoder
        self.models = nn.ModuleList([encoder.model, decoder.model])

    @torch.no_grad()
    def forward(self, images: Tensor, mask: TokenMask) -> Tensor:
        """(B, C, H, W) -> (B, L, p p C)."""
        self.encoder.check(images, "the masked autoencoder")
        with evaluating(self.models):
            latent = self.encoder(images, mask).latent
            return self.decoder.pixels(self.decoder.hidden(latent, mask))


def keep_important(importance: Tensor, drop: float, generator: torch.Generator | None = None) -> Tensor:
    """Which patches stay: the ``1 - drop`` part of highest importance.

    Args:
        importance: (N, L), or (N, rows, columns).
        drop: θ in [0, 1); ``round((1 - θ) L)`` patches stay, at least one.
        generator: breaks ties at random (most of a class-activation map may be zero); None: the first of equals stay.

    Returns:
        (N, L) bool.

    Raises:
        InputError: θ out of range.
    """
    if not 0 <= drop < 1:
        raise InputError(f"the part of patches to drop must be at least 0 and below 1 (got {drop})")
    flat = importance.flatten(1)
    count = max(1, int((1 - drop) * flat.shape[1] + 0.5 + 1e-9))
    if generator is None:
        order = flat.argsort(dim=1, descending=True, stable=True)
    else:
        shuffled = torch.rand(flat.shape, generator=generator).argsort(1).to(flat.device)
        order = shuffled.gather(1, flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True))
    kept = torch.zeros_like(flat, dtype=torch.bool)
    return kept.scatter_(1, order[:, :count], True)


def token_mask(kept: Tensor) -> TokenMask:
    """A mask (B, L), as many True in each row, as a masked autoencoder takes it; kept patches stay in the order of the grid."""
    order = (~kept).byte().argsort(dim=1, stable=True)
    return TokenMask(order[:, : int(kept[0].sum())], order.argsort(1), ~kept)

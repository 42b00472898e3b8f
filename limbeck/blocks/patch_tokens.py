"""Vision transformers seen as what masked pre-training needs: patch tokens, blocks that can be stopped, a decoder.

These are views: they hold references to a model's own modules, whatever library it comes from, and own no parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from limbeck.blocks.masking import TokenMask
from limbeck.core.errors import InputError


@dataclass(frozen=True)
class Encoded:
    """What an encoder gave.

    Attributes:
        tokens: (B, P + K, D) after the last block that ran, before any final norm; P prefix tokens come first.
        hidden: the same after the tapped blocks, by block index.
        norm: the encoder's final norm.
        prefix: P.
    """

    tokens: Tensor
    hidden: Mapping[int, Tensor]
    norm: nn.Module
    prefix: int

    @property
    def latent(self) -> Tensor:
        """(B, P + K, D) tokens after the final norm."""
        normed: Tensor = self.norm(self.tokens)
        return normed

    def mean(self, behind: int = 0) -> Tensor:
        """(B, D): the mean of the patch tokens before the final norm; ``behind`` tokens at the end are left out."""
        return self.tokens[:, self.prefix : self.tokens.shape[1] - behind].mean(1)


@dataclass(frozen=True)
class PatchEncoder:
    """An encoder of patches.

    Attributes:
        model: the module that the parts belong to.
        embed: images (B, C, H, W) -> patch tokens (B, L, D) with their positions.
        prefix: batch size -> prefix tokens (B, P, D) with their positions.
        blocks: the transformer blocks; (B, N, D) -> (B, N, D), or a tuple that starts with it.
        norm: the final norm.
        width: D.
        grid: rows and columns of patches.
        patch: side of a patch in pixels.
        channels: C.
        prefix_tokens: P.
    """

    model: nn.Module
    embed: Callable[[Tensor], Tensor]
    prefix: Callable[[int], Tensor]
    blocks: Sequence[nn.Module]
    norm: nn.Module
    width: int
    grid: tuple[int, int]
    patch: int
    channels: int
    prefix_tokens: int = 1
    embeddings: Collection[nn.Parameter] = field(default_factory=tuple)
    """Parameters in front of the first block, for layer-wise learning rates."""

    @property
    def patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    @property
    def in_shape(self) -> tuple[int, int, int]:
        return self.channels, self.grid[0] * self.patch, self.grid[1] * self.patch

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that the encoder learns: embedding, blocks, final norm."""
        yield from self.embeddings
        for block in self.blocks:
            yield from block.parameters()
        yield from self.norm.parameters()

    def check(self, images: Tensor, who: str = "the encoder") -> None:
        """That images fit.

        Raises:
            InputError: they do not.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.in_shape:
            c, h, w = self.in_shape
            raise InputError(
                f"{who} cuts images of shape ({c}, {h}, {w}) into a grid of {self.grid[0]}x{self.grid[1]} patches of {self.patch} "
                f"pixels; the images have shape {tuple(images.shape[1:])}"
            )

    def block(self, index: int, who: str = "the encoder") -> int:
        """``index`` as it is.

        Raises:
            InputError: there is no such block.
        """
        if not 0 <= index < len(self.blocks):
            raise InputError(f"{who} has blocks 0 to {len(self.blocks) - 1}, and no block {index}")
        return index

    def __call__(
        self,
        images: Tensor,
        mask: TokenMask | None = None,
        *,
        taps: Collection[int] = (),
        stop: int | None = None,
        behind: Tensor | None = None,
    ) -> Encoded:
        """Run the encoder.

        Args:
            images: (B, C, H, W).
            mask: only its visible patches go through the blocks; None: all do.
            taps: blocks whose outputs are wanted.
            stop: the last block to run; None: all.
            behind: (1, E, D) further tokens at the end of the sequence, without positions.
        """
        tokens = self.embed(images)
        if mask is not None:
            tokens = mask.select(tokens)
        parts = [self.prefix(len(tokens)), tokens]
        if behind is not None:
            parts.append(behind.expand(len(tokens), -1, -1))
        return Encoded(*_run(self.blocks, torch.cat(parts, 1), taps, stop), self.norm, self.prefix_tokens)


@dataclass(frozen=True)
class PatchDecoder:
    """The decoder of a masked autoencoder.

    Attributes:
        model: the module that the parts belong to.
        embed: linear from the encoder's width to d.
        mask_token: (1, 1, d).
        positions: (1, 1 + L, d), the class token first.
        blocks, norm: as in :class:`PatchEncoder`.
        predict: linear from d to the pixels of a patch.
        width: d.
    """

    model: nn.Module
    embed: nn.Module
    mask_token: Tensor
    positions: Tensor
    blocks: Sequence[nn.Module]
    norm: nn.Module
    predict: nn.Module
    width: int

    def hidden(self, latent: Tensor, mask: TokenMask, stop: int | None = None) -> Tensor:
        """(B, 1 + L, d) after block ``stop`` (None: the last), before the decoder's norm.

        Args:
            latent: (B, 1 + K, D) the encoder's tokens after its final norm, one class token in front.
        """
        tokens = self.embed(latent)
        tokens = torch.cat([tokens[:, :1], mask.fill(tokens[:, 1:], self.mask_token)], 1) + self.positions
        return _run(self.blocks, tokens, (), stop)[0]

    def pixels(self, hidden: Tensor) -> Tensor:
        """(B, L, patch * patch * C) from the last block's output."""
        predicted: Tensor = self.predict(self.norm(hidden[:, 1:]))
        return predicted


def same_patches(student: PatchEncoder, teacher: PatchEncoder) -> None:
    """That a token means the same patch to both.

    Raises:
        InputError: the grids, patches or channels differ.
    """
    ours, theirs = ((e.grid, e.patch, e.channels) for e in (student, teacher))
    if ours != theirs:

        def told(e: PatchEncoder) -> str:
            return f"a {e.grid[0]}x{e.grid[1]} grid of patches of {e.patch} pixels in {e.channels} channels"

        raise InputError(
            f"token grids do not match: the student has {told(student)}, the teacher {told(teacher)}; they must be the same"
        )


def _run(
    blocks: Sequence[nn.Module], tokens: Tensor, taps: Collection[int], stop: int | None
) -> tuple[Tensor, dict[int, Tensor]]:
    hidden: dict[int, Tensor] = {}
    for number, block in enumerate(blocks):
        out = block(tokens)
        tokens = out[0] if isinstance(out, tuple) else out
        if number in taps:
            hidden[number] = tokens
        if number == stop:
            break
    return tokens, hidden

"""MLP-Mixer."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.networks.base import Network, isotropic_stages, patch_grid


class MLPMixer(Network):
    """Patches mixed across positions and across channels in turn, by MLPs alone.

    Blocks are the modules ``blocks.0``, ``blocks.1``, ...; their outputs are ``(B, N, D)`` with N patch tokens row by
    row and no prefix token. A last layer norm, the mean over tokens and one linear layer follow.

    Args:
        in_shape: ``(C, H, W)``.
        num_classes: number of logits.
        width: token width D.
        depth: number of blocks.
        patch: side of a patch in pixels.
        token_hidden: hidden width of the token-mixing MLPs; ``D / 2`` if not given.
        channel_hidden: hidden width of the channel-mixing MLPs; ``4 D`` if not given.

    Raises:
        InputError: ``patch`` does not divide the image.

    Source: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision" (2021).
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 48,
        depth: int = 4,
        patch: int = 4,
        token_hidden: int | None = None,
        channel_hidden: int | None = None,
    ) -> None:
        super().__init__(in_shape, num_classes)
        self.grid = patch_grid(self.in_shape, patch)
        tokens = self.grid[0] * self.grid[1]
        token_hidden, channel_hidden = token_hidden or max(width // 2, 1), channel_hidden or 4 * width
        self.patches = nn.Conv2d(self.in_shape[0], width, patch, stride=patch)
        self.blocks = nn.Sequential(*[MixerBlock(tokens, width, token_hidden, channel_hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.num_classes)
        self.feature_dim = width
        self.stage_paths = [f"blocks.{index}" for index in isotropic_stages(depth)]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        """The mean token after the last norm, ``(B, C, H, W) -> (B, feature_dim)``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        features: Tensor = self.norm(self.blocks(tokens)).mean(1)
        return features


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each a GELU MLP after a layer norm with a shortcut around it."""

    def __init__(self, tokens: int, width: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.token_mlp = nn.Sequential(nn.Linear(tokens, token_hidden), nn.GELU(), nn.Linear(token_hidden, tokens))
        self.norm2 = nn.LayerNorm(width)
        self.channel_mlp = nn.Sequential(nn.Linear(width, channel_hidden), nn.GELU(), nn.Linear(channel_hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, D) -> (B, N, D)``."""
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))

"""Vision transformers, built by 🤗 transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.networks.base import Network, isotropic_stages, patch_grid

if TYPE_CHECKING:
    from transformers import ViTForImageClassification


class ImageTransformer(Network):
    """A ``ViTForImageClassification`` that takes pixels and returns logits.

    ``vit`` and ``classifier`` are that model's own modules under its own names, so state dicts fit both ways and
    :meth:`to_transformers` gives the 🤗 model around the same weights. Block outputs are ``(B, 1 + N, D)``: one class
    token, then N patch tokens row by row. Nothing is dropped out. Weights start with deviation ``1 / sqrt(D)``.

    Args:
        in_shape: ``(C, H, W)``.
        num_classes: number of logits.
        width: token width D.
        depth: number of blocks.
        heads: attention heads.
        patch: side of a patch in pixels.
        mlp_ratio: hidden width of a block's MLP over D.

    Raises:
        InputError: ``patch`` does not divide the image, or ``heads`` does not divide ``width``.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale" (2021).
    """

    head_path = "classifier"
    prefix_tokens = 1

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 64,
        depth: int = 6,
        heads: int = 4,
        patch: int = 4,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__(in_shape, num_classes)
        from transformers import ViTConfig, ViTForImageClassification

        if width % heads:
            raise InputError(f"{heads} attention heads do not divide the width {width} of a vision transformer")
        self.grid = patch_grid(self.in_shape, patch)
        # Eager attention is as fast at these sizes, and unlike the fused kernels it has second derivatives (unrolled
        # and gradient-matching methods take them) and batches under vmap.
        general: dict[str, Any] = {"num_labels": self.num_classes, "attn_implementation": "eager"}
        self.config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp_ratio * width,
            image_size=(self.in_shape[1], self.in_shape[2]),
            patch_size=patch,
            num_channels=self.in_shape[0],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            # The customary 0.02 suits widths of many hundreds; narrow networks hardly learn from it at first.
            initializer_range=width**-0.5,
            **general,
        )
        whole = ViTForImageClassification(self.config)
        self.vit, self.classifier = whole.vit, whole.classifier
        self.feature_dim = width
        # The list of blocks is called differently in different versions of transformers.
        stacks = [name for name, module in self.named_modules() if isinstance(module, nn.ModuleList)]
        self.stage_paths = [f"{stacks[0]}.{index}" for index in isotropic_stages(depth)]

    def embed(self, x: Tensor) -> Tensor:
        """The class token after the last norm, ``(B, C, H, W) -> (B, feature_dim)``."""
        tokens: Tensor = self.vit(pixel_values=x).last_hidden_state
        return tokens[:, 0]

    def to_transformers(self) -> ViTForImageClassification:
        """The 🤗 model around the same modules (shared, not copied), for ``save_pretrained`` and pipelines."""
        from transformers import ViTForImageClassification

        model = ViTForImageClassification(self.config)
        model.vit, model.classifier = self.vit, self.classifier
        return model

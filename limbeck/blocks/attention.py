"""Multi-head self-attention with separate query, key and value layers, so that heads can be taken away one by one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class SelfAttention(nn.Module):
    """Softmax attention of every token to every token.

    Args:
        width: of the tokens.
        heads: how many.
        head_width: channels of one head; the inner width is ``heads * head_width``, which need not be ``width``.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        inner = heads * head_width
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, width) -> (B, N, width)``."""
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        result: Tensor = self.out(mixed)
        return result

"""Text encoders, built by 🤗 transformers: token ids in, hidden states of every layer out.

They are that library's own models, so its ``save_pretrained`` and everything else works on them. An input is called by keywords,
``encoder(input_ids=(B, T), attention_mask=(B, T))``, and T is at most the number of tokens that they were built for. ``num_classes``
is the number of token ids. Token 0 is padding. Weights start with deviation ``1 / sqrt(D)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from limbeck.core.errors import InputError
from limbeck.networks.transformer_sizes import divided, window

if TYPE_CHECKING:
    from transformers import BertModel, ModernBertModel

KIND = "a text encoder"


def bert(
    in_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 6,
    heads: int = 4,
    dropout: float = 0.0,
) -> BertModel:
    """A BERT encoder: post-norm blocks, learned absolute positions.

    Args:
        in_shape: ``(tokens,)``, the window.
        num_classes: number of token ids.
        width: token width D.
        depth: number of blocks.
        heads: attention heads.
        dropout: of the embeddings and the blocks' outputs; none in the attention.

    Raises:
        InputError: ``in_shape`` is not one number, or ``heads`` does not divide ``width``.

    Source: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2019).
    """
    from transformers import BertConfig, BertModel

    general: dict[str, Any] = {"architectures": ["BertModel"]}
    config = BertConfig(
        vocab_size=num_classes,
        hidden_size=divided(width, heads, KIND),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=window(in_shape, KIND),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        initializer_range=width**-0.5,
        pad_token_id=0,
        **general,
    )
    return BertModel(config, add_pooling_layer=False)


def modernbert(
    in_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 6,
    heads: int = 4,
    dropout: float = 0.0,
) -> ModernBertModel:
    """A ModernBERT encoder: pre-norm blocks, rotary positions, gated MLP, full attention in every block.

    Args:
        in_shape, num_classes, width, depth, heads: see :func:`bert`; ``width / heads`` must be even, for the rotation.
        dropout: of the MLP and the embeddings.

    Raises:
        InputError: see :func:`bert`.

    Source: "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder" (2024).
    """
    from transformers import ModernBertConfig, ModernBertModel

    if divided(width, heads, KIND) // heads % 2:
        raise InputError(f"rotary positions need an even width per head, not {width} / {heads}")
    general: dict[str, Any] = {"architectures": ["ModernBertModel"]}
    config = ModernBertConfig(
        vocab_size=num_classes,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=window(in_shape, KIND),
        layer_types=["full_attention"] * depth,
        mlp_dropout=dropout,
        embedding_dropout=dropout,
        initializer_range=width**-0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
        **general,
    )
    return ModernBertModel(config)

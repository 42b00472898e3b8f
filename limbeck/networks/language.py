"""Small language models, built by 🤗 transformers: causal decoders, and encoders that classify tokens or texts.

They are that library's own models, so its ``save_pretrained``, ``generate`` and everything else works on them. An input is token ids (B, T), T at most the
number of tokens that they were built for; the answer has ``logits``: (B, T, ids) of decoders, (B, T, classes) of taggers, (B, classes) of classifiers.
Weights start with deviation ``1 / sqrt(D)`` (smaller where a model divides it by depth).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from limbeck.core.errors import InputError
from limbeck.networks.transformer_sizes import divided, window

if TYPE_CHECKING:
    from transformers import (
        BertForSequenceClassification,
        BertForTokenClassification,
        GPT2LMHeadModel,
        LlamaForCausalLM,
    )

KIND = "a language model"


def gpt(
    in_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 3,
    heads: int = 4,
    dropout: float = 0.0,
) -> GPT2LMHeadModel:
    """A GPT-2 decoder: pre-norm blocks, learned absolute positions; output weights of their own.

    Args:
        in_shape: ``(tokens,)``, the context.
        num_classes: number of token ids.
        width: token width D.
        depth: number of blocks.
        heads: attention heads.
        dropout: of embeddings, attention and the blocks' outputs.

    Raises:
        InputError: ``in_shape`` is not one number, or ``heads`` does not divide ``width``.

    Source: "Language Models are Unsupervised Multitask Learners" (2019).
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    general: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"]}
    config = GPT2Config(
        vocab_size=num_classes,
        n_positions=window(in_shape, KIND),
        n_embd=divided(width, heads, KIND),
        n_layer=depth,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=width**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        **general,
    )
    return GPT2LMHeadModel(config)


def llama(
    in_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 3,
    heads: int = 4,
) -> LlamaForCausalLM:
    """A Llama decoder: RMS norms, rotary positions, gated MLP, no biases.

    Args:
        in_shape, num_classes, width, depth, heads: see :func:`gpt`; ``width / heads`` must be even, for the rotation.

    Raises:
        InputError: see :func:`gpt`.

    Source: "LLaMA: Open and Efficient Foundation Language Models" (2023).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if divided(width, heads, KIND) // heads % 2:
        raise InputError(f"rotary positions need an even width per head, not {width} / {heads}")
    general: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    config = LlamaConfig(
        vocab_size=num_classes,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=window(in_shape, KIND),
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
        **general,
    )
    return LlamaForCausalLM(config)


def berttagger(
    in_shape: tuple[int, ...], num_classes: int, *, vocabulary: int = 256, **options: Any
) -> BertForTokenClassification:
    """A BERT encoder that gives every token a class.

    Args:
        in_shape: ``(tokens,)``. num_classes: of the tokens.
        vocabulary: number of token ids.
        options: ``width``, ``depth``, ``heads``, ``dropout`` as of :func:`gpt`.
    """
    from transformers import BertForTokenClassification

    return BertForTokenClassification(_bert("BertForTokenClassification", in_shape, num_classes, vocabulary, **options))


def bertclassifier(
    in_shape: tuple[int, ...], num_classes: int, *, vocabulary: int = 256, **options: Any
) -> BertForSequenceClassification:
    """A BERT encoder that gives a text a class. Arguments as :func:`berttagger`."""
    from transformers import BertForSequenceClassification

    name = "BertForSequenceClassification"
    return BertForSequenceClassification(_bert(name, in_shape, num_classes, vocabulary, **options))


def _bert(
    architecture: str,
    in_shape: tuple[int, ...],
    num_classes: int,
    vocabulary: int,
    width: int = 64,
    depth: int = 3,
    heads: int = 4,
    dropout: float = 0.0,
) -> Any:
    from transformers import BertConfig

    general: dict[str, Any] = {"architectures": [architecture], "num_labels": num_classes}
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=divided(width, heads, KIND),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=window(in_shape, KIND),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=dropout,
        initializer_range=width**-0.5,
        pad_token_id=None,
        **general,
    )

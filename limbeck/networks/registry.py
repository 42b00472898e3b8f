"""Networks by name.

A name is a family followed by options: ``family[-key value | -number | -word ...]``, such as ``convnet-w16-d3-batch``,
``resnet8x4``, ``wrn-40-2``, ``mlp-256-256``. Keys are single letters and may come in any order; what is left out takes
the family's default. A name with a colon is somebody else's factory, see :mod:`limbeck.networks.factories`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from limbeck.core.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """How the names of one family are read. Its class is imported on first use, so that names cost no torch import."""

    module: str
    factory: str
    form: str
    examples: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)  # letter -> argument
    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # word -> (argument, value)
    numbers: tuple[str, ...] = ()  # arguments of the bare numbers in turn; all of them must be there
    list_of: str | None = None  # the one argument that takes every bare number


FAMILIES: dict[str, Family] = {
    "convnet": Family(
        "convnet",
        "ConvNet",
        "convnet[-w<width>][-d<depth>][-instance|-batch|-layer|-none]",
        ("convnet-w16-d3", "convnet-w32-d3", "convnet-w128-d3", "convnet-w128-d3-batch"),
        keys={"w": "width", "d": "depth"},
        words={norm: ("norm", norm) for norm in ("instance", "batch", "layer", "none")},
    ),
    "cnn": Family(
        "cnn",
        "CNN",
        "cnn[-w<width>][-s<stages>][-b<blocks per stage>]",
        ("cnn-w8-s3", "cnn-w16-s3", "cnn-w32-s3", "cnn-w32-s3-b2"),
        keys={"w": "width", "s": "stages", "b": "blocks"},
    ),
    "vgg": Family(
        "vgg",
        "vgg",
        "vgg[-w<width>][-s<stages>][-b<convolutions per stage>], or vgg<11|13|16|19>",
        ("vgg-w32-s3", "vgg-w32-s4", "vgg11", "vgg16"),
        keys={"w": "width", "s": "stages", "b": "blocks"},
        list_of="depth",
    ),
    "resnet": Family(
        "resnet",
        "ResNet",
        "resnet<depth>[x<widening>]",
        ("resnet20", "resnet32", "resnet56", "resnet110", "resnet8x4", "resnet32x4"),
        keys={"x": "multiplier"},
        numbers=("depth",),
    ),
    "wrn": Family(
        "resnet",
        "WideResNet",
        "wrn-<depth>-<widening>",
        ("wrn-16-1", "wrn-16-2", "wrn-40-1", "wrn-40-2", "wrn-28-10"),
        numbers=("depth", "widen"),
    ),
    "stageresnet": Family(
        "stage_resnet",
        "StageResNet",
        "stageresnet-<blocks of each stage>...[-w<width>]",
        ("stageresnet-1-1-1", "stageresnet-5-5-7", "stageresnet-9-9-9", "stageresnet-3-1-3-w8"),
        keys={"w": "width"},
        list_of="blocks",
    ),
    "cell": Family(
        "cells",
        "CellNetwork",
        "cell-<six operations, 1 to 5>[-w<width>][-n<cells per stage>][-s<stages>]",
        ("cell-444444", "cell-244342-w8", "cell-444444-w16-n5-s3"),
        keys={"w": "width", "n": "cells", "s": "stages"},
        numbers=("operations",),
    ),
    "vit": Family(
        "vit",
        "ImageTransformer",
        "vit[-d<width>][-l<blocks>][-h<heads>][-p<patch>]",
        ("vit-d48-l4-h4-p2", "vit-d64-l6-h4-p2", "vit-d64-l6-h4-p4", "vit-d192-l12-h3-p4"),
        keys={"d": "width", "l": "depth", "h": "heads", "p": "patch"},
    ),
    "maevit": Family(
        "mae",
        "MAEViT",
        "maevit[-d<width>][-l<blocks>][-h<heads>][-p<patch>]",
        ("maevit-d24-l4-h4-p2", "maevit-d64-l6-h4-p2", "maevit-d64-l6-h4-p4"),
        keys={"d": "width", "l": "depth", "h": "heads", "p": "patch"},
    ),
    "distvit": Family(
        "mae",
        "DistilledViT",
        "distvit[-d<width>][-l<blocks>][-h<heads>][-p<patch>]",
        ("distvit-d24-l4-h4-p2", "distvit-d64-l6-h4-p4"),
        keys={"d": "width", "l": "depth", "h": "heads", "p": "patch"},
    ),
    "mixer": Family(
        "mixer",
        "MLPMixer",
        "mixer[-d<width>][-l<blocks>][-p<patch>]",
        ("mixer-d48-l4-p2", "mixer-d48-l4-p4", "mixer-d128-l8-p4"),
        keys={"d": "width", "l": "depth", "p": "patch"},
    ),
    "bert": Family(
        "text",
        "bert",
        "bert[-d<width>][-l<blocks>][-h<heads>]",
        ("bert-d64-l6-h4", "bert-d96-l6-h4"),
        keys={"d": "width", "l": "depth", "h": "heads"},
    ),
    "modernbert": Family(
        "text",
        "modernbert",
        "modernbert[-d<width>][-l<blocks>][-h<heads>]",
        ("modernbert-d64-l6-h4", "modernbert-d96-l6-h4"),
        keys={"d": "width", "l": "depth", "h": "heads"},
    ),
    "gpt": Family(
        "language",
        "gpt",
        "gpt[-d<width>][-l<blocks>][-h<heads>]",
        ("gpt-d64-l3-h4", "gpt-d128-l6-h4"),
        keys={"d": "width", "l": "depth", "h": "heads"},
    ),
    "llama": Family(
        "language",
        "llama",
        "llama[-d<width>][-l<blocks>][-h<heads>]",
        ("llama-d64-l3-h4", "llama-d128-l6-h4"),
        keys={"d": "width", "l": "depth", "h": "heads"},
    ),
    **{
        kind: Family(
            "language",
            kind,
            f"{kind}[-d<width>][-l<blocks>][-h<heads>][-v<token ids>]",
            (f"{kind}-d64-l3-h4-v256",),
            keys={"d": "width", "l": "depth", "h": "heads", "v": "vocabulary"},
        )
        for kind in ("berttagger", "bertclassifier")
    },
    "segmenter": Family(
        "segmenter",
        "Segmenter",
        "segmenter[-w<width>][-l<levels>][-b<blocks per level>]",
        ("segmenter-w8-l3-b1", "segmenter-w24-l3-b3", "segmenter-w48-l3-b1"),
        keys={"w": "width", "l": "levels", "b": "blocks"},
    ),
    **{
        kind: Family(
            "graphs",
            kind,
            f"{kind}[-w<width>][-l<layers>][-e<edge labels>]{'[-h<heads>]' if kind == 'gat' else ''}[-mean|-sum]",
            (f"{kind}-w32-l2", f"{kind}-w64-l3-sum"),
            keys={"w": "width", "l": "depth", "e": "edge_values", **({"h": "heads"} if kind == "gat" else {})},
            words={readout: ("readout", readout) for readout in ("mean", "sum")},
        )
        for kind in ("gcn", "gin", "gat", "sage")
    },
    "nodemlp": Family(
        "node_mlp",
        "NodeMLP",
        "nodemlp[-<width>...][-p<dropout in percent>][-batch|-none]",
        ("nodemlp-128-p50", "nodemlp-128-p10-none"),
        keys={"p": "percent"},
        words={norm: ("norm", norm) for norm in ("batch", "none")},
        list_of="widths",
    ),
    "mlp": Family(
        "mlp",
        "MLP",
        "mlp[-<width>...]",
        ("mlp-64", "mlp-256-256", "mlp-1024-1024"),
        list_of="widths",
    ),
    "resmlp": Family(
        "residual_mlp",
        "ResidualMLP",
        "resmlp[-d<width>][-<hidden width of each block>...]",
        ("resmlp-d128-512-256-64",),
        keys={"d": "width"},
        list_of="hidden",
    ),
    "elasticmlp": Family(
        "residual_mlp",
        "elastic_mlp",
        "elasticmlp[-d<width>][-m<hidden>][-l<blocks>]",
        ("elasticmlp-d128-m512-l3",),
        keys={"d": "width", "m": "hidden", "l": "depth"},
    ),
    "mbconv": Family(
        "mbconv",
        "MBConvNet",
        "mbconv[-w<width>][-d<blocks of each stage, a digit each>][-<expansion and kernel of each block, a digit each>...]",
        ("mbconv-w16-d12-65-63-43",),
        keys={"w": "width", "d": "depths"},
        list_of="blocks",
    ),
    "elasticmbconv": Family(
        "mbconv",
        "elastic_mbconv",
        "elasticmbconv[-w<width>][-s<stages>][-d<blocks per stage>][-e<largest expansion>][-k<largest kernel>]",
        ("elasticmbconv-w8-s2-d2-e4-k5",),
        keys={"w": "width", "s": "stages", "d": "depth", "e": "expansion", "k": "kernel"},
    ),
    "rescnn": Family(
        "residual_cnn",
        "ResidualCNN",
        "rescnn[-w<width>][-d<blocks of each stage, a digit each>][-<middle channels of each block>...]",
        ("rescnn-w16-d12-8-32-16",),
        keys={"w": "width", "d": "depths"},
        list_of="middles",
    ),
    "elasticcnn": Family(
        "residual_cnn",
        "elastic_cnn",
        "elasticcnn[-w<width>][-s<stages>][-d<blocks per stage>][-m<middle channels per channel>]",
        ("elasticcnn-w8-s3-d2",),
        keys={"w": "width", "s": "stages", "d": "depth", "m": "middle"},
    ),
    "slimvit": Family(
        "slim_vit",
        "SlimViT",
        "slimvit[-d<width>][-p<patch>][-k<head width>][-<heads>-<hidden width> of each block...]",
        ("slimvit-d48-p2-k12-4-96-2-48",),
        keys={"d": "width", "p": "patch", "k": "head_width"},
        list_of="blocks",
    ),
    "elasticvit": Family(
        "slim_vit",
        "elastic_vit",
        "elasticvit[-d<width>][-p<patch>][-k<head width>][-l<blocks>][-h<heads>][-m<hidden width>]",
        ("elasticvit-d48-p2-k12-l4-h4-m96",),
        keys={"d": "width", "p": "patch", "k": "head_width", "l": "depth", "h": "heads", "m": "hidden"},
    ),
}

_TOKEN = re.compile(r"-?([a-z]*)([0-9]*)")


def names() -> list[str]:
    """A name of every family in common sizes; other sizes are named alike."""
    return [example for family in FAMILIES.values() for example in family.examples]


def build(name: str, *, in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: such as ``convnet-w16-d3``, or ``package.module:factory``.
        in_shape: ``(C, H, W)`` of one input.
        num_classes: number of logits.

    Returns:
        ``(B, C, H, W) -> (B, num_classes)`` logits. It remembers what it was built from, see :func:`spec_of`.

    Raises:
        UnknownNameError: no family reads the name.
        InputError: the sizes do not fit the input, or the factory does not deliver a module.
    """
    from limbeck.networks.base import check_sizes

    in_shape, num_classes = check_sizes(in_shape, num_classes)
    network: nn.Module
    if ":" in name:
        from limbeck.networks.factories import call_factory

        network = call_factory(name, in_shape=in_shape, num_classes=num_classes)
    else:
        family, options = _parse(name)
        factory = getattr(importlib.import_module(f"limbeck.networks.{family.module}"), family.factory)
        network = factory(in_shape, num_classes, **options)
    spec = {"name": name, "in_shape": list(in_shape), "num_classes": num_classes}
    vars(network).update(limbeck_name=name, limbeck_spec=spec)
    return network


def spec_of(model: nn.Module) -> dict[str, Any] | None:
    """What :func:`build` made the network from: ``name``, ``in_shape``, ``num_classes``; JSON values.

    ``None`` for a module that was not built by name.
    """
    spec = getattr(model, "limbeck_spec", None)
    return None if spec is None else {**spec, "in_shape": list(spec["in_shape"])}


def rebuild(spec: Mapping[str, Any]) -> nn.Module:
    """The network of :func:`spec_of` again, with fresh weights.

    Raises:
        InputError: an entry is missing, or as :func:`build`.
    """
    missing = [key for key in ("name", "in_shape", "num_classes") if key not in spec]
    if missing:
        raise InputError(f"the network spec {dict(spec)} lacks {', '.join(missing)}")
    return build(spec["name"], in_shape=tuple(spec["in_shape"]), num_classes=spec["num_classes"])


def _parse(name: str) -> tuple[Family, dict[str, Any]]:
    """The family of a name, and the keyword arguments that its options stand for."""
    letters = re.match(r"[a-z]*", name)
    head = letters.group() if letters else ""
    if head not in FAMILIES:
        raise UnknownNameError("network", name, names(), hint=f"Families are {', '.join(FAMILIES)}.")
    family = FAMILIES[head]
    unreadable = UnknownNameError("network", name, names(), hint=f"The form is {family.form}.")

    options: dict[str, Any] = {}
    numbers: list[int] = []
    value: int | str
    at = len(head)
    while at < len(name):
        token = _TOKEN.match(name, at)
        key, digits = token.groups() if token else ("", "")
        if not token or not (key or digits):
            raise unreadable
        if digits and int(digits) < 1:
            raise InputError(f"'{token.group().lstrip('-')}' in the network name '{name}' must be at least 1")
        if key in family.words and not digits:
            argument, value = family.words[key]
        elif key in family.keys and digits:
            argument, value = family.keys[key], int(digits)
        elif not key:
            numbers.append(int(digits))
            at = token.end()
            continue
        else:
            raise unreadable
        if argument in options:
            raise unreadable
        options[argument] = value
        at = token.end()

    if family.list_of is not None:
        return family, options | ({family.list_of: tuple(numbers)} if numbers else {})
    if len(numbers) != len(family.numbers):
        raise unreadable
    return family, options | dict(zip(family.numbers, numbers, strict=True))

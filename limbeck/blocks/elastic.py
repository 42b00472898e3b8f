"""Layers that hold many sizes of themselves: fewer channels, smaller kernels, fewer blocks, on one set of weights.

An elastic layer is a plain torch layer with another forward pass: it takes the *first* channels of its weights, as many as its
input has and as its ``width`` says, the centre of its kernel, or the first blocks of a stage. Its parameters and their names stay
what they were, and at full size so do its outputs. :func:`make_elastic` turns the layers of a network into elastic ones in place;
:func:`cut` gives the active sub-network as a plain module of its own.

Source: the elastic layers of "Once-for-All: Train One Network and Specialize it for Efficient Deployment" (2020), without its kernel
transforms, as "DepS: Delayed ε-Shrinking for Faster Once-For-All Training" (2024) uses them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from limbeck.blocks.attention import SelfAttention
from limbeck.blocks.squeeze_excite import SqueezeExcite
from limbeck.core.errors import InputError

Parts = dict[str, tuple[Any, ...]]
"""By the name of a parameter or buffer, the index of the part of it that is in use."""


class ElasticLayer(nn.Module):
    """What all elastic layers share.

    Attributes:
        adjustable: what can be set: ``width``, ``kernel``, ``depth``.
        inputs: channels of the last input; None before the first forward pass.
        work: FLOPs of the last forward pass for one sample, a multiply-add as 2.
    """

    plain: ClassVar[type[nn.Module]]
    adjustable: ClassVar[tuple[str, ...]] = ()
    inputs: int | None
    work: float

    def begin(self) -> None:
        """Full size; called when a plain layer becomes elastic."""
        self.inputs, self.work = None, 0.0

    def largest(self, what: str) -> int:
        """The full ``width``, ``kernel`` or ``depth``."""
        raise NotImplementedError(f"{type(self).__name__} has no {what} to set")

    def parts(self) -> Parts:
        """Which part of its own parameters and buffers is in use."""
        return {}

    def cut(self) -> nn.Module:
        """The plain layer of the active size, with copies of its weights."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is cut")

    def _filled(self, twin: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, index in self.parts().items():
                getattr(twin, name).copy_(getattr(self, name)[index])
        return twin.train(self.training)

    def _like(self) -> dict[str, Any]:
        tensor = next(iter(self.parameters(recurse=False)), None)
        return {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}


class ElasticLinear(ElasticLayer, nn.Linear):
    """A linear layer whose outputs are the first ``width``, for the first inputs."""

    plain, adjustable = nn.Linear, ("width",)

    def begin(self) -> None:
        super().begin()
        self.width = self.out_features

    def largest(self, what: str) -> int:
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        self.inputs = x.shape[-1]
        self.work = 2.0 * (x.numel() // len(x)) * self.width
        return F.linear(x, _first(_first(self.weight, self.width), self.inputs, 1), _first(self.bias, self.width))

    def parts(self) -> Parts:
        out = slice(self.width)
        return {"weight": (out, slice(self.inputs)), **({} if self.bias is None else {"bias": (out,)})}

    def cut(self) -> nn.Module:
        assert self.inputs is not None
        return self._filled(skip_init(nn.Linear, self.inputs, self.width, bias=self.bias is not None, **self._like()))


class ElasticConv2d(ElasticLayer, nn.Conv2d):
    """A convolution whose outputs are the first ``width``, for the first inputs, with the centre of its kernel.

    A depth-wise one (a group for each channel) has as many outputs as its input has channels, and no width of its own.
    """

    plain, adjustable = nn.Conv2d, ("width", "kernel")

    def begin(self) -> None:
        super().begin()
        self.width, self.kernel = self.out_channels, self.kernel_size[0]

    @property
    def depthwise(self) -> bool:
        return self.groups > 1

    def largest(self, what: str) -> int:
        return self.kernel_size[0] if what == "kernel" else self.out_channels

    def forward(self, x: Tensor) -> Tensor:
        self.inputs = x.shape[1]
        outputs, groups = (self.inputs, self.inputs) if self.depthwise else (self.width, 1)
        weight = _first(self.weight, outputs)
        weight = weight if self.depthwise else _first(weight, self.inputs, 1)
        if self.kernel < self.kernel_size[0]:
            edge = (self.kernel_size[0] - self.kernel) // 2
            weight = weight[..., edge : edge + self.kernel, edge : edge + self.kernel]
        out = F.conv2d(x, weight, _first(self.bias, outputs), self.stride, self._pads(), self.dilation, groups)
        self.work = 2.0 * (out.numel() // len(out)) * (weight.numel() // outputs)
        return out

    def parts(self) -> Parts:
        outputs = slice(self.inputs if self.depthwise else self.width)
        lost = (self.kernel_size[0] - self.kernel) // 2
        centre = slice(lost, self.kernel_size[0] - lost) if lost else slice(None)
        index = (outputs, slice(None) if self.depthwise else slice(self.inputs), centre, centre)
        return {"weight": index, **({} if self.bias is None else {"bias": (outputs,)})}

    def cut(self) -> nn.Module:
        assert self.inputs is not None
        outputs, groups = (self.inputs, self.inputs) if self.depthwise else (self.width, 1)
        kernel = self.kernel_size if self.kernel == self.kernel_size[0] else (self.kernel, self.kernel)
        twin = skip_init(
            nn.Conv2d, self.inputs, outputs, kernel, self.stride, self._pads(), self.dilation, groups,
            bias=self.bias is not None, **self._like(),
        )  # fmt: skip
        return self._filled(twin)

    def _pads(self) -> Any:
        """As much less on each side as the kernel lost, so that maps keep their size."""
        if isinstance(self.padding, str) or self.kernel == self.kernel_size[0]:
            return self.padding
        lost = (self.kernel_size[0] - self.kernel) // 2
        return tuple(p - lost * d for p, d in zip(self.padding, self.dilation, strict=True))


class _ElasticBatchNorm(ElasticLayer):
    def forward(self: Any, x: Tensor) -> Tensor:
        self.inputs = n = x.shape[1]
        momentum = self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        own = self.training or self.running_mean is None
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (_first(t, n) for t in tensors)
        return F.batch_norm(x, mean, var, weight, bias, own, momentum or 0.0, self.eps)

    def parts(self: Any) -> Parts:
        named: Parts = {n: (slice(self.inputs),) for n in ("weight", "bias", "running_mean", "running_var")}
        named["num_batches_tracked"] = (...,)
        return {n: index for n, index in named.items() if getattr(self, n) is not None}

    def cut(self: Any) -> nn.Module:
        twin = self.plain(self.inputs, self.eps, self.momentum, self.affine, self.track_running_stats, **self._like())
        return self._filled(twin)


class ElasticBatchNorm1d(_ElasticBatchNorm, nn.BatchNorm1d):
    """Batch normalisation of the channels that there are. Running statistics are shared, so they need calibration."""

    plain = nn.BatchNorm1d


class ElasticBatchNorm2d(_ElasticBatchNorm, nn.BatchNorm2d):
    """As :class:`ElasticBatchNorm1d`, of maps."""

    plain = nn.BatchNorm2d


class ElasticLayerNorm(ElasticLayer, nn.LayerNorm):
    """Layer normalisation over the channels that there are (the last axis)."""

    plain = nn.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        self.inputs = n = x.shape[-1]
        return F.layer_norm(x, (n,), _first(self.weight, n), _first(self.bias, n), self.eps)

    def parts(self) -> Parts:
        return {n: (slice(self.inputs),) for n in ("weight", "bias") if getattr(self, n) is not None}

    def cut(self) -> nn.Module:
        twin = nn.LayerNorm(self.inputs, self.eps, self.elementwise_affine, self.bias is not None, **self._like())
        return self._filled(twin)


class ElasticSqueezeExcite(ElasticLayer, SqueezeExcite):
    """Squeeze and excitation of the channels that there are; the squeezed width follows them."""

    plain = SqueezeExcite

    def forward(self, x: Tensor) -> Tensor:
        self.inputs = x.shape[1]
        for layer, width in ((self.reduce, self.squeezed(self.inputs)), (self.expand, self.inputs)):
            layer.width = width  # type: ignore[assignment]
        return super().forward(x)

    def cut(self) -> nn.Module:
        return _as_plain(self)


class ElasticSelfAttention(ElasticLayer, SelfAttention):
    """Self-attention with the heads that its query, key and value layers give; their widths are set, by whole heads."""

    plain = SelfAttention

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.inputs = x.shape[-1]
        assert isinstance(self.out, ElasticLinear) and self.out.inputs is not None
        self.work = 4.0 * x.shape[1] ** 2 * self.out.inputs  # scores and their mix
        return out

    def cut(self) -> nn.Module:
        return _as_plain(self)


class ElasticSequential(ElasticLayer, nn.Sequential):
    """A stage of which the first ``depth`` blocks are run."""

    plain, adjustable = nn.Sequential, ("depth",)

    def begin(self) -> None:
        super().begin()
        self.depth = len(self)

    def largest(self, what: str) -> int:
        return len(self)

    def forward(self, x: Any) -> Any:
        for block in list(self)[: self.depth]:
            x = block(x)
        return x

    def cut(self) -> nn.Module:
        return nn.Sequential(*list(self)[: self.depth]).train(self.training)


_KINDS: tuple[type[ElasticLayer], ...] = (
    ElasticLinear,
    ElasticConv2d,
    ElasticBatchNorm1d,
    ElasticBatchNorm2d,
    ElasticLayerNorm,
    ElasticSqueezeExcite,
    ElasticSelfAttention,
)
_BY_PLAIN: dict[type[nn.Module], type[ElasticLayer]] = {kind.plain: kind for kind in _KINDS}


def make_elastic(network: nn.Module, stages: tuple[str, ...] = ()) -> nn.Module:
    """Every layer that can be elastic becomes so, in place, at full size; others stay as they are.

    Args:
        network: any module; its parameters stay the same objects under the same names.
        stages: paths of ``nn.Sequential`` whose depth is elastic.

    Raises:
        InputError: a stage is no ``nn.Sequential``.
    """
    for path in stages:
        stage = network.get_submodule(path)
        if type(stage) is not nn.Sequential and not isinstance(stage, ElasticSequential):
            raise InputError(
                f"stage '{path}' ({type(stage).__name__}) cannot be cut: its depth needs an nn.Sequential of blocks"
            )
        _become(stage, ElasticSequential)
    for module in network.modules():
        kind = _BY_PLAIN.get(type(module))
        if kind is not None and why_not(module) is None:
            _become(module, kind)
    return network


def why_not(module: nn.Module) -> str | None:
    """Why a layer cannot be cut, in words; None where it can."""
    if (
        isinstance(module, nn.Conv2d)
        and module.groups > 1
        and not module.groups == module.in_channels == module.out_channels
    ):
        return f"its {module.in_channels} channels are in {module.groups} groups, and only one group or one for each channel can be cut"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"its padding is '{module.padding_mode}', not zeros"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return f"it normalises {len(module.normalized_shape)} axes, and only one can be cut"
    if isinstance(module, ElasticLayer) or type(module) in _BY_PLAIN:
        return None
    return "there is no elastic form of it; there is of " + ", ".join(kind.plain.__name__ for kind in _KINDS)


def active_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules``, without the blocks that elastic stages skip."""
    yield prefix.rstrip("."), module
    children = list(module.named_children())
    if isinstance(module, ElasticSequential):
        children = children[: module.depth]
    for name, child in children:
        yield from active_modules(child, f"{prefix}{name}.")


def active_parts(network: nn.Module) -> Parts:
    """By parameter name the part that the active sub-network has, as its last forward pass used it."""
    found: Parts = {}
    for path, module in active_modules(network):
        own = module.parts() if isinstance(module, ElasticLayer) else {}
        for name, _ in module.named_parameters(recurse=False):
            found[f"{path}.{name}".lstrip(".")] = own.get(name, (...,))
    return found


def active_work(network: nn.Module) -> float:
    """FLOPs per sample of the last forward pass: linear layers, convolutions and attention, as in :mod:`limbeck.metrics.cost`."""
    return sum(module.work for _, module in active_modules(network) if isinstance(module, ElasticLayer))


def cut(network: nn.Module) -> nn.Module:
    """The active sub-network as a plain module with weights of its own; its last forward pass must be of that size.

    Raises:
        InputError: a layer was not reached by the forward pass, so that its size is unknown.
    """
    return _cut(copy.deepcopy(network), "", {})


def _cut(module: nn.Module, path: str, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    twin = module
    if isinstance(module, ElasticLayer):
        if module.inputs is None and not isinstance(module, ElasticSequential):
            raise InputError(f"layer '{path}' cannot be cut: the network's forward pass does not use it")
        twin = module.cut()
    done[id(module)] = twin
    for name, child in list(twin.named_children()):
        twin._modules[name] = _cut(child, f"{path}.{name}".lstrip("."), done)
    return twin


def _first(tensor: Any, count: int, axis: int = 0) -> Any:
    """The first entries along an axis; the tensor itself where these are all, as a slice costs a copy of the gradient."""
    return tensor if tensor is None or tensor.shape[axis] == count else tensor.narrow(axis, 0, count)


def _become(module: nn.Module, kind: type[ElasticLayer]) -> None:
    module.__class__ = kind
    assert isinstance(module, ElasticLayer)
    module.begin()


def _as_plain(module: ElasticLayer) -> nn.Module:
    """A container whose layers are cut one by one."""
    for name in ("inputs", "work"):
        vars(module).pop(name, None)
    module.__class__ = module.plain  # type: ignore[assignment]
    return module

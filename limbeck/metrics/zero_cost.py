"""Scores of untrained networks that are said to foretell their accuracy: zero-cost proxies, by name; higher is better.

Each takes a freshly built network, a batch of inputs (B, ...) and labels (B,), and leaves the network as it is. Their sources differ in detail from one
implementation to the next; ours follow the papers, and "Zero-Cost Proxies for Lightweight NAS" (2021) where that settled the details.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from limbeck.blocks.gaussian_init import NORMS, gaussian_copy
from limbeck.blocks.heads import answer
from limbeck.core.batch import call_model, first_tensor, logits_of, map_tensors
from limbeck.core.errors import UnknownNameError
from limbeck.core.seeding import preserved_random_state
from limbeck.metrics.cost import count_flops, count_parameters

Proxy = Callable[[nn.Module, Any, Tensor], float]
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
ZEN_REPEATS, ZEN_STEP = 8, 0.01


def parameters(network: nn.Module, inputs: Any, labels: Tensor) -> float:
    """How many there are: the baseline that every other proxy must beat."""
    return float(count_parameters(network))


def flops(network: nn.Module, inputs: Any, labels: Tensor) -> float:
    """Floating-point operations per sample."""
    return count_flops(network, map_tensors(inputs, lambda t: t[:1]))


def naswot(network: nn.Module, inputs: Any, labels: Tensor) -> float:
    """log |det K|, where K_ij counts the rectifiers that agree on samples i and j (both on or both off), all layers together.

    Rectifiers are calls of relu, whether by module or function. Minus infinity where two samples switch all alike.

    Source: "Neural Architecture Search without Training" (2021).
    """
    with torch.no_grad(), _Rectifiers() as seen:
        call_model(_trained(network), inputs)
    kernel = torch.zeros(len(labels), len(labels), dtype=torch.float64)
    for on in seen.patterns:
        x = on.double().cpu()
        kernel += x @ x.T + (1 - x) @ (1 - x).T
    return float(torch.linalg.slogdet(kernel).logabsdet)


def gradient_norm(network: nn.Module, inputs: Any, labels: Tensor) -> float:
    """The sum over layers of the norm of the loss' gradient with regard to the layer's weight."""
    return float(sum(g.norm() for g in _slopes(_trained(network), inputs, labels)[1]))


def snip(network: nn.Module, inputs: Any, labels: Tensor) -> float:
    """Sum of |w · dL/dw| over all weights. Source: "SNIP: Single-shot Network Pruning based on Connection Sensitivity" (2019)."""
    weights, slopes = _slopes(_trained(network), inputs, labels)
    return float(sum((w.detach() * g).abs().sum() for w, g in zip(weights, slopes, strict=True)))


def grasp(network: nn.Module, inputs: Any, labels: Tensor) -> float:
    """- Sum of w · (H dL/dw) over all weights, H the Hessian of the loss.

    Source: "Picking Winning Tickets Before Training by Preserving Gradient Flow" (2020), with temperature 1.
    """
    weights, slopes = _slopes(_trained(network), inputs, labels, graph=True)
    product = sum((g.detach() * g).sum() for g in slopes)
    assert isinstance(product, Tensor)
    if not product.requires_grad:  # a network that says nothing has no curvature
        return 0.0
    curved = torch.autograd.grad(product, weights, allow_unused=True)
    return -float(sum((w.detach() * h).sum() for w, h in zip(weights, curved, strict=True) if h is not None))


def fisher(network: nn.Module, inputs: Any, labels: Tensor) -> float:
    """Sum over layers and channels of half the mean square, over samples, of (activation · its gradient) summed over positions.

    Source: "BlockSwap: Fisher-guided Block Substitution for Network Compression" (2020).
    """
    copied = _trained(network)
    outputs: list[Tensor] = []
    for module in _weighted(copied):
        module.register_forward_hook(lambda _, __, output: outputs.append(output))
    loss = F.cross_entropy(logits_of(call_model(copied, inputs)), labels)
    slopes = torch.autograd.grad(loss, outputs, allow_unused=True)
    total = 0.0
    for output, slope in zip(outputs, slopes, strict=True):
        if slope is not None:
            product = output.detach() * slope
            per_channel = product.flatten(2).sum(2) if product.ndim > 2 else product
            total += float(0.5 * per_channel.square().mean(0).sum())
    return total


def synflow(network: nn.Module, inputs: Any, labels: Tensor) -> float:
    """log of the sum of |w| · dR/d|w| over all weights, R being the sum of outputs for an input of ones with all parameters made positive.

    Norms are taken out, and everything is in float64, so that deep products stay finite.

    Source: "Pruning neural networks without any data by iteratively conserving synaptic flow" (2020).
    """
    positive = copy.deepcopy(network).eval().double()
    _without_norms(positive)
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
    ones = map_tensors(
        inputs, lambda t: torch.ones_like(t[:1], dtype=torch.float64) if t.is_floating_point() else t[:1]
    )
    weights = [m.weight for m in _weighted(positive)]
    slopes = torch.autograd.grad(logits_of(call_model(positive, ones)).sum(), weights, allow_unused=True)
    flow = float(sum((w.detach() * g).sum() for w, g in zip(weights, slopes, strict=True) if g is not None))
    return _log(flow)


def zen(network: nn.Module, inputs: Any, labels: Tensor) -> float:
    """log of the mean change of the last map when normal inputs move by 0.01 of another normal draw, plus, for each batch norm, log of the root of its
    mean variance; weights from N(0, 1).

    The mean goes over a few draws. Shortcuts stay where they are (the paper takes them out).

    Source: "Zen-NAS: A Zero-Shot NAS for High-Performance Image Recognition" (2021).
    """
    first = first_tensor(inputs)
    seed = 0 if first is None else len(first)
    generator = torch.Generator().manual_seed(seed)
    scales: list[float] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        scales.append(float(args[0].transpose(0, 1).flatten(1).var(1).mean()))

    found = []
    for repeat in range(ZEN_REPEATS):
        drawn = gaussian_copy(network, seed + repeat).train()
        hooks = [m.register_forward_pre_hook(note) for m in drawn.modules() if isinstance(m, BATCH_NORMS)]
        x = map_tensors(inputs, lambda t: _normal_like(t, generator))
        moved = map_tensors(x, lambda t: t + ZEN_STEP * _normal_like(t, generator) if t.is_floating_point() else t)
        scales.clear()
        with torch.no_grad():
            here = answer(drawn, x).features
            for hook in hooks:
                hook.remove()
            change = (answer(drawn, moved).features - here).abs().mean()
        found.append(_log(float(change)) + sum(0.5 * _log(scale) for scale in scales))
    return sum(found) / len(found)


PROXIES: dict[str, Proxy] = {
    "parameters": parameters,
    "flops": flops,
    "naswot": naswot,
    "synflow": synflow,
    "snip": snip,
    "gradient-norm": gradient_norm,
    "fisher": fisher,
    "grasp": grasp,
    "zen": zen,
}
"""Proxies by name; add your own."""


def zero_cost(network: nn.Module, inputs: Any, labels: Tensor, *names: str) -> Mapping[str, float]:
    """Proxies of a network by name, all of them if none is named; minus infinity for what is no number.

    Raises:
        UnknownNameError: no such proxy.
    """
    unknown = [name for name in names if name not in PROXIES]
    if unknown:
        raise UnknownNameError("proxy", unknown[0], PROXIES)
    with preserved_random_state(), torch.enable_grad():
        values = {name: PROXIES[name](network, inputs, labels) for name in names or PROXIES}
    return {name: value if value == value else -math.inf for name, value in values.items()}


class _Rectifiers(TorchFunctionMode):
    """Notes which rectifiers are on for each sample, (B, units), of every call of relu."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "").rstrip("_")
        if name in ("relu", "relu6") and args and isinstance(args[0], Tensor):
            # F.relu calls torch.relu inside, which is not seen again
            self.patterns.append((args[0] > 0).flatten(1))
        return function(*args, **(kwargs or {}))


def _trained(network: nn.Module) -> nn.Module:
    """A copy in training mode whose parameters all take gradients."""
    return copy.deepcopy(network).train().requires_grad_(True)


def _weighted(network: nn.Module) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, WEIGHTED)]


def _slopes(
    network: nn.Module, inputs: Any, labels: Tensor, *, graph: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of linear and convolutional layers that the loss depends on, and its gradients with regard to them."""
    weights = [m.weight for m in _weighted(network)]
    loss = F.cross_entropy(logits_of(call_model(network, inputs)), labels)
    slopes = torch.autograd.grad(loss, weights, create_graph=graph, allow_unused=True)
    used = [(w, g) for w, g in zip(weights, slopes, strict=True) if g is not None]
    return [w for w, _ in used], [g for _, g in used]


def _without_norms(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NORMS):
                setattr(module, name, nn.Identity())


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=generator).to(tensor)

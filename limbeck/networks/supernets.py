"""Super-networks: one set of weights that holds a whole search space of networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from limbeck.blocks.channel_sorting import sort_channels
from limbeck.blocks.elastic import ElasticLayer, active_parts, active_work, cut, make_elastic, why_not
from limbeck.blocks.search_spaces import Code, SearchSpace
from limbeck.core.batch import call_model, first_tensor, map_tensors
from limbeck.core.errors import InputError
from limbeck.networks.registry import build

Kind = Literal["width", "kernel", "depth"]


@dataclass(frozen=True)
class Knob:
    """One choice of a super-network: a size of one layer, or of several that always have the same.

    Attributes:
        name: of the choice, a Python identifier.
        kind: what is set: output channels of linear layers or convolutions, sides of kernels, blocks of an ``nn.Sequential``.
        paths: the layers.
        options: ascending; the largest is the size that the layers have.
        through: layers that the channels of a ``width`` pass (normalisation, depth-wise convolution, squeeze-excite).
        into: the layer that reads them; with it given, channels can be sorted by importance.
        group: channels that stay together, such as an attention head.
    """

    name: str
    kind: Kind
    paths: tuple[str, ...]
    options: tuple[int, ...]
    through: tuple[str, ...] = ()
    into: str | None = None
    group: int = 1


class SuperNetwork(nn.Module):
    """A network whose sizes are set by a code, and all of whose sub-networks share its weights.

    ::

        net = SuperNetwork(my_network, [
            Knob("hidden", "width", ("fc1",), (16, 32, 64), into="fc2"),
            Knob("depth", "depth", ("blocks",), (1, 2, 3)),
        ], torch.zeros(1, 20))
        net.set_active(net.space.code(hidden=32, depth=2))
        logits = net(x)
        small = net.extract(net.smallest)  # a plain module of its own

    Args:
        network: plain; its layers become elastic in place (see :func:`limbeck.blocks.elastic.make_elastic`).
        knobs: its choices.
        sample: inputs of one sample, as the network takes them (a tensor (1, ...), a tuple or a mapping).
        name_of: the registry's name of the plain network with these options, and its ``in_shape`` and ``num_classes``; sub-networks
            that are cut out then remember what they can be rebuilt from.

    Raises:
        InputError: a knob's layer does not exist, cannot be cut, or has no such sizes; or the smallest sub-network does not run.
    """

    def __init__(
        self,
        network: nn.Module,
        knobs: Sequence[Knob],
        sample: Any,
        *,
        name_of: Callable[[Mapping[str, Any]], str] | None = None,
        in_shape: tuple[int, ...] = (),
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.knobs, self.name_of = network, tuple(knobs), name_of
        self.in_shape, self.num_classes = in_shape, num_classes
        self._sample = sample
        if first_tensor(sample) is None:
            raise InputError("a super-network needs a sample of its inputs, such as torch.zeros(1, 3, 32, 32)")
        modules = dict(network.named_modules())
        for knob in self.knobs:
            _check(knob, modules)
        make_elastic(network, tuple(p for knob in self.knobs if knob.kind == "depth" for p in knob.paths))
        for knob in self.knobs:
            _check_sizes(knob, modules)
        self._costs: dict[Code, dict[str, float]] = {}
        self.active: Code = self.largest
        for code in (self.smallest, self.largest):
            self._try(code)

    # ---- the space ---------------------------------------------------------------------------------------------------

    @property
    def space(self) -> SearchSpace:
        """All sub-networks; one that it makes has fresh weights where it can be built by name, and those of this network where not."""
        name = type(self.network).__name__
        return SearchSpace(name, {knob.name: knob.options for knob in self.knobs}, self._make)

    @property
    def smallest(self) -> Code:
        return (0,) * len(self.knobs)

    @property
    def largest(self) -> Code:
        return tuple(len(knob.options) - 1 for knob in self.knobs)

    def sample(
        self, generator: torch.Generator, *, coupled: bool = False, least: Mapping[Kind, int] | None = None
    ) -> Code:
        """A sub-network at random.

        Args:
            generator: of the draw.
            coupled: depth and widths of a stage go together, the deeper the wider, and kernels are the largest: far fewer sub-networks.
            least: for each kind, the smallest option that may be drawn (its number); kinds that are not named are free.

        Source: coupled sampling is that of "CompOFA: Compound Once-For-All Networks for Faster Multi-Platform Deployment" (2021).
        """
        low = {} if least is None else least
        drawn = []
        for knob in self.knobs:
            first = min(low.get(knob.kind, 0), len(knob.options) - 1)
            drawn.append(first + int(torch.randint(len(knob.options) - first, (), generator=generator)))
        return self._coupled(drawn, generator) if coupled else tuple(drawn)

    def uniform(self) -> Iterator[Code]:
        """The sub-networks in which all knobs of a kind have options of the same rank."""
        ranks: dict[Kind, int] = {}
        for knob in self.knobs:
            ranks[knob.kind] = max(ranks.get(knob.kind, 1), len(knob.options))
        seen: set[Code] = set()
        for taken in SearchSpace("", {kind: range(count) for kind, count in ranks.items()}, nn.Identity):
            rank = dict(zip(ranks, taken, strict=True))
            code = tuple(min(rank[knob.kind], len(knob.options) - 1) for knob in self.knobs)
            if self.canonical(code) not in seen:
                seen.add(self.canonical(code))
                yield code

    def canonical(self, code: Code) -> Code:
        """The same sub-network's code with the smallest options for blocks that it skips: equal for equal sub-networks."""
        options = self.space.options(code)
        skipped = tuple(
            f"{path}.{index}."
            for knob in self.knobs
            if knob.kind == "depth"
            for path in knob.paths
            for index in range(options[knob.name], knob.options[-1])
        )
        return tuple(
            0 if skipped and all(f"{path}.".startswith(skipped) for path in knob.paths) else number
            for number, knob in zip(code, self.knobs, strict=True)
        )

    # ---- running -----------------------------------------------------------------------------------------------------

    def set_active(self, code: Code) -> None:
        """From now on the network is this sub-network."""
        options = self.space.options(code)
        for knob in self.knobs:
            for path in knob.paths:
                setattr(self.network.get_submodule(path), knob.kind, options[knob.name])
        self.active = tuple(code)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def costs(self, code: Code) -> dict[str, float]:
        """``parameters``, and ``flops`` for one sample (matrix products, convolutions and attention of elastic layers), counted once."""
        code = self.canonical(code)
        if code not in self._costs:
            with self._sized(code):
                parameters = dict(self.network.named_parameters())
                count = sum(parameters[name][index].numel() for name, index in active_parts(self.network).items())
                self._costs[code] = {"parameters": float(count), "flops": active_work(self.network)}
        return self._costs[code]

    def extract(self, code: Code) -> nn.Module:
        """A sub-network as a plain module with weights of its own and the same outputs.

        Its batch normalisation keeps the shared running statistics: see :func:`limbeck.blocks.bn_calibration.recalibrate`.

        Raises:
            InputError: a layer cannot be cut.
        """
        with self._sized(code):
            plain = cut(self.network)
        if self.name_of is not None:
            spec = {
                "name": self.name_of(self.space.options(code)),
                "in_shape": list(self.in_shape),
                "num_classes": self.num_classes,
            }
            vars(plain).update(limbeck_name=spec["name"], limbeck_spec=spec)
        return plain

    def sort_channels(self, optimizers: Sequence[torch.optim.Optimizer] = ()) -> int:
        """Sort the channels behind every width by importance, so that the first ones are the best to keep; full-size outputs stay.

        Args:
            optimizers: whose buffers move along.

        Returns:
            how many widths were sorted.
        """
        get = self.network.get_submodule
        chosen = [knob for knob in self.knobs if knob.kind == "width" and knob.into is not None]
        for knob in chosen:
            sort_channels(
                [get(p) for p in knob.paths],
                get(str(knob.into)),
                [get(p) for p in knob.through],
                group=knob.group,
                optimizers=optimizers,
            )
        return len(chosen)

    # ---- details -----------------------------------------------------------------------------------------------------

    def _make(self, **options: Any) -> nn.Module:
        if self.name_of is None:
            return self.extract(self.space.code(**options))
        return build(self.name_of(options), in_shape=self.in_shape, num_classes=self.num_classes)

    def _coupled(self, drawn: list[int], generator: torch.Generator) -> Code:
        code = list(drawn)
        depths = [n for n, knob in enumerate(self.knobs) if knob.kind == "depth"]
        for number, knob in enumerate(self.knobs):
            if knob.kind == "kernel":
                code[number] = len(knob.options) - 1
            if knob.kind != "width":
                continue
            for at in depths:
                stage, last = self.knobs[at], len(self.knobs[at].options) - 1
                if any(p.startswith(f"{s}.") for p in knob.paths for s in stage.paths):
                    share = drawn[at] / last if last else 1.0
                    code[number] = round(share * (len(knob.options) - 1))
        return tuple(code)

    @contextmanager
    def _sized(self, code: Code) -> Iterator[None]:
        """This sub-network is active, and its layers have seen the sample in evaluation mode, so that they know their sizes."""
        before, modes = self.active, [(m, m.training) for m in self.modules()]
        device = next(self.parameters()).device
        self.set_active(code)
        self.eval()
        try:
            with torch.no_grad():
                call_model(self.network, map_tensors(self._sample, lambda tensor: tensor.to(device)))
            for module, training in modes:
                module.training = training
            yield
        finally:
            for module, training in modes:
                module.training = training
            self.set_active(before)

    def _try(self, code: Code) -> None:
        running: list[tuple[str, nn.Module]] = []
        hooks = [
            module.register_forward_pre_hook(lambda m, _, path=path: running.append((path, m)))
            for path, module in self.network.named_modules()
            if not list(module.children())
        ]
        try:
            with self._sized(code):
                pass
        except (RuntimeError, ValueError, IndexError) as error:
            path, module = running[-1] if running else ("", self.network)
            reason = None if isinstance(module, ElasticLayer) else why_not(module)
            detail = reason or " ".join(str(error).split())[:160]
            raise InputError(
                f"the sub-network {self.space.text(code)} does not run: layer '{path}' ({type(module).__name__}) cannot be cut: {detail}"
            ) from None
        finally:
            for hook in hooks:
                hook.remove()


def _check(knob: Knob, modules: Mapping[str, nn.Module]) -> None:
    for path in (*knob.paths, *knob.through, *(() if knob.into is None else (knob.into,))):
        if path not in modules:
            raise InputError(f"knob '{knob.name}' names layer '{path}', which the network does not have")
    if not knob.options or list(knob.options) != sorted(set(knob.options)) or knob.options[0] < 1:
        raise InputError(
            f"knob '{knob.name}' needs ascending options of at least 1, such as 16, 32, 64 (got {knob.options})"
        )
    for path in knob.paths:
        reason = None if knob.kind == "depth" else why_not(modules[path])
        if reason is not None:
            raise InputError(f"layer '{path}' ({type(modules[path]).__name__}) cannot be cut: {reason}")


def _check_sizes(knob: Knob, modules: Mapping[str, nn.Module]) -> None:
    for path in knob.paths:
        layer = modules[path]
        assert isinstance(layer, ElasticLayer)
        kind = layer.plain.__name__
        own_width = knob.kind == "width" and isinstance(layer, nn.Conv2d) and layer.groups > 1
        if knob.kind not in layer.adjustable or own_width:
            raise InputError(f"layer '{path}' ({kind}) has no {knob.kind} to set: it follows its input")
        largest = layer.largest(knob.kind)
        if knob.options[-1] != largest:
            raise InputError(
                f"knob '{knob.name}' goes up to {knob.options[-1]}, but the {knob.kind} of layer '{path}' is {largest}: "
                "the largest option is the full size"
            )
        if knob.kind == "kernel" and any((largest - side) % 2 for side in knob.options):
            raise InputError(
                f"kernels are cropped on both sides alike: layer '{path}' of {largest}x{largest} takes options "
                f"{', '.join(map(str, range(2 - largest % 2, largest + 1, 2)))} (got {knob.options})"
            )
        if knob.group > 1 and any(width % knob.group for width in knob.options):
            raise InputError(f"knob '{knob.name}' cuts whole groups of {knob.group} channels (got {knob.options})")

"""What a compressed network takes on disk, tensor by tensor, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import nn

from limbeck.core.errors import InputError


@dataclass(frozen=True)
class Stored:
    """One tensor.

    Attributes:
        numbers: how many numbers it has.
        bits: what it takes, with everything needed to read it (scales, levels, masks, code tables).
        form: how it is stored: ``plain``, ``quantised``, ``huffman``, ``bitmask``, ``csr`` …
    """

    numbers: int
    bits: float
    form: str = "plain"


@dataclass(frozen=True)
class Storage:
    """All tensors of a network by name. A file's header (names, shapes, offsets: some kilobytes) comes on top."""

    tensors: Mapping[str, Stored]

    @classmethod
    def of(cls, model: nn.Module, compressed: Mapping[str, Stored]) -> Self:
        """A network's parameters and buffers, those in ``compressed`` as it says and all others as they are in memory.

        Tensors that several modules share count once, under their first name.

        Raises:
            InputError: ``compressed`` names a tensor that is not there, or has another size.
        """
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, stored in compressed.items():
            if name not in own:
                raise InputError(f"the network has no tensor '{name}' to store")
            if own[name].numel() != stored.numbers:
                raise InputError(f"'{name}' has {own[name].numel()} numbers, not {stored.numbers}")
        return cls(
            {n: compressed.get(n) or Stored(t.numel(), 8 * t.element_size() * t.numel()) for n, t in own.items()}
        )

    @property
    def bytes(self) -> float:
        """Of everything."""
        return sum(t.bits for t in self.tensors.values()) / 8

    @property
    def numbers(self) -> int:
        return sum(t.numbers for t in self.tensors.values())

    @property
    def bits_per_number(self) -> float:
        """Mean over the numbers of the tensors that are not stored plainly (over all where all are)."""
        chosen = [t for t in self.tensors.values() if t.form != "plain"] or list(self.tensors.values())
        return sum(t.bits for t in chosen) / sum(t.numbers for t in chosen)

    def ratio(self, bits: float = 32) -> float:
        """How many times smaller than with ``bits`` for each number."""
        return self.numbers * bits / 8 / self.bytes

    def by_form(self) -> dict[str, float]:
        """Bytes by form."""
        forms = dict.fromkeys(t.form for t in self.tensors.values())
        return {form: sum(t.bits for t in self.tensors.values() if t.form == form) / 8 for form in forms}


def chosen_layers(
    model: nn.Module, accepts: Callable[[nn.Module], bool], include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> dict[str, nn.Module]:
    """Layers by name that are to be compressed.

    Args:
        model: any module.
        accepts: which kinds of module can be.
        include: regular expressions, one of which must be found in a name; none: all of the accepted kinds.
        exclude: regular expressions, none of which may be found in a name.

    Raises:
        InputError: a pattern is broken or finds nothing, names a layer of a kind that cannot be compressed, or no layer is left.
    """
    import re

    def compiled(patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
        try:
            return [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise InputError(f"'{error.pattern!s}' is no regular expression: {error.msg}") from None

    modules = {name: module for name, module in model.named_modules() if name}
    fitting = {name: module for name, module in modules.items() if accepts(module)}
    chosen: dict[str, nn.Module] = {} if include else dict(fitting)
    for pattern in compiled(include):
        found = [name for name in modules if pattern.search(name)]
        if not found:
            raise InputError(f"no layer's name fits '{pattern.pattern}'; there are {', '.join(list(fitting)[:6])}, …")
        hit = {name: fitting[name] for name in found if name in fitting}
        if not hit:
            kinds = ", ".join(sorted({type(modules[name]).__name__ for name in found}))
            raise InputError(
                f"'{pattern.pattern}' names {kinds}, which cannot be compressed; linear and convolutional layers can"
            )
        chosen.update(hit)
    for pattern in compiled(exclude):
        chosen = {name: module for name, module in chosen.items() if not pattern.search(name)}
    if not chosen:
        raise InputError("no layer is left to be compressed: look at the patterns")
    return {name: chosen[name] for name in fitting if name in chosen}

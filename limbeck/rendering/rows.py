"""Parameters whose rows come and go while they are trained: Gaussians, anchors. Adam's running means travel with the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def change_rows(
    module: nn.Module,
    keep: Tensor,
    added: Mapping[str, Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Keep some rows of a module's parameters and buffers, and append others.

    Args:
        module: whose own parameters and buffers of N rows are changed; it gets new ``nn.Parameter`` objects.
        keep: (N,) bool, or numbers of rows in their new order.
        added: rows (M, ...) by the names of *all* these tensors; None: none.
        optimizer: whose groups hold the parameters. Kept rows keep their running means, new ones start at 0.
    """
    for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        kept = old[keep]
        fresh = kept[:0] if added is None else added[name].to(kept)
        values = torch.cat([kept, fresh])
        if not isinstance(old, nn.Parameter):
            setattr(module, name, values)
            continue
        new = nn.Parameter(values, requires_grad=old.requires_grad)
        setattr(module, name, new)
        if optimizer is not None:
            _hand_over(optimizer, old, new, keep, len(fresh))


def _hand_over(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, keep: Tensor, more: int) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    optimizer.state[new] = {
        key: torch.cat([value[keep], value.new_zeros(more, *value.shape[1:])])
        if isinstance(value, Tensor) and value.shape == old.shape
        else value
        for key, value in state.items()
    }


def set_rows(
    optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, values: Tensor, rows: Tensor | None = None
) -> None:
    """Overwrite a parameter, all of it or some rows, and forget the running means of what was overwritten."""
    with torch.no_grad():
        which: Any = slice(None) if rows is None else rows
        parameter[which] = values.to(parameter)
        for value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[which] = 0


def fit_rows(module: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Before a state is loaded: give a module's own parameters and buffers as many rows as the state has."""
    for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        stored = state.get(prefix + name)
        if isinstance(stored, Tensor) and stored.shape != old.shape and stored.shape[1:] == old.shape[1:]:
            values = old.detach().new_zeros(stored.shape)
            setattr(module, name, nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values)


def any_count(module: nn.Module) -> nn.Module:
    """Let a module load states with another number of rows than it has; returns it."""

    def before(found: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        fit_rows(found, state, prefix)

    module._register_load_state_dict_pre_hook(before, with_module=True)
    return module

"""Reference networks, each named by one short string with its sizes in it.

>>> from limbeck.networks import build, names
>>> student = build("convnet-w16-d3", in_shape=(1, 8, 8), num_classes=10)

A name with a colon, ``package.module:factory``, imports somebody else's network instead.
"""

from __future__ import annotations

from limbeck.networks.registry import build, names, rebuild, spec_of

__all__ = ["build", "names", "rebuild", "spec_of"]

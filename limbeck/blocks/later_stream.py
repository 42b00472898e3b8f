"""A stream of batches for a stage that goes on where another one ended."""

from __future__ import annotations

from limbeck.core.batch import Batch
from limbeck.core.data import Stream


class LaterStream(Stream):
    """The batches of another stream from a later one on.

    Args:
        stream: the whole of it.
        first: the number of its batch that is number 0 here.
    """

    def __init__(self, stream: Stream, first: int) -> None:
        super().__init__(
            stream.data, stream.batch_size, seed=stream.seed, views=stream.views, rank=stream.rank, world=stream.world
        )
        self.first = first

    def shard(self, rank: int, world: int) -> Stream:
        return LaterStream(super().shard(rank, world), self.first)

    def epoch(self, step: int) -> float:
        return super().epoch(step + self.first)

    def batch(self, step: int) -> Batch:
        return super().batch(step + self.first)

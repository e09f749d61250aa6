"""Prefetching of micro-batches: a thread builds those of the next step while this step computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from megaft.data import batches
from megaft.data.batches import Batch, BatchSplit
from megaft.data.left_out import Ranges
from megaft.data.sequence import Samples


class Prefetch:
    """This rank's micro-batches, step by step. Use as a context manager, which ends the thread on exit.

    It only changes when batches are built: `take` returns those of `batches.micro_batches` for its arguments.
    """

    def __init__(self, samples: Samples, split: BatchSplit, row_length: int | None):
        self._samples, self._split, self._row_length = samples, split, row_length
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._next: tuple[tuple[int, Ranges], Future[list[Batch]]] | None = None

    def take(self, position: int, left_out: Ranges) -> list[Batch]:
        """Return the micro-batches of the step that begins at `position`, and start to build those of the next.

        Batches built for another position or other left-out samples are discarded, such as those built before a rewind.

        Raises:
            Exception: The error that building this step's batches raised in the thread.
        """
        step = (position, left_out)
        prefetched, self._next = self._next, None
        if prefetched is None or prefetched[0] != step:
            prefetched = self._build(step)
        taken = prefetched[1].result()
        self._next = self._build((position + self._split.global_batch_size, left_out))
        return taken

    def _build(self, step: tuple[int, Ranges]) -> tuple[tuple[int, Ranges], Future[list[Batch]]]:
        built = self._thread.submit(batches.micro_batches, self._samples, *step, self._split, self._row_length)
        return step, built

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

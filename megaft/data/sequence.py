"""Infinite sequence of training samples: corpora blended by weight and reshuffled every epoch.

Sample k of a run depends only on the seed and k, not on the number of steps, ranks or resumes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import count

from megaft.base.checks import require
from megaft.base.errors import ConfigError
from megaft.data.permutation import permute
from megaft.data.samples import CorpusSamples, Sample

BLOCK = 64
"""Number of samples after which each corpus of a blend has given its share, to within one or two samples."""


class Samples:
    """Infinite sequence of a run's samples: corpora blended by weight, with a new order in each epoch of a corpus."""

    def __init__(self, corpora: Sequence[CorpusSamples], weights: Sequence[float], seed: int):
        assert len(corpora) == len(weights) > 0
        for corpus in corpora:
            if len(corpus) == 0:
                raise ConfigError("--data.train has a dataset without a token to predict; give a longer text.")
        self.corpora = corpora
        self.seed = seed
        exact = [Fraction(weight) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        self._block = lru_cache(maxsize=4)(self._locate_block)
        self.by_share = sorted(range(len(exact)), key=lambda corpus: -exact[corpus])

    def __getitem__(self, position: int) -> Sample:
        corpus, number = self.locate(position)
        epoch, index = divmod(number, len(self.corpora[corpus]))
        chosen = self.corpora[corpus]
        return chosen[permute(index, len(chosen), self.seed, chosen.sha256, epoch)]

    def locate(self, position: int) -> tuple[int, int]:
        """Return the corpus of the sample at `position`, and the number of earlier samples of that corpus.

        Computed from the samples that each corpus has given at the bounds of the block, without earlier blocks.
        """
        block, slot = divmod(position, BLOCK)
        return self._block(block)[slot]

    def _locate_block(self, block: int) -> list[tuple[int, int]]:
        before, after = self.taken(block * BLOCK), self.taken((block + 1) * BLOCK)
        unshuffled = [corpus for corpus, first in enumerate(before) for _ in range(after[corpus] - first)]
        corpora = [unshuffled[permute(slot, BLOCK, self.seed, "blend", block)] for slot in range(BLOCK)]
        numbers = [count(first) for first in before]
        return [(corpus, next(numbers[corpus])) for corpus in corpora]

    def taken(self, position: int) -> list[int]:
        """Return the number of samples of each corpus among the first `position`, a multiple of BLOCK.

        In descending order of weight, each corpus takes its rounded share of what remains, so no count ever decreases.
        (Differences of rounded cumulative weights are simpler, but can decrease for small weights.)
        """
        counts, remaining, weight_remaining = [0] * len(self.shares), position, Fraction(1)
        for corpus in self.by_share:
            counts[corpus] = math.floor(remaining * self.shares[corpus] / weight_remaining + Fraction(1, 2))
            remaining -= counts[corpus]
            weight_remaining -= self.shares[corpus]
        return counts

    @property
    def fingerprint(self) -> str:
        """Hashes, lengths and shares of the corpora: with the seed, they determine the order of samples."""
        return " ".join(
            f"{corpus.sha256}:{len(corpus)}:{share}" for corpus, share in zip(self.corpora, self.shares, strict=True)
        )

    @property
    def context_length(self) -> int:
        """Maximum input tokens of a sample."""
        return self.corpora[0].context_length

    @property
    def is_packed(self) -> bool:
        """True if samples fill the context, across documents; otherwise each has one document."""
        return self.corpora[0].is_packed

    @property
    def attend_within_documents(self) -> bool:
        """True if attention and positions stay inside the documents of a packed sample."""
        return self.corpora[0].attend_within_documents

    def row_length(self, rope_length_limit: int | None) -> int | None:
        """Return the fixed row length of a batch; None to pad rows to the longest of their micro-batch.

        Args:
            rope_length_limit: Longest input before rotary positions change with the input's length; None if they never
                do. With a longer context every row is padded to the context, so that the loss does not depend on the
                micro-batch size.

        Raises:
            ConfigError: Attention stays within documents and the context exceeds `rope_length_limit`, so the loss would
                depend on the longest document.
        """
        context = self.context_length
        depends_on_length = rope_length_limit is not None and context > rope_length_limit
        require(
            not (depends_on_length and self.attend_within_documents),
            f"--data.attend-within-documents is set and --data.context-length is {context}, but the model's "
            f"rotary positions change for inputs longer than {rope_length_limit} tokens, depending on the longest "
            f"document of a micro-batch; use --data.context-length {rope_length_limit} or less, or "
            "--data.sample document.",
        )
        return context if depends_on_length or self.is_packed else None

    def num_steps(self, epochs: float, global_batch_size: int) -> int:
        """Return the number of steps in `epochs` passes over every corpus."""
        return max(1, math.ceil(epochs * sum(len(corpus) for corpus in self.corpora) / global_batch_size))

"""The endless sequence of training samples: corpora blended by weight and shuffled anew each epoch.

Sample k of a run is a function of the seed and k alone: not of the number of steps, of ranks, or of resumes.
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
from megaft.data.samples import Corpus, Sample

BLOCK = 64
"""Samples after which each corpus of a blend has given its share, to within one or two."""


class Samples:
    """The endless sequence of a run's samples: corpora blended by weight, each epoch of each in an order of its own."""

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float], seed: int):
        assert len(corpora) == len(weights) > 0
        for corpus in corpora:
            if len(corpus) == 0:
                raise ConfigError("--data.train has a dataset without a single token to predict; give a longer text.")
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

        Both are known without a look at earlier blocks, from how many samples each corpus has given by a block's ends.
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

        From the largest, each corpus takes its share of what is left, rounded, so that no count ever falls. (The
        differences of rounded cumulative weights, which are simpler, do fall where a weight is small.)
        """
        counts, left, weight_left = [0] * len(self.shares), position, Fraction(1)
        for corpus in self.by_share:
            counts[corpus] = math.floor(left * self.shares[corpus] / weight_left + Fraction(1, 2))
            left -= counts[corpus]
            weight_left -= self.shares[corpus]
        return counts

    @property
    def sha256(self) -> str:
        """Hash of the corpora and their shares, on which the order of samples depends besides the seed."""
        return " ".join(
            f"{corpus.sha256}:{len(corpus)}:{share}" for corpus, share in zip(self.corpora, self.shares, strict=True)
        )

    @property
    def context_length(self) -> int:
        """Most input tokens of a sample."""
        return self.corpora[0].context_length

    @property
    def is_packed(self) -> bool:
        """True if samples fill the context, across documents; otherwise each is of one document."""
        return self.corpora[0].is_packed

    @property
    def attend_within_documents(self) -> bool:
        """True if attention and positions are to stay inside the documents of a packed sample."""
        return self.corpora[0].attend_within_documents

    def row_length(self, rope_length_limit: int | None) -> int | None:
        """Return the length of every row of a batch; None where rows are padded to the longest of their micro-batch.

        Args:
            rope_length_limit: The model's longest input whose states do not depend on its length (None: of any length).
                Where the context is longer, every row is padded to the context, so that a loss is the same at every
                micro-batch size.

        Raises:
            ConfigError: Documents are kept apart in a context longer than that: the lengths felt are the documents'.
        """
        context = self.context_length
        is_length_felt = rope_length_limit is not None and context > rope_length_limit
        require(
            not (is_length_felt and self.attend_within_documents),
            f"--data.attend-within-documents is set and --data.context-length is {context}, but the model has other "
            f"rotary positions for inputs longer than {rope_length_limit} tokens, chosen by the longest document of a "
            f"micro-batch; use --data.context-length {rope_length_limit} or less, or --data.sample document.",
        )
        return context if is_length_felt or self.is_packed else None

    def num_steps(self, epochs: float, global_batch_size: int) -> int:
        """Return the number of steps in `epochs` passes over every corpus."""
        return max(1, math.ceil(epochs * sum(len(corpus) for corpus in self.corpora) / global_batch_size))

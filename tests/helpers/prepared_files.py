"""Prepared corpora written token by token, and Hypothesis strategies for their documents."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megaft.base.files import write_json_atomic
from megaft.data.indexed import TokenWriter
from megaft.data.receipt import FORMAT_VERSION
from megaft.data.samples import IGNORE_INDEX

IGNORED = IGNORE_INDEX
reusing_folder = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
document_lengths = st.lists(st.integers(0, 23), min_size=1, max_size=12).filter(any)


def write_dataset(prefix, documents, scored=None):
    """Documents of tokens, with a mask of the scored ones."""
    digests = []
    for suffix, content in (("", documents), (".scored", scored)):
        if content is not None:
            writer = TokenWriter(prefix.with_name(f"{prefix.name}{suffix}.bin"), cardinality=None if suffix else 60_000)
            for document in content:
                writer.add(np.array(document, dtype=np.int64))
                writer.end_document()
            digests.append(writer.close(prefix.with_name(f"{prefix.name}{suffix}.idx")))
    receipt = {
        "format_version": FORMAT_VERSION,
        "tokens": sum(map(len, documents)),
        "documents": len(documents),
        "dtype": "uint16",
        "has_mask": scored is not None,
        "tokenizer": {"source": "-", "sha256": "0" * 64, "vocab_size": 1 << 16, "round_trip": True},
        "eod_id": None,
        "messages_key": None,
        "words": 0,
        "bytes": 0,
        "bin_sha256": digests[0],
    }
    write_json_atomic(prefix.with_name(f"{prefix.name}.json"), receipt)
    return str(prefix)


def cut_documents(lengths):
    """Return documents of these lengths whose tokens count up from 1, so that each is its position in the stream."""
    ends = np.cumsum(lengths).tolist()
    return [list(range(end - length + 1, end + 1)) for length, end in zip(lengths, ends, strict=True)]

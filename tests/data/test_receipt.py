"""Receipts with a missing or invalid field: one-line errors with file, field, value, rule and fix."""

import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared_files import reusing_folder, write_dataset

from megaft.base.errors import DataError
from megaft.data.receipt import load_receipt

REQUIRED = (
    *("tokenizer", "tokenizer.source", "tokenizer.sha256", "tokenizer.vocab_size", "tokenizer.round_trip"),
    *("documents", "tokens", "words", "bytes", "dtype", "has_mask", "bin_sha256", "eod_id", "messages_key"),
)
OPTIONAL = {
    "opening_ids": [5],
    "chat_template_sha256": "a" * 64,
    "sources": [{"path": "a.txt", "sha256": "b" * 64, "bytes": 7}],
    "scored_tokens": 5,
    "scored_share": 1.0,
    "documents_skipped": 0,
    "control_codes": [],
    "unit": "file",
    "words_and_bytes_of": "texts",
}
WRONG = [
    *(("words", value) for value in (-5, 2.0, "12", True, None, 10**30, [])),
    *(("bytes", value) for value in (-1, "60115", None)),
    *(("tokens", value) for value in (-1, None, 2**63)),
    *(("dtype", value) for value in ("float32", "object", None, 2, [])),
    *(("eod_id", value) for value in (-1, "0", 1 << 16, [0])),
    *(("messages_key", value) for value in (3, [], {})),
    *(("bin_sha256", value) for value in ("", "Z" * 64, "a" * 63, None)),
    *(("has_mask", value) for value in (0, None, "false")),
    *(("opening_ids", value) for value in ([-1], ["a"], [1 << 16], "0", None)),
    *(("tokenizer", value) for value in (None, [], "gpt2")),
    *(("tokenizer.vocab_size", value) for value in (0, -1, "512", None)),
    *(("tokenizer.sha256", value) for value in (None, "abc", 0)),
    *(("tokenizer.source", value) for value in (None, 3)),
    *(("tokenizer.round_trip", value) for value in (None, 1, "yes")),
    *(("scored_tokens", value) for value in (-1, 99, "5")),
    *(("scored_share", value) for value in (1.5, "1", None)),
    *(("sources", value) for value in ({}, [{}], ["a.txt"])),
    ("chat_template_sha256", "none"),
    ("control_codes", [3]),
    ("unit", 3),
]


@pytest.fixture
def dataset(tmp_path):
    """Return the prefix of a dataset whose receipt has every field, and a function that writes a changed receipt."""
    prefix = write_dataset(tmp_path / "data", [[1, 2, 3], [4, 5]])
    receipt = json.loads((tmp_path / "data.json").read_text()) | OPTIONAL

    def change(field, *value):
        changed = json.loads(json.dumps(receipt))
        outer, _, inner = field.partition(".")
        holder = changed[outer] if inner else changed
        holder.pop(inner or outer)
        holder |= dict.fromkeys([inner or outer], *value) if value else {}
        (tmp_path / "data.json").write_text(json.dumps(changed))

    return prefix, change


def refusal(prefix):
    with pytest.raises(DataError) as error:
        load_receipt(prefix)
    assert error.value.exit_code == 3
    assert str(error.value).startswith(f"{prefix}.json has ")
    assert "megaft prepare" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(dataset, field):
    prefix, change = dataset
    change(field)
    assert f"has no {field}, which must be" in refusal(prefix)


@pytest.mark.parametrize("field", OPTIONAL)
def test_a_field_that_older_versions_did_not_write_may_be_missing(dataset, field):
    prefix, change = dataset
    change(field)
    assert field not in load_receipt(prefix)


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_is_named_with_its_field(dataset, field, value):
    prefix, change = dataset
    change(field, value)
    assert f"has the {field} {json.dumps(value)}; it must be " in refusal(prefix)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@reusing_folder
@given(field=st.sampled_from([*REQUIRED, *OPTIONAL]), value=VALUES)
def test_any_value_is_read_or_refused(dataset, field, value):
    prefix, change = dataset
    change(field, value)
    with suppress(DataError):
        assert np.dtype(load_receipt(prefix)["dtype"]).itemsize == 2

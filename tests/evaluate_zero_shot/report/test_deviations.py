"""The line in the terminal about a result that is not comparable with published ones."""

import pytest
from example_results import result

from evaluate_zero_shot.report.deviations import note_on_comparison
from evaluate_zero_shot.tasks import TASKS


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        pytest.param({}, None, id="as published"),
        pytest.param({"data_name": None, "task": "text", "limit_lines": 3}, None, id="a text of one's own"),
        pytest.param(
            {"data_name": None, "data_file": "my.txt", "data_sha256": "12" * 32},
            ("unknown file, my.txt (245,565 words)", "SHA-256 12121212", "WikiText-103 test (56db52eb)"),
            id="unknown file",
        ),
        pytest.param(
            {"data_name": None, "protocol": "lm-eval"}, ("unknown file", "WikiText raw test (173c87a5)"), id="raw"
        ),
        pytest.param(
            {"data_name": None, "task": "cbt-cn", "num_words": None},
            ("unknown file", "wiki.test.tokens has", "no hash of the published file is known"),
            id="no known hash",
        ),
        pytest.param(
            {"limit_lines": 9, "is_protocol_default": False},
            ("first 9 lines only; not the protocol's own context or stride",),
            id="two reasons",
        ),
    ],
)
def test_the_note(changed, parts):
    note = note_on_comparison(result(**changed))
    assert (note is None) == (parts is None)
    for part in ("not comparable with published results", *(parts or ())):
        assert note is None or part in note


def test_every_task_on_an_unknown_file_has_a_note():
    for name, task in TASKS.items():
        note = note_on_comparison(result(task=name, data_name=None))
        assert ("unknown file" in (note or "")) == (task.files is not None)

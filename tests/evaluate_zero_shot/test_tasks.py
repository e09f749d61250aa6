import subprocess
import sys

import pytest

from evaluate_zero_shot.protocols import PROTOCOLS
from evaluate_zero_shot.tasks import TASKS

LAMBADA = ["lambada", "lambada-strict", "lambada-last-token", "lambada-lm-eval", "lambada-stop-word"]
OTHERS = ["wikitext2", "wikitext103", "ptb", "enwik8", "text8", "1bw", "cbt-cn", "cbt-ne", "text"]


def test_every_task_has_its_name():
    assert sorted(TASKS) == sorted(LAMBADA + OTHERS)
    assert [name for name, task in TASKS.items() if task.kind == "last-word"] == LAMBADA


@pytest.mark.parametrize("name", LAMBADA)
def test_a_lambada_task_without_a_variant_leaves_it_to_the_protocol(name):
    variant = TASKS[name].last_word
    assert (variant or "") == name.removeprefix("lambada").removeprefix("-")
    assert variant is None or variant in {protocol.last_word for protocol in PROTOCOLS.values()} | {"last-token"}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_file_is_found_by_its_plain_name_too(task):
    for files in (task.files, task.raw_files):
        assert files is None or files.name in files.paths
    assert task.files_for("raw") is (task.raw_files or task.files)
    assert task.files_for("tokens") is task.files


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_accuracy_is_for_what_is_right_or_wrong(task):
    assert (task.headline == "accuracy") == (task.kind != "text")


def test_tasks_and_data_need_no_heavy_library():
    code = (
        "import sys, evaluate_zero_shot.texts.data_files, evaluate_zero_shot.texts.lambada\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

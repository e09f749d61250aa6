"""`megaft prepare` killed while it writes or publishes: the data before stay, or there are none."""

import re
import signal
import subprocess
import sys

import pytest

from megaft.base.errors import DataError
from megaft.data.indexed import TokenFile
from megaft.data.prepare import PrepareConfig, prepare
from megaft.data.receipt import load_receipt
from megaft.data.tokenizer import load_tokenizer

KILLED = """
import os, pathlib, signal, sys
from megaft.data import document_writer, prepare

def kill_at(owner, name, number):
    original, calls = getattr(owner, name), []
    def dying(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(owner, name, dying)

text, tokenizer, *prefixes = sys.argv[1:]
loaded = prepare.load_tokenizer(tokenizer)
prepare.load_tokenizer = lambda source: loaded
for prefix, (owner, name, number) in zip(prefixes, [
    (document_writer.DocumentWriter, "add", 3),
    (pathlib.Path, "replace", 1),
    (pathlib.Path, "replace", 2),
    (pathlib.Path, "replace", 3),
], strict=True):
    if not (child := os.fork()):
        kill_at(owner, name, number)
        prepare.prepare(prepare.PrepareConfig(inputs=(text,), output=pathlib.Path(prefix), tokenizer=tokenizer))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_killed_run_leaves_the_old_data_or_none(corpora, gpt2_bpe, tmp_path):
    source, old = str(gpt2_bpe), tmp_path / "old.txt"
    old.write_text("old")
    text = corpora / "book.txt"
    names = ["while writing", "before .bin", "before .idx", "before .json"]
    for name in names:
        receipt = prepare(PrepareConfig(inputs=(str(old),), output=tmp_path / name, tokenizer=source))
    arguments = [str(text), source, *(str(tmp_path / name) for name in names)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 4
    assert load_receipt(tmp_path / names[0]) == receipt
    assert TokenFile(tmp_path / names[0]).read(0, receipt["tokens"]).tolist() == load_tokenizer(source).encode("old")
    for name in names[1:]:
        with pytest.raises(DataError, match=rf"{re.escape(name)}\.json cannot be read"):
            load_receipt(tmp_path / name)
    prepare(PrepareConfig(inputs=(str(text),), output=tmp_path / names[3], tokenizer=source))
    assert load_receipt(tmp_path / names[3])["words"] == len(text.read_text(encoding="utf-8-sig").split())
    assert not list(tmp_path.glob(f"{names[3]}*.tmp"))

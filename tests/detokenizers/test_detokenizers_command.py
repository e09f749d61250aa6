import os
import subprocess
import sys

import detokenizers
import pytest
from detokenizers import wikitext
from detokenizers.__main__ import main

COMMAND = [sys.executable, "-m", "detokenizers"]
INVERTIBLE = [name for name in detokenizers.names() if detokenizers.is_invertible(name)]


def run(*arguments, data=b"", folder=None):
    return subprocess.run([*COMMAND, *arguments], input=data, capture_output=True, cwd=folder, check=False)


BYTES = [
    pytest.param(b"", id="nothing"),
    pytest.param(b" = a = \r\n a , b \r\n", id="CRLF"),
    pytest.param(b"\xef\xbb\xbf = a = \n a @-@ b \n", id="BOM"),
    pytest.param(b" = a = \n a , b ", id="no final newline"),
    pytest.param(b" = a = \n \x00 , \x00 \n\x00", id="NUL"),
    pytest.param(b" \xff , \xc3 ( \xa9 ) \xed\xa0\x80 \n \xe2\x81\xa0 \xe2\x81 \xa0 \n\xf0\x9f", id="invalid UTF-8"),
    pytest.param(("é" * 70_000 + " , " + "€" * 70_000).encode(), id="characters across chunks"),
    pytest.param(b" " + b"a , b @-@ c " * 100_000 + b"\n d , e \n", id="a line too long"),
]


@pytest.mark.slow
@pytest.mark.parametrize("data", BYTES)
def test_bytes_come_back(data):
    natural = run("wikitext", data=data)
    again = run("wikitext", "--invert", data=natural.stdout)
    assert (again.stdout, natural.stderr, again.stderr) == (data, b"", b"")
    expected = detokenizers.get("wikitext")(data.decode("utf-8", "surrogateescape"))
    assert natural.stdout == expected.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("name", INVERTIBLE)
def test_every_name_inverts(name):
    data = b" it 's a , b @-@ c <unk> \n"
    assert run(name, "--invert", data=run(name, data=data).stdout).stdout == data


def test_published_rules_take_the_whole_text():
    data = b' x " a \n b " y \n' * 10_000
    expected = detokenizers.get("wikitext_megatron")(data.decode())
    assert run("wikitext_megatron", data=data).stdout.decode() == expected


def test_list():
    lines = run("--list").stdout.decode().splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, "invertible" if name in INVERTIBLE else "lossy"] for name in detokenizers.names()
    ]
    megatron = run("wikitext_megatron", "--list").stdout.decode()
    assert megatron.splitlines() == [lines[2]]
    assert "Makes the same: 'a @-@ b' = 'a-b'; '1 @,@ 000' = '1,000'" in megatron


WIKITEXT = " the two @-@ part , \n and 5 N 7 a , b \n the two-part x \n 5 1 7 a-b \n"
CHECKS = [
    pytest.param(
        ("wikitext",),
        WIKITEXT,
        0,
        [
            "wikitext: round-trips; 19 words, 2 escape marks (105.26 per 1,000 words)",
            "wikitext_megatron: DOES NOT ROUND-TRIP; lossy rules, from line 2 on",
            "line 2 on: ' and 5 N 7 a , b ' comes back as ' and 5 1 7 a , b '",
            "line 1: 'two @-@ part' and line 3: 'two-part' both become 'two-part'",
            "line 2: '5 N 7' and line 4: '5 1 7' both become '5 1 7'",
        ],
        id="invertible",
    ),
    pytest.param(("wikitext_megatron",), WIKITEXT, 1, ["wikitext_megatron: DOES NOT ROUND-TRIP"], id="published"),
    pytest.param(
        ("lambada_openai",), "\na b", 0, ["lambada_openai: lossy rules, but this file is restored"], id="nothing lost"
    ),
    pytest.param((), " a , b \n", 0, [f"{name}: round-trips" for name in INVERTIBLE], id="every corpus"),
    pytest.param(("ptb_megatron",), " it 's \n a b \n", 0, ["ptb_megatron: lossy rules, but this file"], id="lucky"),
    pytest.param(
        ("1bw_sedd",),
        "".join(f"x{n} , y\nx{n}, y\n" for n in range(20)),
        1,
        ["line 1: 'x0 , y' and line 2: 'x0, y' both become 'x0, y'", "  and more"],
        id="more than are shown",
    ),
]


@pytest.mark.parametrize(("arguments", "text", "code", "expected"), CHECKS)
def test_check(tmp_path, arguments, text, code, expected):
    path = tmp_path / "text"
    path.write_text(text, "utf-8")
    result = run(*arguments, "--check", path)
    assert (result.returncode, result.stderr) == (code, b"")
    assert [line for line in expected if line not in result.stdout.decode()] == []


def test_check_finds_what_does_not_come_back(tmp_path, monkeypatch, capsys):
    path = tmp_path / "text"
    path.write_bytes(b" a , b \n")
    monkeypatch.setattr(wikitext.LINES, "retokenize", iter)
    assert main(["wikitext", "--check", str(path)]) == 1
    assert "wikitext: DOES NOT ROUND-TRIP" in capsys.readouterr().out


MISTAKES = [
    pytest.param(("wikitxt",), 2, "there is no detokenizer 'wikitxt'; use one of identity, wikitext,", id="name"),
    pytest.param((), 2, "a name is missing; use one of identity,", id="no name"),
    pytest.param(("ptb_megatron", "--invert"), 2, "ptb_megatron loses information and has no inverse", id="lossy"),
    pytest.param(("ptb", "--check", "nowhere.txt"), 3, "nowhere.txt: No such file or directory", id="no file"),
    pytest.param(("ptb", "--check", "."), 3, ".: Is a directory", id="a folder"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES)
def test_mistakes_take_one_line(tmp_path, arguments, code, message):
    result = run(*arguments, folder=tmp_path)
    assert (result.returncode, result.stdout) == (code, b"")
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith(f"detokenizers: {message}")


def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([*COMMAND, "identity"], input=b"a", stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, b"")


# A fresh process measures its child, because a fork of the test's own large process would count its memory.
MEASURE = """
import resource, subprocess, sys
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as sink:
    subprocess.run([sys.executable, "-m", "detokenizers", *sys.argv[3:]], stdin=source, stdout=sink, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_megabytes(source, sink, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, source, sink, *arguments], capture_output=True, text=True, check=True
    )
    return int(result.stdout) / 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "end"),
    [
        *((name, " \n a , b \n") for name in ("wikitext", "ptb", "1bw", "text8")),
        pytest.param("wikitext", "", id="no newline"),
    ],
)
def test_a_line_of_100_megabytes_takes_constant_memory(tmp_path, name, end):
    small, large, natural, again = (tmp_path / file for file in ("small", "large", "natural", "again"))
    small.write_text(" a , b \n")
    large.write_bytes(b" two @-@ part , \xff" * (100_000_000 // 17) + end.encode())
    baseline = peak_megabytes(small, natural, name)
    assert peak_megabytes(large, natural, name) < baseline + 60
    assert peak_megabytes(natural, again, name, "--invert") < baseline + 60
    assert os.path.getsize(again) == os.path.getsize(large)
    assert subprocess.run(["cmp", large, again], check=False).returncode == 0


@pytest.mark.slow
def test_a_whole_corpus_takes_constant_memory(corpora, tmp_path):
    train, natural, again = (tmp_path / name for name in ("train", "natural", "again"))
    train.write_bytes((corpora / "wikitext2/wiki.test.tokens").read_bytes() * 60)  # some 10 MB, as WikiText-2's
    assert peak_megabytes(train, natural, "wikitext") < 60
    assert peak_megabytes(natural, again, "wikitext", "--invert") < 60
    assert again.read_bytes() == train.read_bytes()

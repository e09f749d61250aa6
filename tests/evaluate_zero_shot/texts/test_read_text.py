import gzip

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from evaluate_zero_shot.tasks import TASKS
from evaluate_zero_shot.texts import data_files
from evaluate_zero_shot.texts.data_files import DataFile, read_text
from megaft.base.errors import DataError


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def text_of(path, task="text", limit_lines=None):
    return read_text(DataFile(path, "", None), TASKS[task], limit_lines)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", b"", "a.txt is empty; give a file with text", id="empty"),
        pytest.param("a.txt", b" \n\t\n", "a.txt holds only blank lines; give a file with text", id="blank"),
        pytest.param("a.txt", b"a\nb\xff", "a.txt, line 2, byte offset 3, is 0xff, which is not UTF-8", id="not UTF-8"),
        pytest.param(
            "a.txt", b"a\nb\xe2\x82", "a.txt, line 2, byte offset 3, is 0xe2, which is not", id="cut character"
        ),
        pytest.param("a.txt", b"a\0b", "a.txt, line 1, byte offset 1, is a NUL byte: the file is binary", id="binary"),
        pytest.param("a.txt", "ab".encode("utf-16"), "a.txt is UTF-16; convert it: iconv", id="UTF-16"),
        pytest.param("a.gz", b"plain", "a.gz is damaged or not a .gz file", id="no gzip"),
        pytest.param("a.gz", gzip.compress(b"abc" * 99)[:-9], "a.gz ends in the middle", id="gzip cut short"),
        pytest.param("a.zst", b"plain", "a.zst is damaged or not a .zst file", id="no zstandard"),
        pytest.param("a.zst", zstandard.compress(b"abc" * 99)[:-4], "a.zst ends in the middle", id="zst cut short"),
        pytest.param("a.gz", gzip.compress(b""), "a.gz is empty", id="gzip of nothing"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        text_of(written(tmp_path / name, content))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"a\r\nb\rc\x0b\n", "a\r\nb\rc\x0b\n", id="line ends stay"),
        pytest.param(b"\xef\xbb\xbfa\xef\xbb\xbf", "a\ufeff", id="only the first byte order mark goes"),
        pytest.param(b"no end", "no end", id="no final newline"),
    ],
)
def test_text_is_read_as_it_is(tmp_path, content, expected):
    assert text_of(written(tmp_path / "a.txt", content)) == expected


def test_several_compressed_streams_are_one_text(tmp_path):
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        assert text_of(written(tmp_path / f"a{suffix}", pack(b"a\n") + pack(b"b\n"))) == "a\nb\n"


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_text_comes_back(tmp_path_factory, text):
    text = f"x{text}"
    assert text_of(written(tmp_path_factory.mktemp("any") / "a.txt", text)) == text


@pytest.mark.parametrize(
    ("task", "content", "limit", "expected"),
    [
        pytest.param("text", "a\r\nb\nc", 2, "a\r\nb\n", id="lines"),
        pytest.param("text", "a\n", 9, "a\n", id="fewer than asked for"),
        pytest.param("lambada", '{"text": "a b"}\n{"text": "c d"}\n', 1, '{"text": "a b"}\n', id="rows"),
        pytest.param("cbt-cn", "1 a\n21 b\n\n\n1 c\n21 d\n", 1, "1 a\n21 b\n", id="questions"),
    ],
)
def test_a_limit_keeps_the_first(tmp_path, task, content, limit, expected):
    assert text_of(written(tmp_path / "a", content), task, limit) == expected


def test_a_limit_that_leaves_only_blanks_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"blank lines in its first 1 "):
        text_of(written(tmp_path / "a", " \n = A = \n"), "wikitext2", 1)


@pytest.mark.parametrize(
    ("task", "content", "expected"),
    [
        pytest.param("text8", "abcdefghijklmnopqrst", "qrst", id="the last part"),
        pytest.param("enwik8", "abcdefghijklmno€st", "st", id="from the first character that begins in it"),
        pytest.param("enwik8", "abcdefghijklm éßü", "ßü", id="on a character's beginning"),
        pytest.param("enwik8", "abcdefghijklmnopqrs", "abcdefghijklmnopqrs", id="another length: the whole"),
        pytest.param("text", "abcdefghijklmnopqrst", "abcdefghijklmnopqrst", id="another task: the whole"),
    ],
)
def test_the_test_part_of_the_whole_file(tmp_path, monkeypatch, task, content, expected):
    monkeypatch.setattr(data_files, "FULL_BYTES", 20)
    monkeypatch.setattr(data_files, "TEST_BYTES", 4)
    assert text_of(written(tmp_path / "a", content), task) == expected


def test_an_error_in_the_test_part_counts_from_the_files_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "FULL_BYTES", 10)
    monkeypatch.setattr(data_files, "TEST_BYTES", 4)
    with pytest.raises(DataError, match="line 2, byte offset 8, is 0xff"):
        text_of(written(tmp_path / "a", b"ab\xff\nefgh\xffj"), "enwik8")

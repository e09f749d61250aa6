"""Report: contents, escaping of every value, and no external resources."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
from example_results import four_sizes, lambada, result, write_results

from evaluate_zero_shot.protocols import PROTOCOLS, statements
from evaluate_zero_shot.report import plots, write
from megaft.base.errors import ConfigError, DataError

VOID = {"meta", "br"}


class Page(HTMLParser):
    """The elements, attributes and text of a page; complains of elements that are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.ids = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def made(folder, results):
    write_results(folder, results)
    write.write(folder)
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    return html, markdown


def rows_of(markdown):
    """The cells of each table of a Markdown text."""
    tables, lines = [], markdown.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            tables[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return tables


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return made(tmp_path_factory.mktemp("four"), four_sizes())


def test_page_is_whole_and_loads_nothing(four):
    page = Page(four[0])
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [one for one in page.attributes if one[1] in ("src", "href", "xlink:href", "style", "action", "id")]
    assert not [one for one in page.attributes if one[1].startswith("on")]
    assert page.tags.count("h1") == 1
    assert "url(" not in four[0]
    assert "@import" not in four[0]


def test_policy_allows_only_the_pages_own_style(four):
    html = four[0]
    style = html.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    [policy] = [
        value for tag, name, value in Page(html).attributes if tag == "meta" and str(value).startswith("default")
    ]
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_tables_of_the_markdown_are_whole(four):
    tables = rows_of(four[1])
    assert len(tables) > 10
    for table in tables:
        assert len({len(row) for row in table}) == 1, table[0]
        assert all(set(cell) <= set("-:") for cell in table[1])


def test_several_models_stand_in_one_table_beside_the_paper(four):
    header, _, *rows = next(one for one in rows_of(four[1]) if "GPT-2 paper" in one[0])
    assert header[:2] == ["Model", "megatron, 1,024/32"]
    column = header.index("GPT-2 paper")
    assert [(row[0], row[column]) for row in rows] == [
        ("gpt2", "37.50"),
        ("gpt2-medium", "26.37"),
        ("gpt2-large", "22.05"),
        ("gpt2-xl", "17.48"),
    ]
    assert "GPT-2 paper" in Page(four[0]).words


def test_both_reports_say_which_figures_are_reproduced(four):
    for text in (Page(four[0]).words, four[1]):
        assert text.count("agrees to the printed digits") == 3  # gpt2-large on WikiText-2, gpt2 on LAMBADA twice
        assert "lm-eval, issue 2159" in text
        assert "Detokenizer: Megatron-LM's rules, which lose information; published: none" in text.replace("\\", "")
        assert "Megatron-LM 8.3B" in text


@pytest.mark.slow
def test_definitions_of_the_protocols_used_are_there(four):
    for name in ("megatron", "hf-docs", "lm-eval"):
        for phrase in (*statements(PROTOCOLS[name]).values(), PROTOCOLS[name].note):
            assert " ".join(phrase.split()) in Page(four[0]).words
    assert "fairseq: fairseq eval_lm" not in Page(four[0]).words


def test_command_is_quoted_for_a_shell(four):
    command = "python -m evaluate_zero_shot --model models/gpt2 --data 'my data/x.txt'"
    assert command in Page(four[0]).words
    assert f"    {command}\n" in four[1]


NASTY = "<script>alert(1)</script>\"'&|`*x*`_y_[z](http://a.b)\n\n# h"


def test_everything_is_shown_as_text(tmp_path):
    plain = result()
    nasty = {key: NASTY for key, value in plain.items() if isinstance(value, str)}
    kept = {"task": "wikitext103", "protocol": "megatron", "headline": "word_perplexity"}
    html, markdown = made(tmp_path, [plain | nasty | kept | {"command": [NASTY]}])
    page = Page(html)
    assert "script" not in page.tags
    assert "a" not in page.tags
    assert "<script>alert(1)</script>" in page.words
    prose = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert not re.search(r"(?<!\\)<script|(?<!\\)`|^# h|(?<!\\)\]\(", prose, re.MULTILINE)
    assert {len({len(row) for row in table}) for table in rows_of(markdown)} == {1}


@pytest.mark.parametrize("name", ["# h", "- a", "1. a", "2) a", "+ a", "---", "= b", "~~~plots", "> a", "[a]: b"])
def test_a_name_that_looks_like_markup_is_text(tmp_path, name):
    page = Page(made(tmp_path, [result(model_name=name, model=name)])[0])
    assert f"{name} on WikiText-103 test." in page.words
    assert page.tags.count("h1") == 1
    assert "hr" not in page.tags


@pytest.mark.parametrize("strides", [(32,), (32, 256, 1024)])
def test_stride_sweep_is_shown_when_there_are_several(tmp_path, strides):
    html, _ = made(tmp_path, [result(stride=stride) for stride in strides])
    page = Page(html)
    assert ("Stride sweep" in page.words) is (len(strides) > 1)
    assert page.tags.count("figure") == 2 * len(strides) + (len(strides) > 1)


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        ({}, None),
        ({"is_protocol_default": False, "task": "lambada"}, "not the protocol's own context or stride"),  # cut prompts
        ({"data_name": None}, "unknown file"),
        ({"data_name": None, "task": "text"}, None),  # a text of one's own
        ({"data_name": "WikiText raw test"}, "not the protocol's text"),
        ({"data_name": "WikiText-103 validation"}, "validation set, not the test set"),
        ({"data_name": "WikiText raw test", "protocol": "lm-eval"}, None),
        ({"limit_lines": 200}, "first 200 lines only"),
        ({"is_protocol_default": False, "stride": 64}, "not the protocol's own context or stride"),
        ({"word_perplexity": math.exp(20)}, "capped at e^20 by the protocol"),
        ({"word_perplexity": math.exp(20), "protocol": "lm-eval"}, None),
        ({"word_perplexity": "inf", "protocol": "lm-eval"}, "above 1.8e+308: finite nats, too few words"),
    ],
)
def test_what_is_not_as_named_is_said(tmp_path, changed, warning):
    html, markdown = made(tmp_path, [result(**changed)])
    for text in (Page(html).words.lower(), markdown):
        marks = ("unknown file", "lines only", "protocol's own context", "capped at", "above 1.8")
        found = [one for one in marks if one in text]
        found += [one for one in ("not the protocol's text", "not the test set") if one in text]
        assert found == ([] if warning is None else [one for one in found if one in warning])
        assert warning is None or warning in text


@pytest.mark.parametrize(
    "odd",
    [
        {"word_perplexity": "inf", "nats": "inf", "bits_per_byte": "nan"},
        {"word_perplexity": math.inf, "perplexity": math.nan},  # as json.dumps writes them: Infinity, NaN
        {"word_perplexity": None, "confidence_interval_95": None, "headline": None},
        {"positions": [], "segments": []},
        {"positions": [(0, 0, 0.0)], "segments": [(0, 0.0), (5, "inf"), (5, 2.0)]},
        {"positions": None, "segments": None, "seconds": None, "model_sha256": None},
    ],
)
def test_odd_values_do_not_break_it(tmp_path, odd):
    html, markdown = made(tmp_path, [result(**odd)])
    Page(html)
    assert not re.search(r"\b(nan|inf|None)\b", html.partition("</style>")[2])
    assert "| gpt2 |" in markdown


@pytest.mark.parametrize("nats", ["nan", "inf", math.nan])
def test_figures_made_of_nats_that_are_not_finite_are_not_shown(tmp_path, nats):
    """As an earlier version wrote them: Megatron-LM's cap, or an accuracy of 0, for a model that computed NaN."""
    bad = {"nats": nats, "perplexity": math.exp(20), "word_perplexity": math.exp(20), "bits_per_byte": nats}
    interval = {"quantity": "accuracy", "low": 0.0, "high": 0.0007, "method": "Wilson, 5153 examples"}
    zero = lambada(accuracy=0.0, nats=nats, word_perplexity="inf", confidence_interval_95=interval)
    html, markdown = made(tmp_path, [result(**bad), zero])
    for text in (Page(html).words, markdown):
        assert text.lower().count("nats are not finite: no metrics") == 2
        assert not re.search(r"4\.85e|485,?165|0\.00 %|0\.07 %|> 1\.8e", text.replace("\\", ""))


def test_no_result_is_said(tmp_path):
    html, markdown = made(tmp_path, [])
    assert "results.json holds no result" in Page(html).words
    assert "results.json holds no result" in markdown


def test_fields_that_may_lack_do(tmp_path):
    html, _ = made(tmp_path, [{"model_name": "m", "task": "ptb", "protocol": "olmo"}])
    assert "unknown file" in Page(html).words.lower()


def test_models_of_one_name_are_told_apart_by_their_paths(tmp_path):
    html, _ = made(tmp_path, [result(model="runs/a/export"), result(model="runs/b/export")])
    assert "runs/a/export, runs/b/export on WikiText-103" in Page(html).words


def test_no_folder_of_this_machine_is_in_a_report(tmp_path):
    models = [f"{tmp_path}/runs/{name}/export" for name in "ab"]
    command = ["python", f"{tmp_path}/score.py", f"--data={tmp_path}/my data/x.txt", *models]
    results = [result(command=command) | {"model": model, "model_name": "export"} for model in models]
    for text in made(tmp_path, results):
        assert str(tmp_path) not in text
        assert text.count("a/export") == text.count("b/export") > 0


def test_precision_and_weights_tell_results_apart(tmp_path):
    half = result(dtype="bfloat16")
    html, markdown = made(tmp_path, [result(), half, result(model_sha256="c" * 64)])
    for text in (Page(html).words, markdown):
        assert "megatron, 1,024/32, bfloat16" in text
        assert "gpt2 (cccccccc)" in text


def test_a_definition_that_changed_since_is_another_protocol(tmp_path):
    write_results(tmp_path, [lambada()])
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    content["protocols"]["lm-eval"] = asdict(PROTOCOLS["lm-eval"]) | {"last_word": "last-token"}
    path.write_text(json.dumps(content))
    write.write(tmp_path)
    assert "agrees" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        '{"results": [{}]}',
        '{"results": [{"model_name": "m", "task": "ptb", "protocol": "gpt9"}]}',
        '{"results": [{"model_name": "m", "task": "wt9", "protocol": "megatron"}]}',
    ],
)
def test_a_wrong_results_file_is_refused_by_name(tmp_path, text):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match=r"results\.json is not"):
        write.write(tmp_path)


def test_command_makes_both_again_without_torch(tmp_path):
    write_results(tmp_path, four_sizes()[:2])
    command = [sys.executable, "-X", "importtime", "-m", "evaluate_zero_shot.report", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "evaluate_zero_shot.report.sections" in done.stderr
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html", "report.md"}


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--flag"]])
def test_command_explains_itself(arguments):
    with pytest.raises(ConfigError, match="usage"):
        write.main(arguments)


def test_plot_places_points_and_breaks_at_what_is_not_finite():
    found = plots.draw({"a": [(1, 2.0), (2, math.nan), (3, 4.0)], "b": [(1, 3.0), (3, 3.0)]}, "x", "y")
    assert [line for _, line, _ in found.lines] == ["M0.0 1000.0M1000.0 0.0", "M0.0 500.0L1000.0 500.0"]
    assert found.x_ticks[0] == (0, "1")
    assert found.y_ticks[0] == (100, "2")
    assert found.y_ticks[-1] == (0, "4")


def test_positions_are_means_at_the_middle_of_their_bins():
    found = plots.by_position({"a": [(0, 10, 50.0), (15, 30, 60.0), (63, 5, 5.0)]}, 255)
    assert [tick for _, tick in found.x_ticks] == [
        "4",
        "16",
        "64",
    ]  # middles: sqrt(1 * 15), sqrt(16 * 63), sqrt(64 * 255)
    assert found.y_ticks[0][1] == "1"
    assert found.y_ticks[-1][1] == "5"
    assert found.lines[0][1].startswith("M0.0 0.0L")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 5, [0, 1, 2, 3, 4, 5]),
        (2.91, 3.33, [2.9, 3.0, 3.1, 3.2, 3.3, 3.4]),
        (17, 49, [10, 20, 30, 40, 50]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_numbers_around_the_range(low, high, ticks):
    found = plots.draw({"a": [(1, low), (2, high)]}, "x", "y")
    assert [float(label) for _, label in found.y_ticks] == ticks


def test_one_point_is_no_plot():
    assert plots.draw({"a": [(1, 1.0)]}, "x", "y") is None
    assert plots.draw({}, "x", "y") is None

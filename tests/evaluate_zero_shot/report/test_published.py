"""Published results: completeness of the list, and agreement only of the same quantity."""

import json

import pytest
from example_results import lambada, result

from evaluate_zero_shot.protocols import PROTOCOLS
from evaluate_zero_shot.report.comparison import compare
from evaluate_zero_shot.report.published import FILE, load
from megaft.base.errors import DataError

FIGURES = load()
PAPER = "GPT-2 paper"
GPT2_TABLE = {  # table 3 of the paper, in its order
    "gpt2": ["35.13", "45.99 %", "87.65 %", "83.4 %", "29.41", "65.85", "1.16", "1.17", "37.50", "75.20"],
    "gpt2-medium": ["15.60", "55.48 %", "92.35 %", "87.1 %", "22.76", "47.33", "1.01", "1.06", "26.37", "55.72"],
    "gpt2-large": ["10.87", "60.12 %", "93.45 %", "88.0 %", "19.93", "40.31", "0.97", "1.02", "22.05", "44.575"],
    "gpt2-xl": ["8.63", "63.24 %", "93.30 %", "89.05 %", "18.34", "35.76", "0.93", "0.98", "17.48", "42.16"],
}
COLUMNS = [
    ("lambada", "word_perplexity"),
    ("lambada", "accuracy"),
    ("cbt-cn", "accuracy"),
    ("cbt-ne", "accuracy"),
    ("wikitext2", "word_perplexity"),
    ("ptb", "word_perplexity"),
    ("enwik8", "bits_per_byte"),
    ("text8", "bits_per_character"),
    ("wikitext103", "word_perplexity"),
    ("1bw", "word_perplexity"),
]
OTHERS = {
    ("megatron-gpt2-345m", "wikitext103", "word_perplexity", "megatron", "19.31"),
    ("megatron-gpt2-345m", "lambada", "accuracy", "megatron", "45.18 %"),
    ("megatron-gpt2-2.5b", "wikitext103", "word_perplexity", "megatron", "12.76"),
    ("megatron-gpt2-2.5b", "lambada", "accuracy", "megatron", "61.73 %"),
    ("megatron-gpt2-8.3b", "wikitext103", "word_perplexity", "megatron", "10.81"),
    ("megatron-gpt2-8.3b", "lambada", "accuracy", "megatron", "66.51 %"),
    ("gpt2-large", "wikitext2", "perplexity", "hf-docs", "19.44"),
    ("gpt2-large", "wikitext2", "perplexity", "hf-docs", "16.44"),
    ("gpt2", "wikitext2", "perplexity", "hf-docs", "29.94"),
    ("gpt2", "wikitext103", "perplexity", "hf-docs", "29.94"),
    ("gpt2", "wikitext2", "word_perplexity", "lm-eval", "37.37"),
    ("gpt2", "wikitext103", "word_perplexity", "lm-eval", "37.37"),
    ("gpt2", "lambada", "accuracy", "lm-eval", "0.3256"),
    ("gpt2", "lambada", "word_perplexity", "lm-eval", "40.05"),
    ("gpt2", "wikitext2", "word_perplexity", "lm-finetuning", "34.70"),
    ("gpt2-medium", "wikitext2", "word_perplexity", "lm-finetuning", "26.5"),
    ("gpt2-large", "wikitext2", "word_perplexity", "lm-finetuning", "22.87"),
    ("gpt2-xl", "wikitext2", "word_perplexity", "lm-finetuning", "20.92"),
    ("gpt2", "wikitext103", "word_perplexity", "lm-finetuning", "35.51"),
    ("gpt2-medium", "wikitext103", "word_perplexity", "lm-finetuning", "25.68"),
    ("gpt2-large", "wikitext103", "word_perplexity", "lm-finetuning", "21.88"),
    ("gpt2-xl", "wikitext103", "word_perplexity", "lm-finetuning", "19.80"),
    ("megatron_11b", "wikitext103", "word_perplexity", "fairseq", "10.54"),
    ("meta-llama/Llama-2-7b-hf", "wikitext2", "word_perplexity", "lm-eval", "8.79"),
    ("gpt2-xl", "lambada", "accuracy", None, "52.66 %"),
}


def test_every_figure_of_the_gpt2_paper_is_there():
    written = {(one.model.aliases[0], one.task, one.metric): one.printed for one in FIGURES if one.title == PAPER}
    rows = GPT2_TABLE.items()
    assert written == {
        (model, *column): value for model, values in rows for column, value in zip(COLUMNS, values, strict=True)
    }


def test_every_other_figure_is_there():
    written = [
        (one.model.aliases[0], one.task, one.metric, one.protocol, one.printed) for one in FIGURES if one.title != PAPER
    ]
    assert set(written) == OTHERS
    assert len(written) == len(OTHERS)


def test_sizes_of_the_models():
    sizes = {one.model.aliases[0]: one.model.num_parameters for one in FIGURES}
    assert {name: sizes[name] for name in GPT2_TABLE} == {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }


@pytest.mark.parametrize(
    ("name", "num_parameters", "is_it"),
    [
        ("gpt2", 124439808, True),
        ("openai-community/gpt2", 124439808, True),
        ("/data/models/gpt2/", None, True),
        ("gpt2", 1000, False),
        ("my-gpt2", 124439808, False),
        ("gpt2/finetuned", 124439808, False),
    ],
)
def test_a_model_is_known_by_name_and_size(name, num_parameters, is_it):
    assert FIGURES[0].model.is_model(name, num_parameters) is is_it


def figure(title, model, task, metric):
    [found] = [
        one
        for one in FIGURES
        if (one.title, one.model.aliases[0], one.task, one.metric) == (title, model, task, metric)
    ]
    return found


@pytest.mark.parametrize(
    ("title", "metric", "measured", "agrees"),
    [
        (PAPER, "word_perplexity", 35.1349, True),
        (PAPER, "word_perplexity", 35.1351, False),
        (PAPER, "word_perplexity", float("nan"), False),
        (PAPER, "word_perplexity", float("inf"), False),
        (PAPER, "accuracy", 0.45994, True),
        (PAPER, "accuracy", 0.45996, False),
        ("lm-eval, issue 2159", "accuracy", 0.32564, True),
        ("lm-eval, issue 2159", "accuracy", 0.32566, False),
    ],
)
def test_agreement_is_to_the_printed_digits(title, metric, measured, agrees):
    assert figure(title, "gpt2", "lambada", metric).agrees(measured) is agrees


DOCS = ("HF documentation, stride 512", "gpt2-large", "wikitext2", "perplexity")
EVAL = ("lm-eval, issue 13761", "gpt2", "wikitext2", "word_perplexity")
LAMBADA = ("lm-eval, issue 2159", "gpt2", "lambada", "accuracy")
SAME, OFF = "same protocol: agrees to the printed digits", "same protocol: differs by 1.00 %"
OTHER, ELSEWHERE = "another protocol", "same protocol, not the same measurement"


def docs(**changed):
    return result("gpt2-large", "wikitext2", "hf-docs", stride=512, perplexity=16.4412) | changed


def harness(**changed):
    return result("gpt2", "wikitext2", "lm-eval", stride=1024, word_perplexity=37.37) | changed


@pytest.mark.parametrize(
    ("measured", "key", "verdict", "reason"),
    [
        pytest.param(docs(), DOCS, SAME, None, id="same"),
        pytest.param(docs(perplexity=16.6044), DOCS, OFF, None, id="same protocol, another number"),
        pytest.param(
            docs(perplexity="inf"), DOCS, "same protocol: the measured value is not finite", None, id="infinite"
        ),
        pytest.param(docs(stride=1024), DOCS, OTHER, "Stride: 1024; published: 512", id="stride"),
        pytest.param(docs(context_length=512), DOCS, OTHER, "Context length: 512; published: 1024", id="context"),
        pytest.param(docs(data_name=None), DOCS, ELSEWHERE, "Data: an unknown file; published: ", id="unknown file"),
        pytest.param(docs(data_name="WikiText raw validation"), DOCS, ELSEWHERE, "Data: WikiText raw val", id="split"),
        pytest.param(docs(limit_lines=1000), DOCS, ELSEWHERE, "Data: only the first 1,000 lines", id="limited"),
        pytest.param(docs(num_parameters=7), DOCS, ELSEWHERE, "Model: gpt2-large; published: GPT-2 762M", id="model"),
        pytest.param(docs(task="wikitext103"), DOCS, ELSEWHERE, "Task: wikitext103; published: wikitext2", id="task"),
        pytest.param(docs(protocol="megatron"), DOCS, OTHER, "Protocol: megatron; published: hf-docs", id="protocol"),
        pytest.param(harness(), EVAL, SAME, None, id="a context that is the model's own"),
        pytest.param(harness(context_length=512, stride=512), EVAL, OTHER, "Context length: 512", id="shorter context"),
        pytest.param(lambada(), LAMBADA, SAME, None, id="accuracy is a share in both"),
        pytest.param(lambada(context_length=224, stride=1), LAMBADA, SAME, None, id="prompts have no windows"),
        pytest.param(
            lambada(context_length=32, is_protocol_default=False),
            LAMBADA,
            OTHER,
            "Context length: 32",
            id="cut prompts",
        ),
        pytest.param(
            lambada() | {"task": "lambada-lm-eval"}, LAMBADA, SAME, None, id="the variant that is the protocol's own"
        ),
        pytest.param(
            lambada() | {"task": "lambada-last-token"},
            LAMBADA,
            OTHER,
            "LAMBADA: correct if the last token",
            id="another variant",
        ),
        pytest.param(
            result(protocol="gpt2-paper", word_perplexity=37.5),
            (PAPER, "gpt2", "wikitext103", "word_perplexity"),
            OTHER,
            "Not published: Prefix token",
            id="a protocol of which not all is known is never the same",
        ),
        pytest.param(
            result(protocol="lm-finetuning", stride=1024, word_perplexity=35.51),
            ("lm-finetuning", "gpt2", "wikitext103", "word_perplexity"),
            OTHER,
            "The original averages batch means",
            id="a protocol whose original departs from its name",
        ),
        pytest.param(
            lambada("gpt2-xl", accuracy=0.5266),
            ("GPT-2 paper, no stop-word filter", "gpt2-xl", "lambada", "accuracy"),
            OTHER,
            "The paper names the accuracy",
            id="no protocol",
        ),
    ],
)
def test_verdict(measured, key, verdict, reason):
    found = compare(measured, PROTOCOLS[measured["protocol"]], figure(*key))
    assert found.verdict == verdict
    assert found.is_reproduced is (verdict == SAME)
    assert (reason is None and not found.reasons) or any(one.startswith(reason) for one in found.reasons)


def test_only_the_figures_own_protocol_can_reproduce_it():
    for one in FIGURES:
        share = one.value / 100 if one.printed.endswith("%") else one.value
        values = dict.fromkeys(("perplexity", "word_perplexity", "bits_per_byte", "accuracy"), share)
        for name, protocol in PROTOCOLS.items():
            if name != one.protocol:
                model = {"model_name": one.model.aliases[0], "num_parameters": one.model.num_parameters}
                window = {"stride": one.stride or 32, "data_name": one.data_name}
                measured = result(task=one.task, protocol=name, **window, **model, **values)
                assert not compare(measured, protocol, one).is_reproduced


def test_accuracy_is_shown_in_the_unit_of_the_source():
    found = compare(lambada(accuracy=0.46), PROTOCOLS["lm-eval"], figure(PAPER, *LAMBADA[1:]))
    assert (found.measured_text, found.difference_text) == ("46.00 %", "+0.02 %")


def broken(change):
    content = json.loads(FILE.read_text(encoding="utf-8"))
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a list of published results"),
        ("[]", "is not a list of published results"),
        (broken(lambda it: it["sources"][0].pop("caveat")), "caveat"),
        (broken(lambda it: it["sources"][0].update(surprise=1)), "surprise"),
        (broken(lambda it: it["sources"][0].update(protocol="gpt3")), "protocol 'gpt3' is not one of"),
        (broken(lambda it: it["sources"][1].update(caveat="")), "does not say why"),
        (broken(lambda it: it["sources"][0].update(unpublished=["Prefix"])), "unpublished has Prefix"),
        (broken(lambda it: it["sources"][3].update(context_length=None)), "context_length is null"),
        (broken(lambda it: it["sources"][0]["figures"].append(["gpt5", "ptb", "perplexity", "1.0"])), "gpt5"),
        (broken(lambda it: it["sources"][0]["figures"].append(["gpt2", "ptb", "perplexity", "1e3"])), "not a number"),
        (broken(lambda it: it["sources"][0]["figures"].append(["gpt2", "ptb", "ppl", "1.0"])), "metric 'ppl'"),
        (broken(lambda it: it["sources"][0]["figures"].append(["gpt2", "wt2", "perplexity", "1.0"])), "task 'wt2'"),
        (broken(lambda it: it["files"]["ptb"].update(tokens="Penn")), "'Penn' is not a known one"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "published.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"published\.json") as caught:
        load(path)
    assert message in str(caught.value)

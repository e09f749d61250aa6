import pytest

from evaluate_zero_shot.evaluation.geometry import resolve_geometry
from evaluate_zero_shot.protocols import PROTOCOLS, describe, differences
from megaft.base.errors import ConfigError


@pytest.mark.parametrize(
    # asked: --context-length, --stride; expected: inputs of a window, stride, whether both are the protocol's own
    ("protocol", "context_limit", "asked", "expected"),
    [
        pytest.param("megatron", 1024, (None, None), (1024, 32, True), id="Megatron: 1024 inputs, 32 apart"),
        pytest.param("megatron", 2048, (None, None), (1024, 32, True), id="its context is not the model's"),
        pytest.param("megatron", 1024, (None, 1024), (1024, 1024, False), id="non-overlapping by --stride"),
        pytest.param("lm-eval", 2048, (None, None), (2048, 2048, True), id="lm-eval: the model's own"),
        pytest.param("lm-eval-megatron", 2048, (None, None), (2047, 2047, True), id="its Megatron backend: one less"),
        pytest.param("hf-docs", 1024, (None, None), (1023, 512, True), id="HF: the last token is only a target"),
        pytest.param("hf-docs", 1024, (None, 1024), (1023, 1024, False), id="HF, stride = context: chunks"),
        pytest.param("lm-finetuning", 1024, (None, None), (1023, 1024, True), id="chunks"),
        pytest.param("megaft", 1024, (None, None), (1024, 512, True), id="megaft: half the context"),
        pytest.param("megaft", 1024, (256, None), (256, 128, False), id="a shorter context is not its own"),
        pytest.param("megaft", 1024, (1024, 512), (1024, 512, True), id="its own, said aloud"),
    ],
)
def test_geometry(protocol, context_limit, asked, expected):
    found = resolve_geometry(PROTOCOLS[protocol], context_limit, *asked)
    assert (found.num_inputs, found.stride, found.is_default) == expected


@pytest.mark.parametrize(
    ("protocol", "context_limit", "asked", "message"),
    [
        ("megatron", 512, (None, None), "^the context length of --protocol megatron is 1024, .*--context-length 512;"),
        (
            "megatron",
            16,
            (None, None),
            "^the context length of --protocol megatron .*--context-length 16 and --stride 8",
        ),
        ("megaft", None, (None, None), "^--context-length is not given"),
        ("megaft", 1024, (128, 129), "^--stride is 129, but --context-length is 128; set --stride to 1 to 128"),
        ("megaft", 64, (None, 65), "^--stride is 65, but the model's number of positions is 64; .*1 to 64"),
        ("lm-eval-megatron", 1024, (None, 1024), "^--stride is 1024, .*1 to 1023"),
        ("megaft", 1024, (2048, None), "^--context-length is 2048, but the model has 1024 positions; .*length 1024;"),
        ("hf-docs", 256, (None, None), "^the stride of --protocol hf-docs is 512, but the model's .* 256; .*1 to 256"),
        (
            "hf-docs",
            1024,
            (256, None),
            "^the stride of --protocol hf-docs is 512, but --context-length is 256; .*--stride",
        ),
        ("hf-docs", 1024, (1, 1), "^--context-length is 1; .*2 or more"),
        ("lm-eval-megatron", 1024, (1, None), "^--context-length is 1; .*2 or more"),
    ],
)
def test_windows_that_do_not_fit_are_refused(protocol, context_limit, asked, message):
    with pytest.raises(ConfigError, match=message):
        resolve_geometry(PROTOCOLS[protocol], context_limit, *asked)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_describes_itself(name):
    text = describe(PROTOCOLS[name])
    for part in (PROTOCOLS[name].title, PROTOCOLS[name].source, PROTOCOLS[name].note, "Stride", "Prefix token"):
        assert part in text
    assert "None" not in text
    assert differences(PROTOCOLS[name], PROTOCOLS[name]) == []


def test_differences_name_the_field_and_both_ways():
    fields = {difference.field: difference for difference in differences(PROTOCOLS["lm-eval"], PROTOCOLS["megatron"])}
    assert (fields["stride"].ours, fields["stride"].theirs) == ("the context length", "32")
    assert fields["scope"].ours.startswith("each page")
    assert "detokenizer" not in fields

import json
from pathlib import Path

import corpora as made
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2TokenizerFast

from evaluate_zero_shot.evaluation.prepared import encode_pair
from evaluate_zero_shot.texts.lambada import STOP_WORDS, Example, examples, rows, stop_tokens
from megaft.base.errors import DataError
from megaft.data.tokenizer import load_tokenizer

VARIANTS = ["strict", "last-token", "lm-eval", "stop-word"]
PASSAGES = st.text(" \n\tab.é'", min_size=1).filter(lambda text: len(text.split()) > 1)


@pytest.fixture(scope="module")
def passages(corpora):
    path = corpora / "lambada/lambada_test.jsonl"
    return rows(path.read_bytes().decode(), path)


@pytest.fixture(scope="module")
def published(shared):
    path = shared / "data/lambada/lambada_test.jsonl"
    return rows(path.read_bytes().decode(), path)


@pytest.fixture(scope="module")
def gpt2(gpt2_bpe):
    return GPT2TokenizerFast.from_pretrained(gpt2_bpe)


def encode(tokenizer):
    return lambda text: tokenizer(text)["input_ids"]


@pytest.mark.slow
def test_the_published_file(published, shared):
    passages, gpt2 = published, GPT2TokenizerFast.from_pretrained(shared / "data/gpt2_bpe")
    tokens = [len(ids) for ids in gpt2(passages)["input_ids"]]
    assert (len(passages), sum(tokens), max(tokens)) == (5_153, 430_230, 224)
    targets = gpt2([item.target for item in examples(passages, "strict")])["input_ids"]
    assert round(100 * sum(len(ids) > 1 for ids in targets) / len(targets), 1) == 22.1


def num_differences(passages):
    pairs = zip(examples(passages, "strict"), examples(passages, "lm-eval"), strict=True)
    return sum(strict != lm_eval for strict, lm_eval in pairs)


def test_strict_and_lm_eval_differ_where_a_line_break_comes_before_the_word(passages):
    assert passages == made.passages()
    assert num_differences(passages) == sum("\n" in passage.rpartition(" ")[2] for passage in passages) > 0


def test_strict_and_lm_eval_differ_in_seven_published_rows(published):
    assert num_differences(published) == 7


@pytest.mark.parametrize(
    ("variant", "row", "expected"),
    [
        pytest.param("strict", "He said  hello", Example("He said", " hello"), id="strict"),
        pytest.param(
            "strict", "\nto be or to  ", Example("to be or", " to"), id="strict strips, and takes the last place"
        ),
        pytest.param("strict", "a\nb", Example("a", " b"), id="strict: any white space parts words"),
        pytest.param("last-token", " to be ", Example(" to be ", ""), id="last token: as it is"),
        pytest.param("lm-eval", "He said hello", Example("He said", " hello"), id="lm-eval"),
        pytest.param("lm-eval", "He\nsaid hello\nyou", Example("He\nsaid", " hello\nyou"), id="lm-eval: spaces only"),
        pytest.param("lm-eval", "He said  hello", Example("He said", "  hello"), id="lm-eval: spaces go to the target"),
        pytest.param("lm-eval", "a\nb", Example("", " a\nb"), id="lm-eval: no context without a space"),
        pytest.param(
            "stop-word", "\nto be  or to", Example("\nto be  or", " to"), id="stop-word keeps OpenAI's newline"
        ),
    ],
)
def test_items(variant, row, expected):
    assert examples([row], variant) == [expected]


@given(PASSAGES)
def test_laws_of_the_variants(row):
    strict, last_token, lm_eval, stop_word = (examples([row], variant)[0] for variant in VARIANTS)
    assert last_token.context == row
    assert f"{strict.context}{strict.target}".split() == row.split()
    assert f"{stop_word.context}{stop_word.target}".split() == row.split()
    assert lm_eval.context == lm_eval.context.rstrip()
    assert lm_eval.context + lm_eval.target == (row if " " in row else f" {row}")


@given(st.lists(PASSAGES, max_size=5))
def test_rows_are_what_was_written(texts):
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    assert rows(content, Path("x.jsonl")) == texts
    assert rows(content.replace("\n", "\r\n\r\n"), Path("x.jsonl")) == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param('{"text": "a b', r"x.jsonl, line 2, column 10: broken JSON", id="broken"),
        pytest.param('["a b"]', r"x.jsonl, line 2 is a JSON list; every record must be a JSON object", id="no object"),
        pytest.param('{"txt": "a b"}', r"x.jsonl, line 2 has no key 'text'; its keys are 'txt'", id="other key"),
        pytest.param('{"text": 3}', r"x.jsonl, line 2: 'text' is a int; it must be a string", id="no string"),
        pytest.param('{"text": "one "}', r"x.jsonl, line 2: the text 'one ' has fewer than two words", id="a word"),
        pytest.param('{"text": " "}', r"x.jsonl, line 2: .* has fewer than two words", id="blank"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line, message):
    with pytest.raises(DataError, match=message):
        rows(f'{{"text": "a b"}}\n{line}\n', Path("x.jsonl"))


def test_stop_words_are_plain_words_once():
    assert len(set(STOP_WORDS)) == len(STOP_WORDS) > 100
    assert all(word.isalpha() and word.islower() for word in STOP_WORDS)


def test_stop_tokens_are_whole_words_with_their_space(gpt2):
    barred = stop_tokens(encode(gpt2))
    assert {gpt2.decode([token]) for token in barred} <= {f" {word}" for word in STOP_WORDS}
    assert encode(gpt2)(" the")[0] in barred
    (method,) = encode(gpt2)(" method")  # its first letters are those of " me"
    assert method not in barred
    assert stop_tokens(lambda text: list(text.encode())) == frozenset()


def test_a_target_has_the_tokens_it_has_inside_its_text(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(  # as Llama's: no space is lost, and one stands before every text
        sentence_iterator=iter(["the cat sat on the mat and the dog sat on the log"] * 9),
        model_prefix=str(tmp_path / "spaced"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    tokenizer = load_tokenizer(tmp_path / "spaced.model")
    context, target = encode_pair(tokenizer, "the cat sat on", " the")
    assert tokenizer.encode("the cat sat on the") == [*context, *target]
    assert len(target) == 1 < len(tokenizer.encode(" the"))
    assert encode_pair(tokenizer, "the cat", "") == (tokenizer.encode("the cat")[:-1], tokenizer.encode("the cat")[-1:])


@pytest.mark.parametrize("variant", ["strict", "stop-word", "lm-eval"])
def test_of_gpt2s_tokens_megatron_makes_the_same_by_tokenizing_apart(passages, gpt2_bpe, variant):
    tokenizer = load_tokenizer(gpt2_bpe)
    for context, target in examples(passages[:1000], variant):
        assert encode_pair(tokenizer, context, target) == (tokenizer.encode(context), tokenizer.encode(target))

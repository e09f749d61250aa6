from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluate_zero_shot.texts.cbt import Question, first_questions, options, questions
from megaft.base.errors import DataError

CONTEXT = [f"Sentence {number} , he said ." for number in range(1, 21)]
QUERY = "`` The XXXXX is here , '' said she .\tcat\t\tdog|cat|-LCB-"


def block(query=QUERY, context=CONTEXT):
    return "".join(f"{number} {line}\n" for number, line in enumerate([*context, query], 1))


def test_a_question():
    found = questions(f"{block()}\n{block('XXXXX ran	dog		dog|cat')}\n", Path("cbt.txt"))
    assert found == [
        Question(" ".join(CONTEXT), "`` The ", " is here , '' said she .", ("dog", "cat", "-LCB-"), 1),
        Question(" ".join(CONTEXT), "", " ran", ("dog", "cat"), 0),
    ]


def test_options_are_the_candidate_and_the_rest_of_the_sentence():
    question = Question("A b .", "`` The ", " is here .", ("dog", "cat"), 1)
    assert options(question) == [("A b . `` The", " dog is here ."), ("A b . `` The", " cat is here .")]
    assert options(Question("A b .", "", " ran", ("dog",), 0)) == [("A b .", " dog ran")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            block(context=CONTEXT[:3]), "cbt.txt, line 4 ends a question after 4 lines; it has 21", id="short"
        ),
        pytest.param(block() + block(), r"cbt.txt, line 22 begins '1 Sentence 1 , he sa'", id="no blank line between"),
        pytest.param("2 a\n", "cbt.txt, line 1 begins '2 a'; a question's lines are numbered 1 to 21", id="numbering"),
        pytest.param(
            block("The is .\tcat\t\tdog|cat"), "cbt.txt, line 21 must be a sentence with XXXXX", id="no blank"
        ),
        pytest.param(block("The XXXXX .\tcat\t\t"), "cbt.txt, line 21 must be a sentence with", id="no candidates"),
        pytest.param(
            block("XXXXX .\tcow\t\tdog|cat"), "line 21: the answer 'cow' is not among .* 'dog|cat'", id="answer"
        ),
        pytest.param(
            f"\n\n{block()}\n\n{block('XXXXX')}", "cbt.txt, line 46 must be", id="second question, extra blanks"
        ),
    ],
)
def test_malformed_files_are_named_by_line(text, message):
    with pytest.raises(DataError, match=message):
        questions(text, Path("cbt.txt"))


def test_crlf_and_an_empty_candidate_make_no_difference():
    text = block("The XXXXX .\tcat\t\tdog||cat|")
    assert questions(text.replace("\n", "\r\n"), Path("x")) == questions(
        block("The XXXXX .\tcat\t\tdog|cat"), Path("x")
    )


@given(count=st.integers(0, 4), total=st.integers(1, 3))
def test_the_first_questions_are_the_first_of_all(count, total):
    text = "\n".join(block(f"{number} XXXXX .\ta\t\ta|b") for number in range(total))
    assert questions(first_questions(text, count), Path("x")) == questions(text, Path("x"))[:count]

"""Documents of several segments: tokenized as one string, with a loss mask from the segment boundaries."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, LLAMA_2, ZEPHYR, make_byte_level, make_metaspace, make_sentencepiece
from tokenizers import normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megaft.data.chat import Renderer
from megaft.data.corpus import Chunk
from megaft.data.encoding import Encoder
from megaft.data.records import Segment
from megaft.data.tokenizer import Tokenizer, load_tokenizer

# What an assistant's turn is, in each: what generation would have to give after the prompt.
TEMPLATES = {"zephyr": (ZEPHYR, "{}</s>\n"), "chatml": (CHATML, "{}<|im_end|>\n"), "llama 2": (LLAMA_2, " {} </s>")}
MAKERS = {"byte level": make_byte_level, "metaspace": make_metaspace}
TEXTS = st.text(alphabet=st.sampled_from("ab eT.\n\n  é日😀ﬁ") | st.characters(codec="utf-8"), max_size=12) | st.just(
    "Hello there"
)


@pytest.fixture(scope="module")
def hugging_faces(tmp_path_factory):
    """Tokenizers of the tokenizers library, with ChatML's tokens, that begin texts with <s>."""
    loaded = {}
    for name, make in MAKERS.items():
        loaded[name] = AutoTokenizer.from_pretrained(make(tmp_path_factory.mktemp("folder"), bos="<s>"))
        loaded[name].add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return loaded


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    return load_tokenizer(make_sentencepiece(tmp_path_factory.mktemp("folder")))


@pytest.fixture(scope="module")
def tokenizers(hugging_faces, sentencepiece):
    return {name: Tokenizer(loaded) for name, loaded in hugging_faces.items()} | {"sentencepiece": sentencepiece}


def encoded(tokenizer, segments):
    """Return the ids and the loss mask of a document."""
    ((document,),) = Encoder(tokenizer)([Chunk(tuple(segments), 0, 0, True, "a")])
    return document.ids.tolist(), document.is_scored.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MAKERS, "sentencepiece"])
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.tuples(TEXTS, st.booleans()), min_size=1, max_size=5))
def test_ids_are_those_of_the_whole_text(tokenizers, name, parts):
    tokenizer, text = tokenizers[name], "".join(part for part, _ in parts)
    if text:
        ids, is_scored = encoded(tokenizer, [Segment(*part) for part in parts])
        assert ids == tokenizer.encode(text)
        assert len(is_scored) == len(ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MAKERS, "sentencepiece"])
@settings(max_examples=150, deadline=None)
@given(prompt=TEXTS, completion=TEXTS.filter(bool))
def test_scored_tokens_hold_the_completion(tokenizers, name, prompt, completion):
    """The first scored token is the first that extends beyond the prompt."""
    tokenizer = tokenizers[name]
    ids, is_scored = encoded(tokenizer, [Segment(prompt, False), Segment(completion)])
    num_prompt = is_scored.index(True) if True in is_scored else len(ids)
    assert is_scored == [False] * num_prompt + [True] * (len(ids) - num_prompt)
    if tokenizer.decode(ids) == prompt + completion:  # some characters are lost to sentencepiece
        assert prompt.startswith(tokenizer.decode(ids[:num_prompt]))
        assert not prompt or not prompt.startswith(tokenizer.decode(ids[: num_prompt + 1]))


def conversation(roles, contents):
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(TEXTS.filter(lambda text: "\0" not in text), min_size=2, max_size=5))
def test_chats_equal_transformers(hugging_faces, kind, template, contents):
    text, turn = TEMPLATES[template]
    messages = conversation(["user", "assistant"] * 3, contents)
    hugging_face = hugging_faces[kind]
    hugging_face.chat_template = text
    tokenizer = Tokenizer(hugging_face)
    segments = Renderer(tokenizer.apply_chat_template)("x", "m", messages)
    ids, is_scored = encoded(tokenizer, segments)
    assert ids == hugging_face.apply_chat_template(messages, tokenize=True)["input_ids"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert [segment.text for segment in segments if segment.is_scored] == [turn.format(answer) for answer in answers]
    assert is_scored == masks_of_characters(hugging_face, segments)


def masks_of_characters(hugging_face, segments):
    """Reference: transformers' char_to_token for each scored segment, as in `assistant_masks`."""
    text = "".join(segment.text for segment in segments)
    encoding = hugging_face(text, add_special_tokens=False)
    found, begin = [False] * len(encoding["input_ids"]), 0
    for segment in segments:
        end = begin + len(segment.text)
        for place in range(begin, end) if segment.is_scored else ():
            for token, (left, right) in enumerate(encoding.encodings[0].offsets):
                found[token] |= left <= place < right
        begin = end
    return found


NORMALIZED = [
    pytest.param(None, "Answer: ", "four", "four", id="none"),
    pytest.param(normalizers.NFKC(), "ﬁrst: ", "㌔ ﬁg", "キロ fig", id="NFKC, longer"),
    pytest.param(normalizers.NFC(), "e\u0301 ", "e\u0301tat", "\xe9tat", id="NFC, shorter"),
    pytest.param(normalizers.NFD(), "\xe9 ", "\xe9tat", "e\u0301tat", id="NFD, longer"),
    pytest.param(normalizers.Lowercase(), "İ SAYS ", "İT", "i\u0307t", id="Lowercase, longer"),
    pytest.param(normalizers.Replace("four", "fourteen"), "four or ", "four", "fourteen", id="Replace, longer"),
    pytest.param(normalizers.Replace("four", ""), "four or ", "fourty", "ty", id="Replace, nothing"),
    pytest.param(normalizers.Prepend("▁"), "A: ", "b", "b", id="Prepend"),
    pytest.param(normalizers.Strip(), " \n A: ", "b  ", "b", id="Strip"),
]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("normalizer", "prompt", "completion", "expected"), NORMALIZED)
def test_normalizers_move_no_border(hugging_faces, kind, normalizer, prompt, completion, expected):
    """The completion's tokens are scored even if normalization changes the length of the text."""
    backend = copy.deepcopy(hugging_faces[kind].backend_tokenizer)
    if normalizer is not None:
        backend.normalizer = normalizer
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    ids, is_scored = encoded(tokenizer, [Segment(prompt, False), Segment(completion)])
    assert ids == tokenizer.encode(prompt + completion)
    scored = [token for token, is_one in zip(ids, is_scored, strict=True) if is_one]
    assert tokenizer.decode([ids[0], *scored]).removeprefix(tokenizer.decode(ids[:1])).strip(" ") == expected


@pytest.mark.parametrize("name", [*MAKERS, "sentencepiece"])
def test_a_token_across_the_border_is_scored(tokenizers, name):
    """`▁the` holds the space at the prompt's end and the completion; tokens of the prompt alone are not scored."""
    tokenizer = tokenizers[name]
    ids, is_scored = encoded(tokenizer, [Segment("This is ", False), Segment("the"), Segment(" end", False)])
    the = tokenizer.encode("This is the")[-1]
    assert tokenizer.decode([tokenizer.encode("a")[0], the]).endswith(" the")
    assert [token for token, is_one in zip(ids, is_scored, strict=True) if is_one] == [the]


def test_spans_that_a_post_processor_trims_are_whole(tmp_path, hugging_faces):
    backend = copy.deepcopy(hugging_faces["byte level"].backend_tokenizer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    segments = [Segment("a ", True), Segment(" b", False)]
    assert backend.encode("a  b").offsets[1] == (2, 2)  # the first of two spaces, with nothing left of it
    assert encoded(tokenizer, segments)[1] == [True, True, False]

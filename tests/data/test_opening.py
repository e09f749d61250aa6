"""Opening tokens: documents begin with the special tokens that transformers' tokenizer puts before a text.

The receipt records them, training and validation compare and use them, and they are never scored."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import make_model
from tiny_tokenizers import make_byte_level, make_metaspace
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer

from megaft.base.errors import DataError
from megaft.config.train import parse_train
from megaft.data.dataset import Dataset
from megaft.data.indexed import TokenFile
from megaft.data.prepare import PrepareConfig, ensure_prepared, prepare
from megaft.data.receipt import load_receipt
from megaft.data.samples import IGNORE_INDEX, DocumentSamples, PackedSamples
from megaft.data.tokenizer import load_tokenizer
from megaft.run.sources import Sources, require_same_tokenizer
from megaft.run.validation import Validation

TEXTS = ["To be or not to be", "that is the question", "<s>whether it is nobler", "in the mind"]
PLAIN, WITH_BOS, WITH_TWO, WITH_END = "$A", "<s> $A", "<s> </s> $A", "$A </s>"


def with_template(folder, single):
    """A byte-level tokenizer that differs only in its post-processor, this template."""
    make_byte_level(folder, bos="<s>")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    names = {"plain": PLAIN, "bos": WITH_BOS, "two": WITH_TWO, "end": WITH_END}
    return {name: with_template(root / name, single) for name, single in names.items()} | {
        "metaspace": make_metaspace(root / "metaspace")
    }


def prepared(tmp_path, tokenizer, records, name="out", **options):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare(PrepareConfig(inputs=(str(path),), output=tmp_path / name, tokenizer=str(tokenizer), **options))
    return tmp_path / name


def read(prefix):
    tokens = TokenFile(prefix)
    return [tokens.read(*ends).tolist() for ends in pairwise(tokens.document_offsets.tolist())]


def texts(*values):
    return [{"text": value} for value in values]


@pytest.mark.parametrize("kind", ["plain", "bos", "two", "metaspace"])
def test_documents_are_what_transformers_tokenizer_gives(tmp_path, folders, kind):
    hugging_face, ours = AutoTokenizer.from_pretrained(folders[kind]), load_tokenizer(folders[kind])
    plain = [text for text in TEXTS if not text.startswith("<s>")]
    prefix = prepared(tmp_path, folders[kind], texts(*plain))
    receipt = load_receipt(prefix)
    assert read(prefix) == hugging_face(plain)["input_ids"]
    assert receipt["opening_ids"] == list(ours.opening_ids)
    assert receipt["tokens"] - receipt["scored_tokens"] == len(plain) * len(ours.opening_ids)
    assert (receipt["words"], receipt["bytes"]) == (sum(len(x.split()) for x in plain), sum(map(len, plain)))
    pairs = [{"p": text[:7], "c": text[7:]} for text in plain]
    prefix = prepared(tmp_path, folders[kind], pairs, "pairs", prompt_key="p", completion_key="c")
    assert read(prefix) == hugging_face(plain)["input_ids"]


def test_what_a_text_spells_is_not_put_before_it_again(tmp_path, folders):
    """Chats rendered in advance begin with <s>; transformers would add a second one."""
    prefix = prepared(tmp_path, folders["bos"], texts("<s>[INST] hi"), append_eod=True)
    assert read(prefix) == [load_tokenizer(folders["bos"]).encode("<s>[INST] hi</s>")]
    assert load_receipt(prefix)["scored_tokens"] == len(read(prefix)[0]) - 1


def test_an_end_token_comes_from_append_eod_alone(tmp_path, folders):
    tokenizer = load_tokenizer(folders["end"])
    assert AutoTokenizer.from_pretrained(folders["end"])("a")["input_ids"] == [*tokenizer.encode("a"), tokenizer.eos_id]
    assert read(prepared(tmp_path, folders["end"], texts("a"))) == [tokenizer.encode("a")]
    assert read(prepared(tmp_path, folders["end"], texts("a"), append_eod=True)) == [tokenizer.encode("a</s>")]


def test_opening_tokens_do_not_make_a_document_longer(tmp_path, folders):
    records = texts("a", "a a a", "<s>", "<s>a")
    receipt = load_receipt(prepared(tmp_path, folders["bos"], records))
    assert (receipt["documents"], receipt["documents_skipped"]) == (3, 1)
    long = load_tokenizer(folders["bos"]).encode("a a a")
    receipt = load_receipt(prepared(tmp_path, folders["bos"], records, min_tokens=len(long)))
    assert (receipt["documents"], receipt["tokens"], receipt["words"]) == (1, len(long) + 1, 3)


@pytest.mark.parametrize("begins", ["", "{{ bos_token }}"])
def test_a_chat_begins_as_its_template_says(tmp_path, begins):
    template = begins + "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    folder = make_byte_level(tmp_path / "tokenizer", bos="<s>", template=template)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    prefix = prepared(tmp_path, folder, [{"m": messages}], messages_key="m")
    hugging_face = AutoTokenizer.from_pretrained(folder)
    assert read(prefix) == [hugging_face.apply_chat_template(messages, tokenize=True)["input_ids"]]
    assert load_receipt(prefix)["opening_ids"] == []
    require_same_tokenizer(Sources((Dataset(str(prefix)),), (1.0,)), load_tokenizer(folder))


def labels_of(corpus):
    """Return the labels of all samples; every sample has a scored one."""
    rows = [corpus[index].labels for index in range(len(corpus))]
    assert all((row != IGNORE_INDEX).any() for row in rows)
    return [label for row in rows for label in row.tolist() if label != IGNORE_INDEX]


@pytest.mark.parametrize("kind", ["plain", "bos", "two"])
@pytest.mark.parametrize("context_length", [1, 2, 3, 64])
def test_training_scores_no_opening_token(tmp_path, folders, kind, context_length):
    """Packed samples score all other tokens but the first; separate documents score all after their first token."""
    prefix = prepared(tmp_path, folders[kind], texts(*TEXTS), append_eod=True)
    tokenizer = load_tokenizer(folders[kind])
    ends = tokenizer.eos_id
    bodies = [[*tokenizer.encode(text), ends] for text in TEXTS]
    if tokenizer.opening_ids == (tokenizer.bos_id,):
        bodies = [body[body[0] == tokenizer.bos_id :] for body in bodies]  # spelled, and so not put there again
    flat = [token for body in bodies for token in body]
    first = 0 if tokenizer.opening_ids else 1
    without_first = [token for body in bodies for token in body[first:]]
    stream = PackedSamples(Dataset(str(prefix)), context_length)
    assert labels_of(stream) == flat[first:]
    apart = PackedSamples(Dataset(str(prefix)), context_length, attend_within_documents=True)
    assert labels_of(apart) == without_first
    documents = DocumentSamples(Dataset(str(prefix)), context_length)
    assert labels_of(documents) == without_first


DISAGREEING = [
    pytest.param("plain", "bos", {}, r"begin with no special token .* puts \[0\] \(<s>\) before", id="has none"),
    pytest.param("bos", "plain", {}, r"begin with \[0\] \(<s>\) .* puts no special token before", id="has one"),
    pytest.param("plain", "bos", {"opening_ids": None}, r"begin with no special token", id="old receipt"),
    pytest.param(
        "plain", "plain", {"opening_ids": None, "has_mask": True}, "has no opening_ids .*prepare again", id="old chat"
    ),
    pytest.param("plain", "plain", {"opening_ids": None}, None, id="old receipt, none wanted"),
    pytest.param("bos", "bos", {}, None, id="same"),
]


@pytest.mark.parametrize("role", ["train", "valid"])
@pytest.mark.parametrize(("made_with", "run_with", "changes", "message"), DISAGREEING)
def test_a_dataset_that_begins_otherwise_is_refused(
    tmp_path, folders, monkeypatch, made_with, run_with, changes, message, role
):
    """The tokenizer's hash is unaffected, as a post-processor does not change the ids of the text itself."""
    prefix, same = (prepared(tmp_path, folders[kind], texts("a b"), kind) for kind in (made_with, run_with))
    tokenizer = load_tokenizer(folders[run_with])
    changed = load_receipt(prefix) | changes
    changed = {key: value for key, value in changed.items() if value is not None or key == "messages_key"}
    monkeypatch.setattr(
        "megaft.data.dataset.load_receipt", lambda path: changed if path == str(prefix) else load_receipt(path)
    )
    pair = (Dataset(str(prefix)), Dataset(str(same)))
    train, valid = pair if role == "train" else reversed(pair)
    sources = Sources((train,), (1.0,), valid)
    if message is None:
        require_same_tokenizer(sources, tokenizer)
        return
    with pytest.raises(DataError, match=f"{prefix} .*{message}|of {prefix} {message}"):
        require_same_tokenizer(sources, tokenizer)


def test_a_text_is_prepared_again_where_its_tokenizer_opens_it_otherwise(tmp_path, folders):
    (tmp_path / "a.txt").write_text("one two")
    lengths = []
    for kind in ("plain", "bos", "bos", "plain"):
        ensure_prepared(tmp_path / "a.txt", tmp_path / "out", str(folders[kind]), load_tokenizer(folders[kind]))
        lengths.append(TokenFile(tmp_path / "out").num_tokens)
    assert np.diff(lengths).tolist() == [1, 0, -1]


class Engine:
    """A transformers model that returns the nats of some labels."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, labels, positions):
        logits = self.model(input_ids=input_ids).logits.float()
        return torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").flatten()[positions]

    def eval(self):
        pass

    def train(self):
        pass


@pytest.mark.parametrize("kind", ["bos", "two", "metaspace"])
@pytest.mark.parametrize("has_prompts", [False, True])
def test_validation_equals_a_loop_over_transformers_ids(tmp_path, folders, kind, has_prompts):
    hugging_face, tokenizer = AutoTokenizer.from_pretrained(folders[kind]), load_tokenizer(folders[kind])
    model = make_model("llama", vocab_size=tokenizer.vocab_size)
    plain = [text for text in TEXTS if not text.startswith("<s>")]
    nats = num_scored = 0
    for text in plain:
        ids = torch.tensor([hugging_face(text)["input_ids"]])
        first = len(tokenizer.opening_ids)
        if has_prompts:
            first += len(tokenizer.encode(text.split(" ")[0]))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, first - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum"))
        num_scored += ids.shape[1] - first
    pairs = [dict(zip(("p", "c"), (text.split(" ")[0], text[text.index(" ") :]), strict=True)) for text in plain]
    keys = {"prompt_key": "p", "completion_key": "c"} if has_prompts else {}
    prefix = prepared(tmp_path, folders[kind], pairs if has_prompts else texts(*plain), **keys)
    flags = "--deepspeed-config j --data.train t --data.valid v --run.dir r --run.max-steps 1 --data.context-length 64"
    config = parse_train([*flags.split(), "--model.path", "m"])
    score = Validation(Dataset(str(prefix)), config, tokenizer)(Engine(model), torch.device("cpu"))
    assert score.num_scored_tokens == num_scored
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.num_words == (None if has_prompts else sum(len(text.split()) for text in plain))

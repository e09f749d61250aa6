import json
import shutil

import pytest
from tiny_tokenizers import (
    LLAMA,
    make_byte_level,
    make_llama,
    make_llama_chat,
    make_llama_model,
    make_metaspace,
    make_sentencepiece,
)

from megaft.base.errors import DataError
from megaft.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from megaft.data.tokenizer_check import require_same_ids

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
SOURCES = [
    pytest.param(make_byte_level, {}, id="byte-level"),
    pytest.param(make_byte_level, {"bos": "<s>", "template": TEMPLATE}, id="byte-level with a BOS and a template"),
    pytest.param(make_metaspace, {"template": TEMPLATE}, id="Metaspace"),
    pytest.param(make_sentencepiece, {}, id="sentencepiece BPE"),
    pytest.param(make_sentencepiece, {"model_type": "unigram"}, id="sentencepiece unigram"),
    pytest.param(make_sentencepiece, {"byte_fallback": False}, id="sentencepiece without byte fallback"),
    pytest.param(
        make_sentencepiece,
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "user_defined_symbols": ["<sep>"]},
        id="sentencepiece as Llama's",
    ),
    pytest.param(make_sentencepiece, {"add_dummy_prefix": False}, id="sentencepiece without a prefix"),
    pytest.param(make_sentencepiece, {"bos_id": -1, "pad_id": 3}, id="sentencepiece without a BOS"),
    pytest.param(make_llama, {"legacy": True, "add_bos_token": True}, id="LlamaTokenizer"),
    pytest.param(make_llama_chat, {}, id="LlamaTokenizer for chats"),
    pytest.param(make_llama_chat, {"legacy": True, "add_bos_token": True}, id="LlamaTokenizer for chats, legacy"),
]


@pytest.mark.parametrize(("make", "settings"), SOURCES)
def test_a_saved_tokenizer_is_the_same_to_transformers(tmp_path, make, settings):
    tokenizer = load_tokenizer(make(tmp_path / "source", **settings))
    tokenizer.save(tmp_path / "saved")
    require_same_ids(tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (type(again), again.sha256) == (type(tokenizer), tokenizer.sha256)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "gemma2", "phi3"])
@pytest.mark.parametrize("make", [make_byte_level, make_metaspace, make_sentencepiece])
def test_a_saved_tokenizer_is_the_same_beside_any_model(tmp_path, make, model_type):
    tokenizer = load_tokenizer(make(tmp_path / "source"))
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text(json.dumps({"model_type": model_type}))
    require_same_ids(tokenizer, tmp_path / "saved")


def test_a_class_chosen_by_model_type_is_refused(tmp_path):
    """For Qwen 2 transformers rebuilds any tokenizer as a Qwen2Tokenizer."""
    tokenizer = load_tokenizer(make_metaspace(tmp_path / "source"))
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(DataError, match=r"pad_token_id is 800 in transformers, but None .* model_type"):
        require_same_ids(tokenizer, tmp_path / "saved")


def edited(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CHANGES = [
    pytest.param(lambda f: edited(f, "tokenizer_config.json", eos_token="<s>"), "eos_token_id is 0 .* 1 in", id="EOS"),
    pytest.param(lambda f: (f / "chat_template.jinja").unlink(), "chat_template is None", id="template"),
    pytest.param(lambda f: edited(f, "tokenizer.json", post_processor=None), "special tokens around", id="no BOS"),
    pytest.param(
        lambda f: edited(f, "tokenizer.json", normalizer={"type": "Lowercase"}), "ids of 'To be, or", id="ids"
    ),
    pytest.param(lambda f: (f / "tokenizer.json").unlink(), "no tokenizer could be loaded", id="no tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_another_tokenizer_is_refused(tmp_path, change, message):
    tokenizer = load_tokenizer(make_byte_level(tmp_path / "source", bos="<s>", template=TEMPLATE))
    tokenizer.save(tmp_path / "saved")
    change(tmp_path / "saved")
    with pytest.raises(DataError, match=message):
        require_same_ids(tokenizer, tmp_path / "saved")


def test_transformers_own_conversion_of_llama_is_refused(tmp_path):
    """transformers merges runs of spaces first, although they have the lowest score."""
    model = make_llama_model(tmp_path / "llama.model")
    (tmp_path / "hand-made").mkdir()
    shutil.copyfile(model, tmp_path / "hand-made/tokenizer.model")
    (tmp_path / "hand-made/tokenizer_config.json").write_text(json.dumps(LLAMA))
    tokenizer = load_tokenizer(model)
    with pytest.raises(DataError, match=r"ids of '.* is .* in transformers, but .* in megaft"):
        require_same_ids(tokenizer, tmp_path / "hand-made")
    tokenizer.save(tmp_path / "saved")
    require_same_ids(tokenizer, tmp_path / "saved")
    assert isinstance(load_tokenizer(tmp_path / "saved"), SentencePieceTokenizer)

"""Small tokenizers of common kinds, trained on Python's documentation."""

import json
from pathlib import Path

TEXT_CHARACTERS = 60_000

ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_4 = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
    "<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n<|channel>thought\n<channel|>{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


def corpus() -> str:
    import toy

    return toy.text()[:TEXT_CHARACTERS]


def make_byte_level(folder: Path, *, bos: str | None = None, eos: str = "</s>", template: str | None = None) -> Path:
    """Save a byte-level BPE; with `bos`, one whose post-processor puts that token before every text, as Llama 3's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=_specials(bos, eos), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([corpus()], trainer)
    return _save(tokenizer, folder, bos, eos, template)


def make_metaspace(folder: Path, *, bos: str | None = "<s>", eos: str = "</s>", template: str | None = None) -> Path:
    """Save a BPE over Metaspace with byte fallback: the tokenizer.json of Llama 2, Mistral 7B and TinyLlama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", *_specials(bos, eos), *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([corpus()], trainer)
    state = json.loads(tokenizer.to_str())  # bytes are entries of the vocabulary, not special tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return _save(Tokenizer.from_str(json.dumps(state)), folder, bos, eos, template)


def make_sentencepiece(folder: Path, **settings) -> Path:
    """Save a sentencepiece BPE as tokenizer.model, with <s> and </s>; `settings` go to its trainer."""
    import io

    from sentencepiece import SentencePieceTrainer

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    options = {"vocab_size": 800, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | settings
    SentencePieceTrainer.train(sentence_iterator=iter(corpus().splitlines()), model_writer=model, **options)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def make_llama(folder: Path, **settings) -> Path:
    """Save a tokenizer.model as Llama 1 and 2 have it, with a tokenizer_config.json of `settings` beside it."""
    make_sentencepiece(folder, normalization_rule_name="identity", remove_extra_whitespaces=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA | settings))
    return folder


def make_llama_model(path: Path) -> Path:
    """Write a sentencepiece model like Llama's: runs of spaces are its first pieces and have the lowest scores."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((make_llama(path.parent / f"{path.name}.parts") / "tokenizer.model").read_bytes())
    pieces, first = list(model.pieces), 3 + 256  # special tokens, bytes
    runs = [type(pieces[0])(piece="\u2581" * length, score=-1e9) for length in (2, 4, 8, 3)]
    del model.pieces[:]
    model.pieces.extend([*pieces[:first], *runs, *pieces[first:]])
    path.write_bytes(model.SerializeToString())
    return path


def make_llama_chat(folder: Path, **settings) -> Path:
    """Save a chat finetune of Llama by a slow tokenizer: added tokens, another EOS and a template in other files."""
    added = {"<|im_start|>": 800, "<|im_end|>": 801}
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    decoder = {str(id_): {"content": token, **plain} for token, id_ in added.items()}
    chat = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>", "chat_template": CHATML, "legacy": False}
    make_llama(folder, **chat | settings)
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def _specials(bos: str | None, eos: str) -> list[str]:
    return list(dict.fromkeys([bos, eos] if bos else [eos]))


def _save(tokenizer, folder: Path, bos: str | None, eos: str, template: str | None) -> Path:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=template)
    saved.save_pretrained(folder)
    return Path(folder)

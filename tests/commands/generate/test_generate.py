import io
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
import tyro
from tiny_models import make_model
from tiny_tokenizers import CHATML, make_byte_level, make_metaspace, make_sentencepiece

from megaft.base.errors import ConfigError, DataError
from megaft.commands.generate.command import main, print_text
from megaft.commands.generate.config import GenerateConfig, SamplingConfig
from megaft.weights.folder import model_folder, model_source
from megaft.weights.reading import open_weights

GREEDY = SamplingConfig(temperature=0)
PROMPTS = ("The city of", "In 1998 , the")


def test_nothing_heavy_is_imported_for_the_flags():
    heavy = "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    code = f"import sys, megaft.commands.generate.command; {heavy}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_flags_have_no_prefixes():
    flags = ["--model", "m", "--prompt", "a b", "c", "--temperature", "0.5", "--top-k", "3", "--json", "--ignore-eos"]
    assert tyro.cli(GenerateConfig, args=flags) == GenerateConfig(
        model="m", prompt=("a b", "c"), sampling=SamplingConfig(temperature=0.5, top_k=3), json=True, ignore_eos=True
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.1}, "top-p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition-penalty is 0.0"),
        ({"repetition_penalty": 1e38}, r"repetition-penalty is 1e\+38"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 0.0, "top_k": 5}, "no effect at --temperature 0"),
        ({"temperature": 0.0, "top_p": 0.9}, "no effect at --temperature 0"),
    ],
)
def test_sampling_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ()}, "prompt is empty"),
        ({"chat": ("b",)}, "--prompt and --chat are given; use one"),
        ({"max_new_tokens": 0}, "max-new-tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "less than 2"),
        ({"prompt": ("To be", os.fsdecode(b"caf\xe9"))}, "prompt is 'caf.*not UTF-8"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(**{"model": "m", "prompt": ("a",), **settings})


def test_a_run_keeps_its_model_in_export(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").touch()
    assert model_source(str(tmp_path)) == str(tmp_path / "export")
    assert model_source(str(tmp_path / "export")) == str(tmp_path / "export")
    assert model_source("gpt2") == "gpt2"


@pytest.mark.parametrize("find", [model_source, model_folder, open_weights])
def test_a_broken_export_is_refused_by_every_command(tmp_path, find):
    (tmp_path / "export").mkdir()
    with pytest.raises(DataError, match=r"export/ has no config\.json"):
        find(str(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"neither config\.json nor export/"):
        model_source(str(tmp_path))


def generate(model, capsys, **settings):
    settings = {"prompt": PROMPTS, "max_new_tokens": 8, **settings}
    assert main(GenerateConfig(model=str(model), **settings)) == 0
    return capsys.readouterr().out


def test_prompts_are_continued(trained_gpt2, capsys):
    rows = [json.loads(line) for line in generate(trained_gpt2, capsys, json=True).splitlines()]
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert all(len(row["tokens"]) == 8 and row["tokens_per_second"] > 0 for row in rows)
    assert generate(trained_gpt2, capsys) == "".join(row["prompt"] + row["text"] + "\n" for row in rows)


def test_a_text_does_not_depend_on_the_prompts_beside_it(trained_gpt2, capsys):
    together = [json.loads(line)["text"] for line in generate(trained_gpt2, capsys, json=True).splitlines()]
    assert json.loads(generate(trained_gpt2, capsys, json=True, prompt=PROMPTS[1:]))["text"] == together[1]


def test_greedy_text_equals_transformers(trained_gpt2, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained_gpt2)
    model = AutoModelForCausalLM.from_pretrained(trained_gpt2, dtype=torch.float32)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert generate(trained_gpt2, capsys, prompt=PROMPTS[:1], sampling=GREEDY) == tokenizer.decode(theirs[0]) + "\n"


def test_a_prompt_without_tokens_is_refused(trained_gpt2):
    with pytest.raises(DataError, match="--prompt is '', "):
        main(GenerateConfig(model=str(trained_gpt2), prompt=("a", "")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama with each kind of tokenizer, whose end token its files name."""
    root = tmp_path_factory.mktemp("models")
    make = {
        "byte-level with a BOS": partial(make_byte_level, bos="<s>"),
        "Metaspace with a BOS": make_metaspace,
        "without a BOS": make_byte_level,
    }
    for name, make_tokenizer in make.items():
        make_tokenizer(root / name)
        make_model("llama", vocab_size=800, eos_token_id=1 if "BOS" in name else 0).save_pretrained(root / name)
    return root


def theirs(folder, prompt, settings=GREEDY, seed=0, **options):
    """Return the ids that transformers reads, and those that it generates."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = inputs.input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    drawn = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    torch.manual_seed(seed)
    generated = model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=settings.temperature > 0,
        pad_token_id=0,
        **(drawn if settings.temperature else {}),
    )
    return ids[0].tolist(), generated[0, ids.shape[1] :].tolist()


def ours(folder, prompt, capsys, settings=GREEDY, **options):
    config = GenerateConfig(
        model=str(folder), prompt=(prompt,), max_new_tokens=12, sampling=settings, json=True, **options
    )
    assert main(config) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("settings", [GREEDY, SamplingConfig(temperature=0.9, top_k=200)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["byte-level with a BOS", "Metaspace with a BOS", "without a BOS"])
def test_ids_read_and_generated_equal_transformers(folders, name, settings, capsys):
    prompt = "The import statement\n of "
    row = ours(folders / name, prompt, capsys, settings)
    assert (row["prompt_tokens"], row["tokens"]) == theirs(folders / name, prompt, settings)


@pytest.mark.parametrize("name", ["byte-level with a BOS", "Metaspace with a BOS"])
def test_a_prompt_that_spells_its_beginning_gets_no_second_one(folders, name, capsys):
    plain, spelled = (ours(folders / name, prompt, capsys) for prompt in ("To be", "<s>To be"))
    assert [row["prompt_tokens"].count(row["prompt_tokens"][0]) for row in (plain, spelled)] == [1, 1]
    if name.startswith("byte-level"):  # Metaspace puts its space before a text's first word only
        assert spelled["tokens"] == plain["tokens"]


def test_an_empty_prompt_begins_with_the_beginning_of_sequence_token(folders, capsys):
    row = ours(folders / "byte-level with a BOS", "", capsys)
    bos = row["prompt_tokens"]
    assert len(bos) == 1
    assert "<s>" not in row["text"]
    assert row["tokens"] == ours(folders / "byte-level with a BOS", "<s>", capsys)["tokens"]


@pytest.mark.parametrize("name", ["byte-level with a BOS", "Metaspace with a BOS", "without a BOS"])
def test_the_text_is_what_comes_behind_the_prompt(folders, name, capsys):
    from transformers import AutoTokenizer

    row = ours(folders / name, "To be", capsys)
    tokenizer = AutoTokenizer.from_pretrained(folders / name)
    whole = tokenizer.decode(row["prompt_tokens"] + row["tokens"], skip_special_tokens=True)
    assert "To be" + row["text"] == whole


def with_end_ids(folder, path, ids):
    """Copy a model folder, with ids in its generation_config.json."""
    shutil.copytree(folder, path)
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ids}))
    return path


@pytest.mark.parametrize("end", [2, 0], ids=["third token", "first token"])
def test_generation_ends_at_every_end_token_as_in_transformers(folders, tmp_path, end, capsys):
    free = ours(folders / "byte-level with a BOS", "To be", capsys)
    folder = with_end_ids(folders / "byte-level with a BOS", tmp_path / "model", [1, free["tokens"][end]])
    row = ours(folder, "To be", capsys)
    assert row["tokens"] == theirs(folder, "To be")[1]
    assert len(row["tokens"]) <= end + 1
    assert row["is_ended_by_model"]
    assert not free["is_ended_by_model"]
    assert free["text"].startswith(row["text"])
    assert len(row["text"]) < len(free["text"])
    assert ours(folder, "To be", capsys, ignore_eos=True)["tokens"] == free["tokens"]


def test_a_token_that_the_model_does_not_embed_is_refused(folders, tmp_path):
    folder = tmp_path / "model"
    make_byte_level(folder)
    make_model("llama", vocab_size=40).save_pretrained(folder)
    with pytest.raises(DataError, match="the model embeds 40 tokens"):
        main(GenerateConfig(model=str(folder), prompt=("To be",)))


def test_a_prompt_beyond_the_positions_is_read_from_behind(folders, capsys):
    config = GenerateConfig(model=str(folders / "without a BOS"), prompt=("To be " * 80,), max_new_tokens=1)
    assert main(config) == 0
    assert re.search(r"warning: the prompt has \d+ tokens; .* the last 64\.", capsys.readouterr().err)


def test_rows_without_a_token_have_no_text(folders, tmp_path, capsys):
    make_sentencepiece(tmp_path, vocab_size=400)
    model = make_model("llama", vocab_size=500, tie_word_embeddings=False, pad_token_id=None)
    with torch.no_grad():
        model.lm_head.weight[:400] *= 1e-3  # so that it likes the rows behind the tokenizer's
    model.save_pretrained(tmp_path)
    row = ours(tmp_path, "To be", capsys)
    assert max(row["tokens"]) >= 400
    assert isinstance(row["text"], str)


def test_letters_that_the_output_has_not_are_escaped(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", output)
    print_text("caf\xe9 \u4e16")
    assert output.buffer.getvalue() == b"caf\xe9 \\u4e16\n"


def test_a_missing_model_is_refused():
    with pytest.raises(DataError, match="/no/such/model"):
        main(GenerateConfig(model="/no/such/model", prompt=("a",)))


def test_a_model_that_attends_to_later_tokens_is_refused(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    make_byte_level(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    BertLMHeadModel(BertConfig(vocab_size=600, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="later tokens"):
        main(GenerateConfig(model=str(tmp_path), prompt=("To be",)))


def test_chats_are_answered_by_the_template(folders, tmp_path, capsys):
    """The ids equal transformers' rendered template, and the answer equals transformers' generation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(folders / "byte-level with a BOS", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(CHATML)
    messages = [{"role": "user", "content": "To be"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "chat", dtype=torch.float32)
    theirs = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    common: dict[str, Any] = {"model": str(tmp_path / "chat"), "max_new_tokens": 6, "sampling": GREEDY}
    given: dict[str, Any]
    for given in ({"chat": ("To be",)}, {"messages": (json.dumps(messages),)}):
        assert main(GenerateConfig(**common, **given, json=True)) == 0
        row = json.loads(capsys.readouterr().out)
        assert (row["messages"], row["prompt_tokens"], row["tokens"]) == (messages, ids[0].tolist(), theirs)
        assert main(GenerateConfig(**common, **given)) == 0
        assert capsys.readouterr().out == row["text"] + "\n"

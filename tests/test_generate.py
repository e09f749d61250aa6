import json
import subprocess
import sys

import pytest
import torch
import tyro

from megaft.errors import ConfigError, DataError
from megaft.generate import GenerateConfig, SamplingConfig, main, model_source

MODEL = "models/tiny-gpt2-wikitext2"
PROMPTS = ("The city of", "In 1998 , the")


def test_nothing_heavy_is_imported_for_the_flags():
    heavy = "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    code = f"import sys, megaft.generate; {heavy}"
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
        ({"temperature": 0.0, "top_k": 5}, "no effect at temperature 0"),
        ({"temperature": 0.0, "top_p": 0.9}, "no effect at temperature 0"),
    ],
)
def test_sampling_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ()}, "prompt is empty"),
        ({"max_new_tokens": 0}, "max-new-tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "less than 2"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(**{"model": "m", "prompt": ("a",), **settings})


def test_a_run_keeps_its_model_in_export(tmp_path):
    (tmp_path / "export").mkdir()
    assert model_source(str(tmp_path)) == str(tmp_path / "export")
    (tmp_path / "export" / "config.json").touch()
    assert model_source(str(tmp_path / "export")) == str(tmp_path / "export")
    assert model_source("gpt2") == "gpt2"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"neither config\.json nor export/"):
        model_source(str(tmp_path))


def generate(shared, capsys, **settings):
    settings = {"prompt": PROMPTS, "max_new_tokens": 8, **settings}
    assert main(GenerateConfig(model=str(shared / MODEL), **settings)) == 0
    return capsys.readouterr().out


def test_prompts_are_continued(shared, capsys):
    rows = [json.loads(line) for line in generate(shared, capsys, json=True).splitlines()]
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert all(len(row["tokens"]) == 8 and row["tokens_per_second"] > 0 for row in rows)
    assert generate(shared, capsys) == "".join(row["prompt"] + row["text"] + "\n" for row in rows)


def test_a_text_does_not_depend_on_the_prompts_beside_it(shared, capsys):
    together = [json.loads(line)["text"] for line in generate(shared, capsys, json=True).splitlines()]
    assert json.loads(generate(shared, capsys, json=True, prompt=PROMPTS[1:]))["text"] == together[1]


def test_greedy_text_equals_transformers(shared, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / MODEL)
    model = AutoModelForCausalLM.from_pretrained(shared / MODEL, dtype=torch.float32)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    greedy = SamplingConfig(temperature=0)
    assert generate(shared, capsys, prompt=PROMPTS[:1], sampling=greedy) == tokenizer.decode(theirs[0]) + "\n"


def test_a_prompt_without_tokens_is_refused(shared):
    with pytest.raises(DataError, match="prompt '' has no tokens"):
        main(GenerateConfig(model=str(shared / MODEL), prompt=("a", "")))


def test_a_missing_model_is_refused():
    with pytest.raises(DataError, match="/no/such/model"):
        main(GenerateConfig(model="/no/such/model", prompt=("a",)))

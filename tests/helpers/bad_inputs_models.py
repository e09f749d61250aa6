"""Bad DeepSpeed JSONs, settings and model folders: 16, 19, 26 to 34, 43 to 48, and the settings of 56."""

import json

from bad_inputs import TRAIN_JSON, Table

LOOKS_AHEAD = {
    "model_type": "gemma3_text",
    "use_bidirectional_attention": True,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "architectures": ["Gemma3ForCausalLM"],
}

TABLE = Table()
refuse = TABLE.refuse


@refuse(
    "16 context longer than the positions",
    2,
    r"data\.context-length .* is 256, but the model has 128 positions; use 128",
)
def _(workshop):
    return workshop.train("--data.context-length=256")


@refuse(
    "16 validation context longer than the positions",
    2,
    r"eval\.context-length is 200, but the model has 128 posit.*; use 128",
)
def _(workshop):
    return workshop.train("--eval.context-length=200", valid=workshop.toy.valid)


@refuse(
    "16 evaluation context longer than the positions",
    2,
    r"context-length is 256, but the model has 128 pos.*--context-length 128",
)
def _(workshop):
    return workshop.evaluate(workshop.write("a.txt", "some text"), "--context-length=256")


@refuse(
    "19 config differs from the weights",
    3,
    r"model; its weights do not fit its config\.json: transformer\.\S+ is \[.*\], not \[.*Copy both",
)
def _(workshop):
    return workshop.train(model=workshop.model(n_positions=64))


@refuse(
    "19 more layers than the weights have",
    3,
    r"do not fit its config\.json: transformer\.h\.2\.\S+ is missing \(\d+ in all\)",
)
def _(workshop):
    return workshop.generate(workshop.model(n_layer=3))


@refuse(
    "26 batch is not micro x accumulation x ranks",
    2,
    r"train_batch_size 5, train_micro_batch_size_per_gpu 2, gradient_accumulation_steps 2 on 1 rank: .* must be",
    r"Use (train_batch_size \d+, [^,]*, gradient_accumulation_steps \d+(, or |\.)){3}",
)
def _(workshop):
    return workshop.deepspeed(train_batch_size=5, gradient_accumulation_steps=2)


@refuse(
    "27 a division that hides the mismatch",
    2,
    r"train_batch_size 10, train_micro_batch_size_per_gpu 4 on 1 rank: .*Use train",
)
def _(workshop):
    return workshop.deepspeed(train_batch_size=10, train_micro_batch_size_per_gpu=4)


@refuse("28 no batch keys", 2, r"no batch size\. .*train_batch_size, for example 64, and train_micro")
def _(workshop):
    return workshop.deepspeed(train_batch_size=None, train_micro_batch_size_per_gpu=None)


@refuse("29 unknown top-level key", 2, r"gradient_cliping.*did you mean gradient_clipping")
def _(workshop):
    return workshop.deepspeed(gradient_cliping=1.0)


@refuse("30 unknown zero key", 2, r"zero_optimization\.overlap_com\b.*did you mean .*overlap_comm")
def _(workshop):
    return workshop.deepspeed(zero_optimization={"stage": 1, "overlap_com": True})


@refuse("31 stage 4", 2, r"zero_optimization\.stage is 4; use 0, 1, 2 or 3")
def _(workshop):
    return workshop.deepspeed(zero_optimization={"stage": 4})


@refuse("31 stage in words", 2, r'zero_optimization\.stage is "two"; .*without quotes')
def _(workshop):
    return workshop.deepspeed(zero_optimization={"stage": "two"})


@refuse("32 fp16 and bf16", 2, r"bf16\.enabled and fp16\.enabled are both true; enable one")
def _(workshop):
    return workshop.deepspeed(fp16={"enabled": True}, bf16={"enabled": True})


@refuse("33 a JSON key given twice", 2, r"twice\.json: train_batch_size: given twice in one object, ")
def _(workshop):
    twice = workshop.write("twice.json", json.dumps(TRAIN_JSON)[:-1] + ', "train_batch_size": 8}')
    return [*workshop.train(), f"--deepspeed-config={twice}"]


@refuse("33 a JSON that is none", 2, r"bad\.json, line 2, column 1: .*; JSON has no comments")
def _(workshop):
    bad = workshop.write("bad.json", '{"steps_per_print": 1,\n}')
    return [*workshop.train(), f"--deepspeed-config={bad}"]


def without_bf16():
    """Restrict the machine's accelerator to the dtypes of an older one."""
    import torch
    from deepspeed.accelerator import get_accelerator

    get_accelerator().supported_dtypes = lambda: [torch.float32]


@refuse(
    "34 bf16 on hardware without it",
    2,
    r"asks for bfloat16, but cpu here supports .*float32",
    before=without_bf16,
)
def _(workshop):
    return workshop.deepspeed(bf16={"enabled": True})


@refuse("43 truncated safetensors", 3, r"model/model\.safetensors is truncated or damaged .*; copy it again")
def _(workshop):
    folder = workshop.model()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return workshop.train(model=folder)


@refuse("43 truncated safetensors, evaluated", 3, r"model\.safetensors is truncated.*copy it again")
def _(workshop):
    folder = workshop.model()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return workshop.evaluate(workshop.write("a.txt", "some text"), model=folder)


@refuse("44 a Git-LFS pointer as weights", 3, r"model\.safetensors is a Git LFS pointer.*git lfs pull")
def _(workshop):
    folder = workshop.model()
    (folder / "model.safetensors").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    )
    return workshop.generate(folder)


@refuse("45 model folder missing", 3, r"nowhere.*there is no such folder\. Give a folder, a GGUF file or a hub name")
def _(workshop):
    return workshop.train(model=workshop.folder / "nowhere")


@refuse("45 model folder missing, evaluated", 3, r"nowhere.*give an existing folder.* or a hub name")
def _(workshop):
    return workshop.evaluate(workshop.write("a.txt", "some text"), model=workshop.folder / "nowhere")


@refuse("46 folder without weights", 3, r"model has no weights; copy its model\.safetensors there, or give")
def _(workshop):
    folder = workshop.model()
    (folder / "model.safetensors").unlink()
    return workshop.train(model=folder)


@refuse("47 width not divisible by heads", 3, r"model; transformers cannot load it: .*divisible by num_heads.*32.*5")
def _(workshop):
    return workshop.train(model=workshop.model(n_head=5))


@refuse("47 width not divisible by heads, from scratch", 3, r"model\.from-scratch is .*divisible by num_heads.*32.*5")
def _(workshop):
    folder = workshop.model(n_head=5)
    return workshop.train(f"--model.from-scratch={folder}", f"--data.tokenizer={workshop.toy.model}")


@refuse("47 padding beyond the vocabulary", 3, r"model; transformers .*pad_token_id is 1000000; .* null .*vocab_size")
def _(workshop):
    return workshop.generate(workshop.model(pad_token_id=10**6, model_type="llama"))


@refuse(
    "47 a model that looks ahead, from scratch", 3, r"Gemma3ForCausalLM .*attends to later tokens.* use_bidirectional"
)
def _(workshop):
    folder = workshop.model(**LOOKS_AHEAD)
    return workshop.train(f"--model.from-scratch={folder}", f"--data.tokenizer={workshop.toy.model}")


@refuse("48 unknown model type", 3, r"gpt9")
def _(workshop):
    return workshop.train(model=workshop.model(model_type="gpt9", architectures=["GPT9LMHeadModel"]))


for word in ("nan", "inf", "-1e-4"):

    @refuse(
        f"56 learning rate {word}", 2, rf"optim\.learning-rate is {float(word)}; use a finite number of 0 or more, for"
    )
    def _(workshop, word=word):
        return workshop.train(f"--optim.learning-rate={word}")


@refuse("56 learning rate NaN in the DeepSpeed JSON", 2, r"deepspeed\.json: NaN is not JSON; write a finite number")
def _(workshop):
    return workshop.deepspeed(optimizer={"type": "AdamW", "params": {"lr": float("nan")}})


@refuse("56 learning rate infinite in the DeepSpeed JSON", 2, r"learning-rate is inf; use a finite number")
def _(workshop):
    command = workshop.deepspeed(optimizer={"type": "AdamW", "params": {"lr": 3}})
    settings = workshop.folder / "deepspeed.json"
    settings.write_text(settings.read_text().replace('"lr": 3', '"lr": 1e999'))
    return command

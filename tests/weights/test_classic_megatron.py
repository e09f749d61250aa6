import enum
import os
import random
import sys
import types
from argparse import Namespace

import numpy
import pytest
import torch
from tiny_models import VOCAB, logits_of, make_model
from transformers import AutoModelForCausalLM

from megaft.base.errors import ConfigError, DataError
from megaft.commands.convert import command, config
from megaft.weights.reading import open_weights

LAYERS, HEADS, WIDTH, INNER = 2, 4, 8, 128
PADDED = 128


def split_heads(matrix, version, size):
    """Shard transformers' c_attn, as (out, in), over ranks in the row order of a Megatron-LM version."""
    parts = []
    heads = {kind: [] for kind in "qkv"}
    for kind, block in zip("qkv", matrix.split(HEADS * WIDTH), strict=True):
        heads[kind] = list(block.split(WIDTH))
    for rank in range(size):
        mine = range(rank * HEADS // size, (rank + 1) * HEADS // size)
        if version == 0:
            rows = [heads[kind][head] for kind in "qkv" for head in mine]
        elif version == 1.0:
            rows = [heads[kind][head][row][None] for head in mine for row in range(WIDTH) for kind in "qkv"]
        else:
            rows = [heads[kind][head] for head in mine for kind in "qkv"]
        parts.append(torch.cat(rows))
    return parts


def classic_states(model, version, size, *, old_names=True):
    """Each rank's state_dict of Megatron-LM's GPTModel, written out by hand."""
    there = model.state_dict()
    words = torch.zeros(PADDED, HEADS * WIDTH, dtype=model.dtype)
    words[:VOCAB] = there["transformer.wte.weight"]
    attention = "attention" if old_names else "self_attention"
    states = []
    for rank in range(size):
        body = {}
        for layer in range(LAYERS):
            source, name = f"transformer.h.{layer}.", f"layers.{layer}."
            for kind in ("weight", "bias"):
                body[f"{name}input_layernorm.{kind}"] = there[f"{source}ln_1.{kind}"]
                body[f"{name}post_attention_layernorm.{kind}"] = there[f"{source}ln_2.{kind}"]
                rows = split_heads(there[f"{source}attn.c_attn.{kind}"].t(), version, size)
                body[f"{name}{attention}.query_key_value.{kind}"] = rows[rank]
                body[f"{name}mlp.dense_h_to_4h.{kind}"] = there[f"{source}mlp.c_fc.{kind}"].t().chunk(size)[rank]
            for ours, theirs in ((f"{attention}.dense", "attn.c_proj"), ("mlp.dense_4h_to_h", "mlp.c_proj")):
                body[f"{name}{ours}.weight"] = there[f"{source}{theirs}.weight"].T.chunk(size, 1)[rank]
                body[f"{name}{ours}.bias"] = there[f"{source}{theirs}.bias"]
        body["final_layernorm.weight"] = there["transformer.ln_f.weight"]
        body["final_layernorm.bias"] = there["transformer.ln_f.bias"]
        embedding = {
            "word_embeddings": {"weight": words.chunk(size)[rank]},
            "position_embeddings": {"weight": there["transformer.wpe.weight"]},
        }
        states.append({"language_model": {"embedding": embedding, "transformer" if old_names else "encoder": body}})
    return states


def settings(**changes):
    return Namespace(
        **{
            "padded_vocab_size": PADDED,
            "max_position_embeddings": 64,
            "hidden_size": HEADS * WIDTH,
            "num_layers": LAYERS,
            "num_attention_heads": HEADS,
            "ffn_hidden_size": INNER,
            "bias_gelu_fusion": True,
            "layernorm_epsilon": 1e-5,
            "params_dtype": torch.float16,
        }
        | changes
    )


def write(folder, states, version, *, directory="iter_0000010", name="mp_rank_{:02d}", zipped=True, **more):
    folder.mkdir(exist_ok=True)
    tracker = "release" if directory == "release" else str(int(directory.removeprefix("iter_")))
    (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
    for rank, state in enumerate(states):
        path = folder / directory / name.format(rank)
        path.mkdir(parents=True)
        whole = {"model": state, "iteration": 10, "checkpoint_version": version} | more
        if version == 0:
            del whole["checkpoint_version"]
        torch.save(whole, path / "model_optim_rng.pt", _use_new_zipfile_serialization=zipped)


def converted(source, to, **options):
    command.main(config.ConvertConfig(source=str(source), to=to, format="hugging-face", **options))
    return AutoModelForCausalLM.from_pretrained(to)


def require_same_logits(loaded, model):
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(logits_of(loaded, ids)[..., :VOCAB], logits_of(model, ids))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
def test_every_version_and_size_gives_the_model_s_logits(tmp_path, version, size):
    model = make_model("gpt2")
    is_old = version < 2
    states = classic_states(model, version, size, old_names=is_old)
    write(tmp_path / "classic", states, version, zipped=not is_old, args=settings())
    loaded = converted(tmp_path / "classic", tmp_path / "end")
    assert loaded.config.activation_function == "gelu_new"
    assert loaded.config.vocab_size == PADDED
    require_same_logits(loaded, model)


def test_a_release_without_settings_takes_a_config(tmp_path):
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "start")
    (tmp_path / "start/tokenizer.json").write_text("{}")
    half = classic_states(make_model("gpt2").half(), 0, 1)
    write(tmp_path / "classic", half, 0, directory="release", zipped=False)
    with pytest.raises(DataError, match="give --model-config"):
        converted(tmp_path / "classic", tmp_path / "end")
    loaded = converted(tmp_path / "classic", tmp_path / "end", model_config=str(tmp_path / "start"))
    assert loaded.dtype == torch.float16
    assert (tmp_path / "end/tokenizer.json").is_file()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].half()), name  # of 61 rows again
    require_weights = open_weights(str(tmp_path / "classic/release"), model_config=str(tmp_path / "start/config.json"))
    assert require_weights.shape("transformer.wte.weight") == (VOCAB, HEADS * WIDTH)


def test_to_ranks_and_back(tmp_path):
    model = make_model("gpt2")
    write(tmp_path / "classic", classic_states(model, 1.0, 2), 1.0, name="mp_rank_{:02d}_000", args=settings())
    arguments = {"format": "megatron", "tensor_parallel_size": 4}
    command.main(config.ConvertConfig(source=str(tmp_path / "classic"), to=tmp_path / "four", **arguments))
    require_same_logits(converted(tmp_path / "four", tmp_path / "end"), model)


@pytest.fixture
def megatron_enums(monkeypatch):
    """Modules whose classes real checkpoints refer to; they are removed before reading."""
    enums, scaler = types.ModuleType("megatron.model.enums"), types.ModuleType("fp16.loss_scaler")
    enums.ModelType = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module="megatron.model.enums")
    scaler.DynamicLossScaler = type("DynamicLossScaler", (), {"__module__": "fp16.loss_scaler"})
    names = {"megatron": types.ModuleType("megatron"), "megatron.model": types.ModuleType("megatron.model")}
    names |= {"megatron.model.enums": enums, "fp16": types.ModuleType("fp16"), "fp16.loss_scaler": scaler}
    with monkeypatch.context() as patch:
        for name, module in names.items():
            patch.setitem(sys.modules, name, module)
        yield enums.ModelType.encoder_or_decoder, scaler.DynamicLossScaler


@pytest.mark.parametrize("zipped", [True, False])
def test_what_real_checkpoints_hold_besides(tmp_path, megatron_enums, zipped):
    model_type, scaler_class = megatron_enums
    scaler = scaler_class()
    scaler.cur_scale = 65536.0
    rng = {"random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state()}
    more = {"optimizer": {"loss_scaler": scaler, "param_groups": [{"lr": numpy.float64(0.1)}]}, "rng_state": [rng]}
    model = make_model("gpt2")
    write(
        tmp_path / "classic",
        classic_states(model, 3.0, 1, old_names=False),
        3.0,
        zipped=zipped,
        args=settings(model_type=model_type),
        **more,
    )
    for name in ("megatron.model.enums", "megatron.model", "fp16.loss_scaler", "fp16"):
        del sys.modules[name]
    require_same_logits(converted(tmp_path / "classic", tmp_path / "end"), model)


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


EVIL = {"system": (os.system, "touch {}"), "eval": (eval, "open('{}', 'w')"), "import": (__import__, "antigravity")}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("evil", EVIL)
def test_a_pickle_with_code_is_refused(tmp_path, evil, zipped):
    function, text = EVIL[evil]
    trace = tmp_path / "trace"
    model = make_model("gpt2")
    write(
        tmp_path / "classic",
        classic_states(model, 3.0, 1),
        3.0,
        zipped=zipped,
        args=settings(model_type=Evil(function, text.format(trace))),
    )
    with pytest.raises(DataError, match="runs no code"):
        converted(tmp_path / "classic", tmp_path / "end")
    assert not trace.exists()
    assert not (tmp_path / "end").exists()


def drop(states):
    del states[0]["language_model"]["transformer"]["layers.1.mlp.dense_h_to_4h.bias"]


def add(states):
    body = states[0]["language_model"]["transformer"]
    body["layers.2.input_layernorm.bias"] = body["layers.1.input_layernorm.bias"]


REFUSED = {
    "a tensor is missing": (drop, {}, r"decoder.layers.1.mlp.linear_fc1.bias is missing"),
    "a layer too many": (add, {}, r"such as decoder.layers.2.input_layernorm.bias"),
    "fewer heads": (None, {"num_attention_heads": 4, "hidden_size": 64}, "do not fit"),
    "swiglu": (None, {"swiglu": True}, "swiglu True"),
    "rmsnorm": (None, {"normalization": "RMSNorm"}, "normalization RMSNorm"),
    "no number": (None, {"num_layers": "two"}, "cannot build a model"),
    "no width": (None, {"hidden_size": None}, "hidden_size is not in its args"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_gpt2_is_refused(tmp_path, case):
    change, changes, message = REFUSED[case]
    states = classic_states(make_model("gpt2"), 3.0, 1)
    if change:
        change(states)
    write(tmp_path / "classic", states, 3.0, args=settings(**changes))
    with pytest.raises(DataError, match=message):
        converted(tmp_path / "classic", tmp_path / "end")


def test_ranks_that_are_not_all_there(tmp_path):
    states = classic_states(make_model("gpt2"), 3.0, 2)
    write(tmp_path / "classic", states, 3.0, args=settings())
    first, second = (tmp_path / f"classic/iter_0000010/mp_rank_{rank:02d}" for rank in (0, 1))
    (first / "model_optim_rng.pt").rename(first / "kept")
    with pytest.raises(DataError, match="missing or damaged"):
        open_weights(str(tmp_path / "classic"))
    (first / "kept").unlink()
    first.rmdir()
    with pytest.raises(DataError, match="each of mp_rank_00"):
        open_weights(str(tmp_path / "classic"))
    second.rename(first)
    with pytest.raises(DataError, match="do not fit"):
        open_weights(str(tmp_path / "classic"))
    first.rename(first.with_name("mp_rank_00_001"))
    with pytest.raises(DataError, match="pipeline"):
        open_weights(str(tmp_path / "classic"))


def test_a_file_that_is_cut_short(tmp_path):
    write(tmp_path / "classic", classic_states(make_model("gpt2"), 3.0, 1), 3.0, args=settings())
    path = tmp_path / "classic/iter_0000010/mp_rank_00/model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="missing or damaged"):
        open_weights(str(tmp_path / "classic"))


def test_a_config_that_no_checkpoint_needs(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has a config\.json"):
        open_weights(str(tmp_path), model_config=str(tmp_path))


def test_what_libraries_allow_is_not_allowed_here(tmp_path):
    """megatron-core registers classes with torch's reader when it is imported, argparse.Namespace among them."""
    import argparse

    from torch.serialization import safe_globals

    from megaft.weights.classic_megatron import read_pickle

    path = tmp_path / "model_optim_rng.pt"
    torch.save({"args": argparse.Namespace(num_layers=2)}, path)
    with safe_globals([argparse.Namespace]):
        before = {*torch.serialization.get_safe_globals()}
        args = read_pickle(path)["args"]
        assert {*torch.serialization.get_safe_globals()} == before
    assert not isinstance(args, argparse.Namespace)

"""GGUF files that transformers would load wrongly are refused; those it loads correctly are exact."""

import numpy
import pytest
import torch
import toy_gguf

from megaft.base.errors import DataError
from megaft.base.gguf import read_header
from megaft.base.untrusted import MAX_LAYERS
from megaft.data.tokenizer import load_tokenizer
from megaft.weights.loading.pretrained import load_language_model
from megaft.weights.reading import open_weights

TOKENS = torch.arange(20)[None]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return a function that writes the toy Llama with extra settings, texts and tensors."""
    from gguf import GGUFWriter

    write_header = GGUFWriter.write_header_to_file

    def make(texts=(), tensors=(), **settings):
        def with_more(self, *arguments, **options):
            for name, text in dict(texts).items():
                self.add_string(name, text)
            for name, size in dict(tensors).items():
                self.add_tensor(name, numpy.ones(size, numpy.float32))
            return write_header(self, *arguments, **options)

        monkeypatch.setattr(GGUFWriter, "write_header_to_file", with_more)
        path = tmp_path / "model.gguf"
        toy_gguf.make_gguf(path, **settings)
        return path

    return make


def test_a_file_is_the_model_that_was_written(make):
    path, model = make(), toy_gguf.make_llama()
    with torch.no_grad():
        assert torch.equal(load_language_model(str(path))(TOKENS).logits, model(TOKENS).logits)
    weights = open_weights(str(path))
    assert all(torch.equal(weights.read(name), weight) for name, weight in model.named_parameters())
    header = read_header(path)
    assert (len(header.tensors), header.num_elements) == (21, sum(weight.numel() for weight in model.parameters()))
    assert (header.architecture, header.setting("block_count"), header.setting("rope.freq_base")) == ("llama", 2, 1e4)
    assert load_tokenizer(path).vocab_size == 512


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"llama.block_count": 1}, r"block_count 1, but tensors of 2 layers", id="a layer too few"),
        pytest.param({"llama.block_count": 3}, r"block_count 3, but tensors of 2 layers", id="a layer too many"),
        pytest.param({"llama.block_count": 0}, r"block_count 0; use 1 to", id="no layers"),
        pytest.param({"llama.block_count": MAX_LAYERS + 1}, r"block_count 10001; use 1 to 10,000", id="any number"),
        pytest.param({"tensors": {"blk.0.attn_q.bias": 32}}, r"48,320 weights, .* loads 48,288", id="a bias"),
        pytest.param({"tensors": {"rope_freqs.weight": 4}}, r"ignores rope_freqs\.weight", id="Llama 3's positions"),
        pytest.param({"texts": {"llama.rope.scaling.type": "yarn"}}, r"rope\.scaling\.type 'yarn'", id="YaRN"),
        pytest.param({"llama.logit_scale": 0.0625}, r"llama\.logit_scale 0\.0625", id="scaled logits"),
        pytest.param({"llama.embedding_length": 2**31}, r"do not fit its config\.json", id="width"),
    ],
)
def test_what_transformers_would_leave_out_is_refused(changes, says, make):
    path = make(**changes)
    for load in (load_language_model, open_weights):
        with pytest.raises(DataError, match=says) as error:
            load(str(path))
        assert str(path) in str(error.value)


def test_settings_that_contradict_each_other_are_refused_with_the_tokenizer_too(make):
    path = make(**{"llama.attention.head_count": 5})
    for load in (load_tokenizer, load_language_model):
        with pytest.raises(DataError, match=r"hidden size \(32\) .*attention heads"):
            load(str(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_settings_that_change_nothing_pass(dtype, make):
    path = make(**{"llama.logit_scale": 1.0, "llama.expert_count": 0, "llama.attention.key_length": 8})
    loaded, model = load_language_model(str(path), dtype), toy_gguf.make_llama()
    for parameter in model.parameters():  # buffers stay in fp32
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("scaling", [{}, {"texts": {"llama.rope.scaling.type": "none"}}])
def test_positions_that_are_not_scaled_pass(scaling, make):
    assert load_language_model(str(make(**scaling))).config.rope_parameters["rope_type"] == "default"


def put(place, value):
    return lambda data: data[:place] + value + data[place + len(value) :]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda data: b"", "cannot mmap an empty file", id="empty"),
        pytest.param(put(0, b"GGML"), "does not begin with GGUF", id="magic"),
        pytest.param(put(4, b"\x01"), "version is 1; supported are 2 and 3", id="version"),
        pytest.param(put(8, b"\xff" * 8), "truncated or damaged", id="tensors without number"),
        pytest.param(put(16, b"\xff" * 8), "truncated or damaged", id="settings without number"),
        pytest.param(lambda data: data[:-4], "output.weight lies outside it", id="the last number cut off"),
        pytest.param(lambda data: data[:3000], "truncated or damaged", id="cut in the vocabulary"),
        pytest.param(lambda data: data.replace(b"blk.1.attn_norm", b"blk.0.attn_norm"), "twice", id="a tensor twice"),
    ],
)
def test_a_damaged_file_is_refused(change, says, make):
    path = make()
    path.write_bytes(change(path.read_bytes()))
    for load in (load_language_model, load_tokenizer, open_weights):
        with pytest.raises(DataError, match=f"{path}.*{says}") as error:
            load(str(path))
        assert "\n" not in str(error.value)

import json
import shutil

import pytest
import torch
from families_models import tiny_config
from tiny_models import MODELS, VOCAB, logits_of, make_config, make_model
from torch import nn

from megaft.base.errors import ConfigError, DataError
from megaft.config.train import LoraConfig, ModelConfig
from megaft.data.samples import IGNORE_INDEX
from megaft.models import hugging_face, trials
from megaft.models.adapters import add_adapters
from megaft.models.hugging_face import NatsModel
from megaft.models.loss import token_nats
from megaft.weights.loading import pretrained


@pytest.fixture(scope="module")
def saved_gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture
def tokens():
    return torch.randint(0, VOCAB, (3, 21), generator=torch.Generator().manual_seed(1))


# Nats instead of logits


@pytest.mark.parametrize("name", MODELS)
def test_nats_are_the_loss_of_transformers(name, tokens):
    """transformers shifts labels and averages over those that are scored; gradients agree too."""
    reference, model = make_model(name), make_model(name)
    scored = tokens.clone()
    scored[:, 3:6] = IGNORE_INDEX
    loss = reference(input_ids=tokens, labels=scored).loss
    loss.backward()

    nats_model = NatsModel(model)
    assert (nats_model.head is not None) == MODELS[name][2]
    nats = nats_model(tokens[:, :-1], scored[:, 1:])
    num_scored = int((scored[:, 1:] != IGNORE_INDEX).sum())
    torch.testing.assert_close(nats / num_scored, loss, rtol=1e-6, atol=0)
    (nats / num_scored).backward()
    for (parameter_name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=parameter_name: n + m)


@pytest.mark.parametrize("name", MODELS)
def test_nats_of_each_token(name, tokens):
    model = make_model(name)
    labels = tokens[:, 1:].clone()
    labels[0, :4] = IGNORE_INDEX
    positions = (labels != IGNORE_INDEX).flatten().nonzero().flatten()
    nats = NatsModel(model)(tokens[:, :-1], labels, positions=positions)
    expected = token_nats(logits_of(model, tokens[:, :-1]), labels)[labels != IGNORE_INDEX]
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=1e-5)
    assert not nats.requires_grad


def test_a_softcap_is_seen_while_logits_are_small(tokens):
    """Logits of an untrained model are so small that the cap 30 * tanh(x / 30) hardly changes them."""
    model = make_model("gemma2 with capped logits")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.02)
    assert NatsModel(model).head is None


@pytest.mark.parametrize("was_training", [True, False])
def test_the_trial_of_the_head_leaves_no_trace(was_training, tokens):
    model = make_model(attn_pdrop=0.5).train(was_training)
    state = torch.get_rng_state()
    NatsModel(model)
    assert model.training is was_training
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


# Attention within documents


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"bloom"}))
def test_documents_packed_together_are_as_each_alone(name):
    language_model = make_model(name)
    trials.require_document_isolation(language_model)
    model = NatsModel(language_model)
    lengths = [5, 1, 9, 4]
    tokens = torch.randint(0, VOCAB, (2, sum(lengths)), generator=torch.Generator().manual_seed(2))
    labels = torch.randint(0, VOCAB, tokens.shape, generator=torch.Generator().manual_seed(3))
    # The same documents in two rows, in another order, and numbered as in the middle of a corpus.
    rows = [lengths, lengths[::-1]]
    ids = torch.stack([torch.repeat_interleave(torch.arange(4) + 17, torch.tensor(row)) for row in rows])
    everywhere = torch.arange(tokens.numel())
    packed = model(tokens, labels, ids, everywhere).view_as(tokens)
    for row in range(2):
        begin = 0
        for length in rows[row]:
            part = (slice(row, row + 1), slice(begin, begin + length))
            alone = model(tokens[part], labels[part], positions=torch.arange(length))
            torch.testing.assert_close(packed[part].flatten(), alone, rtol=1e-5, atol=1e-5)
            begin += length
    assert not torch.allclose(packed.flatten(), model(tokens, labels, positions=everywhere), atol=1e-2)


def test_a_model_that_attends_across_documents_is_refused():
    """BLOOM has no position ids to restart."""
    bloom = make_model("bloom")
    with pytest.raises(
        ConfigError,
        match=r"data.attend-within-documents .*BloomForCausalLM",
    ):
        trials.require_document_isolation(bloom)


def test_positions_begin_anew_with_every_document():
    ids = torch.tensor([[3, 3, 4, 6, 6, 6, -1, -1], [9, 9, 9, 9, 9, 9, 9, 9]])
    assert hugging_face.positions_within(ids).tolist() == [[0, 1, 0, 0, 1, 2, 0, 1], list(range(8))]


# Loading and making


def test_loading_gives_the_saved_weights_in_fp32(saved_gpt2, tokens):
    model = pretrained.load_language_model(str(saved_gpt2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(logits_of(model, tokens), logits_of(make_model(), tokens))


def test_new_weights_are_a_function_of_the_seed(saved_gpt2):
    def weights(seed):
        model = hugging_face.build(ModelConfig(from_scratch=str(saved_gpt2)), LoraConfig(), seed)
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("name", ["gpt2", "gptj with a head bias", "phi with a head bias", "llama"])
def test_the_dropout_flag_sets_every_dropout(name, tmp_path, tokens):
    model_type, settings, _ = MODELS[name]
    make_config(model_type, settings).save_pretrained(tmp_path)

    def two_forwards(dropout):
        model = pretrained.create_language_model(str(tmp_path), 0, dropout).train()
        return model, *(model(input_ids=tokens).logits for _ in range(2))

    model, one, other = two_forwards(0.0)
    assert torch.equal(one, other)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} <= {0.0}
    model, one, other = two_forwards(0.3)
    assert not torch.equal(one, other)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} <= {0.3}
    settings = {key: value for key, value in model.config.to_dict().items() if "drop" in key and value is not None}
    assert set(settings.values()) == {0.3}


@pytest.mark.parametrize("model_type", ["bert", "bart", "opt", "roberta", "gpt_bigcode", "xglm", "electra"])
def test_the_dropout_flag_reaches_every_family(model_type, tmp_path, tokens):
    """Some families name their settings _dropout_prob or layerdrop."""
    tiny_config(model_type).save_pretrained(tmp_path)

    def two_forwards(dropout):
        model = pretrained.create_language_model(str(tmp_path), 0, dropout).train()
        return [model(input_ids=tokens, use_cache=False).logits for _ in range(2)]

    assert torch.equal(*two_forwards(0.0))
    assert not torch.equal(*two_forwards(0.3))


def test_without_the_flag_dropout_is_the_models_own(saved_gpt2):
    model = pretrained.load_language_model(str(saved_gpt2))
    assert (model.config.attn_pdrop, model.config.resid_pdrop) == (0.1, 0.1)
    assert pretrained.load_language_model(str(saved_gpt2), dropout=0.0).config.attn_pdrop == 0.0


def test_activation_checkpointing_changes_no_bit(saved_gpt2, tokens):
    def trained(activation_checkpointing):
        config = ModelConfig(path=str(saved_gpt2), activation_checkpointing=activation_checkpointing)
        model = NatsModel(hugging_face.build(config, LoraConfig(), 0)).train()
        torch.manual_seed(0)
        nats = model(tokens[:, :-1], tokens[:, 1:])
        return nats, *torch.autograd.grad(nats, list(model.parameters()))

    for plain, checkpointed in zip(trained(False), trained(True), strict=True):
        assert torch.equal(plain, checkpointed)


def test_activation_checkpointing_that_a_family_lacks_is_refused(tmp_path):
    make_config("ctrl", {"vocab_size": VOCAB, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4}).save_pretrained(
        tmp_path
    )
    config = ModelConfig(from_scratch=str(tmp_path), activation_checkpointing=True)
    with pytest.raises(ConfigError, match=r"model\.activation-checkpointing .*CTRLLMHeadModel .*drop"):
        hugging_face.build(config, LoraConfig(), 0)


@pytest.mark.slow
def test_gguf(tmp_path, tokens, monkeypatch, smollm2_cut):
    from transformers import AutoModelForCausalLM

    originals = []
    copy = pretrained._without_quantization
    monkeypatch.setattr(pretrained, "_without_quantization", lambda model: originals.append(model) or copy(model))
    model = pretrained.load_language_model(str(smollm2_cut))
    logits = logits_of(model, tokens)
    assert torch.equal(logits, logits_of(originals.pop(), tokens))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert torch.equal(logits, logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), tokens))


# Errors: one line each that names the value


def without_weights(folder, saved):
    shutil.copy(saved / "config.json", folder)


def without_config(folder, saved):
    shutil.copy(saved / "model.safetensors", folder)


def empty(folder, saved):
    pass


def with_cut_weights(folder, saved):
    without_weights(folder, saved)
    (folder / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-1000])


def with_a_cut_config(folder, saved):
    without_config(folder, saved)
    (folder / "config.json").write_text((saved / "config.json").read_text()[:-20])


def of_an_unknown_type(folder, saved):
    without_config(folder, saved)
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')


def of_another_shape(folder, saved):
    without_config(folder, saved)
    config = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 64}))


def with_fewer_weights_than_layers(folder, saved):
    without_config(folder, saved)
    config = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))


@pytest.mark.parametrize(
    "broken",
    [
        empty,
        without_weights,
        without_config,
        with_cut_weights,
        with_a_cut_config,
        of_an_unknown_type,
        of_another_shape,
        with_fewer_weights_than_layers,
    ],
)
def test_a_folder_that_is_no_model_is_refused(broken, tmp_path, saved_gpt2):
    broken(tmp_path, saved_gpt2)
    with pytest.raises(DataError, match=rf"^(--model.path is )?{tmp_path}") as error:
        pretrained.load_language_model(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "/no/such.gguf", "a/b/c"])
def test_a_missing_path_is_named(source):
    with pytest.raises(DataError, match=rf"^--model.path is {source}; .*(file|folder)\."):
        pretrained.load_language_model(source)


@pytest.mark.parametrize("text", [None, "", '{"model_type": "no-such-model"}', "{}"])
def test_a_missing_or_broken_config_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=rf"^--model.from-scratch is {path}; ") as error:
        pretrained.create_language_model(str(path), 0)
    assert "\n" not in str(error.value)


class Words:
    vocab_size = VOCAB + 1


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(DataError, match=f"tokenizer has {VOCAB + 1} .*model .*{VOCAB};"):
        hugging_face.require_fits(make_model(), Words, 8)
    hugging_face.require_fits(make_model(vocab_size=VOCAB + 1), Words, 8)
    hugging_face.require_fits(make_model(vocab_size=VOCAB + 3), Words, 8)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_context_above_the_positions_is_refused(name):
    model = make_model(name, vocab_size=VOCAB + 1)
    hugging_face.require_fits(model, Words, 64)
    with pytest.raises(ConfigError, match=r"context-length is 65, .*64 positions; use 64"):
        hugging_face.require_fits(model, Words, 65)


def test_the_architecture_is_what_a_checkpoint_depends_on():
    same = hugging_face.architecture(make_model())
    assert hugging_face.architecture(make_model(attn_pdrop=0.7)) == same
    adapted = make_model()
    add_adapters(adapted, LoraConfig(rank=2), seed=0)
    others = [make_model(n_layer=1), make_model(vocab_size=99), make_model("llama"), adapted]
    assert len({same, *map(hugging_face.architecture, others)}) == 5

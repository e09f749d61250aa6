import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import GPT2, LLAMA, make_config

from megaft.base.errors import ConfigError
from megaft.weights.families import Rule
from megaft.weights.layout import layout_of, local, whole

numbers = st.integers(1, 4)


@given(size=numbers, per_rank=numbers, heads_per_group=numbers, head_width=numbers, width=numbers, fused=st.booleans())
def test_queries_keys_and_values_come_back_from_any_cut(size, per_rank, heads_per_group, head_width, width, fused):
    groups = size * per_rank
    key_rows, query_rows = groups * head_width, groups * heads_per_group * head_width
    if fused:  # as GPT-2 keeps them, (in, out)
        heads_per_group, sources = 1, [torch.randn(width, 3 * key_rows)]
        rule = Rule(("qkv",), 0, groups=groups, is_transposed=True)
    else:
        sources = [torch.randn(rows, width) for rows in (query_rows, key_rows, key_rows)]
        rule = Rule(("q", "k", "v"), 0, groups=groups)
    shards = [local(rule, sources, size, rank) for rank in range(size)]
    assert {shard.shape for shard in shards} == {
        ((query_rows if not fused else key_rows) // size + 2 * key_rows // size, width)
    }
    found = whole(rule, shards, heads_per_group)
    assert [*found] == [*rule.sources]
    assert all(torch.equal(*pair) for pair in zip(found.values(), sources, strict=True))


@given(size=numbers, rows=st.integers(1, 9), width=numbers)
def test_a_vocabulary_is_filled_with_zeros_and_cut_back(size, rows, width):
    rule, words = Rule(("words",), 0, rows=rows), torch.randn(rows, width)
    shards = [local(rule, [words], size, rank) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    assert not torch.cat(shards)[rows:].any()
    assert torch.equal(whole(rule, shards, 1)["words"], words)


@given(size=numbers, per_rank=numbers, width=numbers, axis=st.sampled_from([0, 1, None]), transposed=st.booleans())
def test_a_matrix_is_cut_along_its_axis(size, per_rank, width, axis, transposed):
    matrix = torch.randn((size * per_rank, width) if axis == 0 else (width, size * per_rank))
    source = matrix.T if transposed else matrix
    rule = Rule(("matrix",), axis, is_transposed=transposed)
    shards = [local(rule, [source], size, rank) for rank in range(size)]
    assert torch.equal(torch.cat(shards, axis) if axis is not None else shards[0], matrix)
    assert torch.equal(whole(rule, shards, 1)["matrix"], source)


def test_each_rank_has_its_gates_before_its_values():
    gate, up = torch.arange(4.0).unsqueeze(1), torch.arange(4.0, 8).unsqueeze(1)
    rule = Rule(("gate", "up"), 0)
    shards = [local(rule, [gate, up], 2, rank) for rank in range(2)]
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert torch.equal(whole(rule, shards, 1)["up"], up)


def test_queries_of_a_group_stand_before_its_key_and_value():
    queries, keys, values = torch.arange(4.0), torch.arange(10.0, 12), torch.arange(20.0, 22)
    rule = Rule(("q", "k", "v"), 0, groups=2)  # two heads a group, one wide
    assert local(rule, [queries, keys, values], 1, 0).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "mistral"])
def test_every_parameter_of_transformers_has_one_place(name):
    from megaft.weights.parameters import shapes_of

    config = make_config(name, GPT2 if name == "gpt2" else LLAMA)
    sources = [source for rule in layout_of(config).rules.values() for source in rule.sources]
    assert sorted(sources) == sorted(shapes_of(config))


def test_a_family_without_a_layout_is_refused():
    with pytest.raises(ConfigError, match=r"model_type is bloom; .* support gpt2, llama, mistral, qwen2;"):
        layout_of(make_config("bloom", {}))


def test_biases_that_megatron_cannot_tell_apart_are_refused():
    with pytest.raises(ConfigError, match="attention_bias True and mlp_bias False"):
        layout_of(make_config("llama", LLAMA | {"attention_bias": True}))

import pytest
import torch
from tiny_models import make_model

from megaft.base.errors import ConfigError
from megaft.models import compiled
from megaft.models.compiled import compile_blocks


def is_compiled(model):
    return any(module._compiled_call_impl is not None for module in model.modules())


@pytest.mark.parametrize(("choice", "expected"), [("on", True), ("off", False), ("auto", False)])
def test_blocks_are_compiled_on_request(monkeypatch, choice, expected):
    """auto: on a GPU only."""
    monkeypatch.setattr(compiled, "missing_compiler", lambda: "")
    model = make_model("gpt2")
    compile_blocks(model, choice)
    assert is_compiled(model) == expected


def test_off_holds_for_every_compiled_function(monkeypatch):
    monkeypatch.setattr(compiled, "missing_compiler", lambda: "")
    calls = []
    function = torch.compile(lambda x: calls.append(torch.compiler.is_compiling()) or x + 1, backend="eager")
    compile_blocks(make_model("gpt2"), "off")
    function(torch.ones(1))
    assert calls == [False]
    compile_blocks(make_model("gpt2"), "auto")
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_function_stays_as_it_is_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "missing_compiler", lambda: "there is none")
    assert compiled.compiled(len) is len


@pytest.mark.parametrize("choice", ["on", "auto"])
def test_a_machine_without_a_compiler(monkeypatch, choice):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = make_model("gpt2")
    if choice == "on":
        with pytest.raises(ConfigError, match=r"--model\.compile is on, but .*no-such-compiler.*--model\.compile off"):
            compile_blocks(model, choice)
    else:
        compile_blocks(model, choice)
    assert not is_compiled(model)

"""The evaluation benchmark: predictions checked by hand, and all systems on a toy model."""

import contextlib
import io
import json

import evaluate_vs_peers
import evaluate_vs_peers_run
import pytest
import tyro
from evaluate_vs_peers_case import PRESETS, Shape, flops
from evaluate_vs_peers_report import Comparison
from transformers import GPT2Config, LlamaConfig

GPT2_SIZES = {
    "124m": {},
    "355m": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "774m": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "1.5b": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}


@pytest.mark.parametrize(
    ("size", "naive", "minimal"),  # PFLOP of WikiText-103 test at stride 32
    [("124m", 2.29, 1.54), ("355m", 6.53, 5.47), ("774m", 14.1, 12.8), ("1.5b", 28.2, 26.4)],
)
def test_flops_of_the_four_gpt2_sizes(size, naive, minimal):
    shape = Shape.of(GPT2Config(**GPT2_SIZES[size]))
    assert 8417 * shape.whole(1024) / 1e15 == pytest.approx(naive, rel=5e-3)
    assert 8417 * shape.scored(1024, 32) / 1e15 == pytest.approx(minimal, rel=5e-3)


def test_a_window_scored_whole_costs_a_whole_pass():
    shape = Shape.of(LlamaConfig(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=256))
    assert shape.scored(100, 100) == shape.whole(100)


def test_peers_pay_for_padding():
    stride, _, padded, lambada = PRESETS["toy"]
    shape = Shape.of(GPT2Config())
    counted = flops(stride, shape, [(64, 64), (64, 32), (42, 10)], 64)
    assert counted["megatron"] == 3 * shape.whole(64)
    assert flops(padded, shape, [(30, 2), (40, 1)], 128)["padded"] == 2 * shape.whole(128)
    assert flops(lambada, shape, [(30, 2)], 128)["lm-eval 4"] == shape.whole(30)


@pytest.mark.parametrize(
    ("nats", "accuracy", "is_sound"),
    [
        pytest.param(1000.005, 0.5, True, id="rounding"),
        pytest.param(1000.05, 0.5, False, id="another number"),
        pytest.param(1000.0, 0.6, False, id="another answer"),
    ],
)
def test_numbers_must_agree(nats, accuracy, is_sound):
    def run(seconds, nats, accuracy=0.5):
        return {"seconds": seconds, "nats": nats, "accuracy": accuracy, "peak_memory_bytes": 2**30}

    runs = {"megaft": [run(1, 1000.0), run(2, 1000.0)], "padded": [run(10, nats, accuracy), run(22, nats, accuracy)]}
    case = PRESETS["gpt2-124m-cpu"][2]
    made = Comparison(case=case, flops={"megaft": 1, "padded": 12}, num_windows=1, num_scored_tokens=1, runs=runs)
    assert made.is_sound is is_sound
    assert made.ratios("padded") == [10, 11]
    assert "| padded | 12.00 | 10.50 [10.00, 11.00] | 0.88 |" in made.markdown()
    assert ("DISAGREE" in made.markdown()) is not is_sound


def printed_by(contestant, case):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate_vs_peers_run.main(contestant, case)
    return json.loads(out.getvalue().splitlines()[-1])


@pytest.mark.long
@pytest.mark.slow
def test_all_contestants_find_one_number(tmp_path, monkeypatch, run_ranks):
    """One system runs as a program, the others in forked processes with their libraries imported."""
    launch = evaluate_vs_peers.launch

    def launch_quickly(contestant, case):
        return launch(contestant, case) if contestant == "megatron" else run_ranks(1, printed_by, contestant, case)[0]

    monkeypatch.setattr(evaluate_vs_peers, "launch", launch_quickly)
    flags = ["--preset", "toy", "--repeats", "1", "--cases", "stride", "lambada", "--results", str(tmp_path)]
    assert evaluate_vs_peers.main(tyro.cli(evaluate_vs_peers.Arguments, args=flags)) == 0
    (raw,) = tmp_path.glob("evaluate-toy_*.json")
    found = json.loads(raw.read_text())["comparisons"]
    assert [set(comparison["runs"]) for comparison in found] == [
        {"megaft", "megatron"},
        {"megaft", "lm-eval 1", "lm-eval 4"},
    ]
    assert raw.with_suffix(".md").exists()

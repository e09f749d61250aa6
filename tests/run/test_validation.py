import json
import math
from types import SimpleNamespace

import pytest
import torch

from megaft.base.errors import DataError, NumericsError
from megaft.config.prepare import PrepareConfig
from megaft.config.train import parse_train
from megaft.data.dataset import Dataset
from megaft.data.indexed import TokenFile
from megaft.data.prepare import prepare
from megaft.data.tokenizer import load_tokenizer
from megaft.run.recovery import validate_or_stop
from megaft.run.validation import Validation, scored_from
from megaft.scoring.windows import windows

RECORDS = [{"q": "one two three", "a": " four five"}, {"q": "six", "a": " seven"}]


class Engine:
    """One nat a label, wherever there is one."""

    def __call__(self, input_ids, labels, positions):
        assert (labels.flatten()[positions] >= 0).all()
        return torch.ones(len(positions))

    def eval(self):
        pass

    def train(self):
        pass


@pytest.fixture
def validate(toy_model, tmp_path):
    def validation(**options):
        records = tmp_path / "records.jsonl"
        records.write_text("\n".join(map(json.dumps, RECORDS)))
        prefix = tmp_path / "valid"
        prepare(PrepareConfig(inputs=(str(records),), output=prefix, tokenizer=str(toy_model), **options))
        flags = (
            "--deepspeed-config j --data.train t --data.valid v --run.dir r --run.max-steps 1 --data.context-length 8"
        )
        config = parse_train([*flags.split(), "--model.path", str(toy_model)])
        return Validation(Dataset(str(prefix)), config, load_tokenizer(str(toy_model)))

    def run(**options):
        score = validation(**options)(Engine(), torch.device("cpu"))
        return score, load_tokenizer(str(toy_model)), tmp_path / "valid"

    run.validation = validation
    return run


def test_only_completions_count_as_in_training(validate):
    score, tokenizer, prefix = validate(prompt_key="q", completion_key="a", append_eod=True)
    completions = sum(len(tokenizer.encode(record["a"])) for record in RECORDS)
    assert score.nats == score.num_scored_tokens == completions + 2  # and the end of each, which training scores too
    assert TokenFile(prefix).num_tokens > score.num_scored_tokens
    assert (score.word_perplexity, score.bits_per_byte) == (None, None)


@pytest.mark.parametrize("num_opening", [0, 1, 2, 5])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 6, 23])
def test_windows_score_what_follows_the_opening_tokens_once(num_opening, num_tokens):
    found = scored_from(num_opening, windows(num_tokens, 4, 2))
    targets = [position for window in found for position in range(window.scored_from, window.end)]
    assert targets == list(range(max(1, num_opening), num_tokens))


def test_of_plain_text_every_token_counts_but_those_appended(validate):
    score, tokenizer, _ = validate(json_key="q", append_eod=True)
    assert score.nats == sum(len(tokenizer.encode(record["q"])) for record in RECORDS)
    assert score.num_words == 4


def test_a_text_with_nothing_scored_is_refused(validate, monkeypatch):
    for record in RECORDS:  # one token each, which nothing in its document predicts
        monkeypatch.setitem(record, "q", "")
        monkeypatch.setitem(record, "a", "a")
    with pytest.raises(DataError, match="no scored token"):
        validate(prompt_key="q", completion_key="a")


class Broken(Engine):
    """A model of which the first label is not a number."""

    def __call__(self, input_ids, labels, positions):
        nats = super().__call__(input_ids, labels, positions)
        nats[0] = math.nan
        return nats


def test_a_validation_that_is_not_finite_ends_the_run_and_is_never_the_best(validate, tmp_path):
    validation = validate.validation(json_key="q", append_eod=True)
    for step in (2, 4, 8):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step:08d}/manifest.json").touch()
    done = []
    run = SimpleNamespace(
        validation=validation,
        engine=Broken(),
        device=torch.device("cpu"),
        config=SimpleNamespace(run=SimpleNamespace(dir=tmp_path)),
        events=SimpleNamespace(record=lambda event, step, **more: done.append((event, step, more["decision"]))),
        saver=SimpleNamespace(publish=lambda: done.append("published")),
    )
    last = "the last checkpoint before it is step 4"
    with pytest.raises(NumericsError, match=rf"after step 8 \({last}\): --data\.valid .* 2 of 11 scored.*finite"):
        validate_or_stop(run, 8)
    assert done == [("non-finite validation", 8, "stop"), "published"]
    run.engine = Engine()
    assert validate_or_stop(run, 8).nats == 11

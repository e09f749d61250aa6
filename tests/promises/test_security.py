"""Promises of SECURITY.md: no untrusted file runs code, and no secret ends up in a file.

Tested elsewhere: our own code runs nothing (test_unsafe_calls.py), the report shows all as text and loads nothing
(test_report.py), batch scripts quote values (test_submit.py), damaged checkpoints are refused by name
(test_checkpoint_files.py).
"""

import io
import json
import pickle
import re
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from bad_inputs import start

from megaft.base.errors import CheckpointError, DataError
from megaft.base.redaction import redacted, without_folders, without_secrets
from megaft.base.untrusted import require_safe_files
from megaft.checkpoint import resume
from megaft.data.tokenizer import load_tokenizer
from megaft.run import trackers
from megaft.run.same_settings import settings_error
from megaft.weights import manifest as manifest_module
from megaft.weights.checkpoint_reader import CheckpointReader
from megaft.weights.loading import pretrained


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def as_torch_saves(path, in_a_zip=True):
    stream = io.BytesIO()
    weights = {"transformer.wte.weight": Canary(path)}
    torch.save(weights, stream, pickle_module=pickle, _use_new_zipfile_serialization=in_a_zip)
    return stream.getvalue()


def as_torch_once_saved(path):
    return as_torch_saves(path, in_a_zip=False)


@pytest.fixture
def planted(tmp_path, toy_model):
    """planted({file: content}, drop) makes tmp_path/model: the toy model without a file, and with others."""

    def make(files, drop=None):
        folder = tmp_path / "model"
        shutil.copytree(toy_model, folder)
        if drop is not None:
            (folder / drop).unlink()
        for name, content in files.items():
            if isinstance(content, dict):
                before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
                content = json.dumps(before | content).encode()
            (folder / name).write_bytes(content)
        return folder

    return make


def test_the_canary_sings(tmp_path):
    for number, dump in enumerate((as_torch_saves, as_torch_once_saved)):
        path = tmp_path / str(number)
        content = dump(path)
        torch.load(io.BytesIO(content), weights_only=False)
        assert path.exists()


def commands(model, folder, toy_texts):
    settings = folder / "deepspeed.json"
    settings.write_text(json.dumps({"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}))
    return {
        "train": [
            *("train", f"--deepspeed-config={settings}", f"--model.path={model}", f"--data.train={toy_texts[0]}"),
            *(f"--data.valid={toy_texts[1]}", "--data.context-length=32", f"--run.dir={folder / 'run'}"),
            "--run.max-steps=1",
        ],
        "generate": ["generate", f"--model={model}", "--prompt=Python", "--max-new-tokens=1"],
        "evaluate": [
            *("evaluate", f"--model={model}", "--task=text", f"--data={toy_texts[1]}", "--context-length=32"),
            f"--output={folder / 'evaluation'}",
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "config.json", "optimizer.pt"])
def test_a_model_folder_runs_no_code_in_any_command(command, file, planted, tmp_path, toy_texts):
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\n".encode()
    names_code = {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    if file == "config.json":
        model = planted({"code.py": code, file: names_code})
    elif file == "optimizer.pt":  # a sound model, with what a Trainer leaves beside it
        names = (file, "scheduler.pt", "rng_state.pth", "training_args.bin", "global_step1.pkl", "tokenizer.pkl")
        model = planted(dict.fromkeys(names, as_torch_once_saved(canary)))
    else:
        model = planted({file: as_torch_saves(canary)}, drop="model.safetensors")
    done = start(commands(model, tmp_path, toy_texts)[command], tmp_path).wait()
    said = done.out + done.err
    assert done.code == (0 if file == "optimizer.pt" else 3), said
    assert "Traceback" not in said
    assert not canary.exists()


@pytest.mark.parametrize("dump", [as_torch_saves, as_torch_once_saved])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_among_weights_is_not_run(dump, file, planted, tmp_path):
    model = planted({file: dump(tmp_path / "canary")}, drop="model.safetensors")
    with pytest.raises(DataError, match=re.escape(str(model))) as error:
        pretrained.load_language_model(str(model))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "canary").exists()


EVIL = "someone/kernel"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "code.Config"}}, "auto_map"),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "a/b--code.Model"}}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.T", None]}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": ["code.T", None]}, "auto_map"),
        (
            "config.json",
            {"keypoint_detector_config": {"trust_remote_code": True}},
            "trust_remote_code",
        ),  # CVE-2026-5241
        ("config.json", {"_attn_implementation_internal": EVIL}, "_attn_implementation_internal"),  # CVE-2026-4372
        ("config.json", {"_attn_implementation": EVIL}, "_attn_implementation"),
        ("config.json", {"_attn_implementation": {"": EVIL}}, "_attn_implementation"),
        ("config.json", {"attn_implementation": EVIL}, "attn_implementation"),
        ("config.json", {"attn_implementation": {"text_config": EVIL}}, "attn_implementation"),
        ("config.json", {"sub": [{"_attn_implementation_internal": EVIL}]}, "_attn_implementation_internal"),
        ("config.json", {"_experts_implementation_internal": EVIL}, "_experts_implementation_internal"),
        ("adapter_config.json", {"base_model_name_or_path": "someone/model"}, "base model may be any path"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../other/model.safetensors"}}, r"\.\./other"),
        ("pytorch_model.bin.index.json", {"weight_map": {"a": "/other/pytorch_model.bin"}}, "/other"),
        ("model.safetensors.index.json", {"weight_map": {"a": ["model.safetensors"]}}, "not a file in the same folder"),
    ],
)
def test_a_file_that_asks_for_more_than_weights_is_refused_by_name(file, content, says, planted):
    model = planted({file: content})
    for load in (pretrained.load_language_model, load_tokenizer):
        with pytest.raises(DataError, match=f"is {model}; its {file} .*{says}"):
            load(str(model))
    if file == "config.json":
        with pytest.raises(DataError, match=f"^--model.from-scratch is {model / file}; its {file} .*{says}"):
            pretrained.create_language_model(str(model / file), seed=0)


@pytest.mark.parametrize(
    "harmless",
    [
        {"auto_map": {}},
        {"trust_remote_code": False},
        {"_attn_implementation_autoset": True},
        {"_attn_implementation": None},
        {"attn_implementation": "sdpa"},
    ],
)
def test_what_transformers_itself_writes_is_not_refused(harmless, planted, toy_model):
    folder = planted({"config.json": harmless})
    require_safe_files("model.path", folder)
    assert load_tokenizer(str(folder)).sha256 == load_tokenizer(str(toy_model)).sha256


def test_a_model_of_the_hub_is_looked_at_too(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2", "_attn_implementation_internal": EVIL}))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for load in (pretrained.load_language_model, load_tokenizer):
        with pytest.raises(DataError, match=r"is someone/model; its config\.json has _attn_implementation_internal"):
            load("someone/model")


def test_a_tokenizer_reads_no_file_elsewhere(planted, tmp_path):
    """transformers once opened whatever path tokenizer_config.json gave for a vocabulary."""
    folder = planted({})
    state = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = tmp_path / "gpt2"
    vocabulary.mkdir()
    (vocabulary / "vocab.json").write_text(json.dumps(state["vocab"]))
    (vocabulary / "merges.txt").write_text("\n".join(" ".join(pair) for pair in state["merges"]))
    sound = load_tokenizer(vocabulary)
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps({token: 511 - index for token, index in state["vocab"].items()}))
    paths = {"vocab_file": str(elsewhere), "tokenizer_file": str(elsewhere), "tokenizer_class": "GPT2Tokenizer"}
    (vocabulary / "tokenizer_config.json").write_text(json.dumps(paths))
    assert load_tokenizer(vocabulary).encode("Python is") == sound.encode("Python is")


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(template, planted, tmp_path):
    model = planted({"chat_template.jinja": template.replace("CANARY", str(tmp_path / "canary")).encode()})
    with pytest.raises(DataError, match="chat template refuses"):
        load_tokenizer(model).apply_chat_template([{"role": "user", "content": "hi"}])
    assert not (tmp_path / "canary").exists()


def plant_checkpoint(folder, shard):
    """Return a checkpoint with an arbitrary shard and a matching manifest."""
    folder.mkdir(parents=True)
    name = "rank-00000.safetensors"
    (folder / name).write_bytes(shard)
    manifest = {
        "format": manifest_module.FORMAT,
        "state": {"step": 1},
        "identity": {"global_batch_size": 4},
        "shapes": {},
        "files": {name: {"bytes": len(shard), "sha256": sha256(shard).hexdigest()}},
    }
    (folder / manifest_module.MANIFEST).write_text(manifest_module.manifest_text(manifest))
    return manifest


def test_a_pickle_that_a_manifest_vouches_for_is_not_run(tmp_path):
    folder = manifest_module.folder_of(tmp_path, 1)
    manifest = plant_checkpoint(folder, as_torch_saves(tmp_path / "canary"))
    manifest_module.verify(folder)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is not"):
        CheckpointReader(folder, manifest)
    assert not (tmp_path / "canary").exists()


@pytest.mark.slow
def test_training_runs_nothing_that_lies_among_its_checkpoints(toy_model, tmp_path, toy_texts):
    """In the layouts of DeepSpeed and the Trainer, which megaft does not read, and in megaft's own."""
    canary, checkpoints = tmp_path / "canary", tmp_path / "run" / "checkpoints"
    plant_checkpoint(manifest_module.folder_of(tmp_path / "run", 1), b"not the pickle")
    for name in ("global_step1/mp_rank_00_model_states.pt", "checkpoint-1/optimizer.pt", "step-00000001/x.pkl"):
        (checkpoints / name).parent.mkdir(exist_ok=True)
        (checkpoints / name).write_bytes(as_torch_saves(canary))
    (checkpoints / "latest").write_text("global_step1")
    (checkpoints / "step-00000001" / "rank-00000.safetensors").write_bytes(as_torch_once_saved(canary))
    done = start(commands(toy_model, tmp_path, toy_texts)["train"], tmp_path).wait()
    assert done.code == 4, done
    assert "Traceback" not in done.err
    assert not canary.exists()


@pytest.mark.parametrize("pointer", ["../../elsewhere/step-00000001", "/elsewhere", "step-00000001/../../x", "\0"])
def test_latest_leads_nowhere_else(pointer, tmp_path, capsys):
    plant_checkpoint(tmp_path / "elsewhere" / "step-00000001", b"x")
    folder = manifest_module.folder_of(tmp_path / "run", 1)
    plant_checkpoint(folder, b"x")
    (folder.parent / "latest").write_text(pointer.replace("/elsewhere", str(tmp_path / "elsewhere")))
    assert resume.find(tmp_path / "run").folder == folder
    assert "latest is not used" in capsys.readouterr().out


@pytest.mark.parametrize(
    "linked", ["step-00000001", "step-00000001/manifest.json", "step-00000001/rank-00000.safetensors"]
)
def test_a_link_out_of_the_checkpoints_is_refused(linked, tmp_path):
    real = tmp_path / "elsewhere" / "step-00000001"
    plant_checkpoint(real, b"x")
    checkpoints = tmp_path / "run" / "checkpoints"
    if "/" in linked:
        shutil.copytree(real, checkpoints / "step-00000001")
        (checkpoints / linked).unlink()
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / linked).symlink_to(real.parent / linked)
    with pytest.raises(CheckpointError):
        manifest_module.verify(checkpoints / "step-00000001")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/models/a.gguf is damaged", "a.gguf is damaged"),
        ("open '/srv/a/b.txt', (/srv/c): 0.7,/srv/d", "open 'b.txt', (c): 0.7,d"),
        ("--model.path=/srv/models/a", "--model.path=a"),
        (f"{Path.home()}/My Texts/a.txt", "My Texts/a.txt"),
        ("someone/model, ./runs/a, ../b/c, ~/d/e, 1/2", "someone/model, ./runs/a, ../b/c, ~/d/e, 1/2"),
        ("https://host/path/a and s3://bucket/a", "https://host/path/a and s3://bucket/a"),
    ],
)
def test_folders_are_left_out(text, expected):
    assert without_folders(text) == expected


def test_secrets_are_redacted(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "canary-0123456789")
    monkeypatch.setenv("SHORT_TOKEN", "adamw")
    assert without_secrets("--x=canary-0123456789") == "--x=***"
    assert without_secrets("https://me:word@host/path@2") == "https://***@host/path@2"
    assert without_secrets("--data.tokenizer=gpt2 --optim.name=adamw") == "--data.tokenizer=gpt2 --optim.name=adamw"
    said = settings_error(["--run.dir"], {"--run.dir": Path("/x/canary-0123456789")})
    assert str(said).startswith("--run.dir is /x/*** here")
    settings = {"a": [Path("/x/canary-0123456789"), ("s3://k:s@b", 1)], "b": None, "c": 0.5}
    assert redacted(settings) == {"a": ["/x/***", ["s3://***@b", 1]], "b": None, "c": 0.5}


SECRETS = {
    "WANDB_API_KEY": "CANARY" + "0" * 34,
    "HF_TOKEN": "hf_CANARY1",
    "HUGGING_FACE_HUB_TOKEN": "hf_CANARY2",
    "AWS_SECRET_ACCESS_KEY": "CANARY-aws",
    "DB_PASSWORD": "CANARY-word",
    "STORAGE_TOKEN": "CANARY-storage",
    "SOMEWHERE": "https://me:CANARY-url@somewhere/",
}
MARKUP = "<img src=x onerror=alert(1)>"


@pytest.mark.slow
def test_no_secret_is_in_any_file_and_a_name_is_no_markup(toy_model, toy_texts, tmp_path):
    """Secrets in the environment, one of which is also in a path of the command line."""
    model = tmp_path / SECRETS["STORAGE_TOKEN"] / MARKUP
    shutil.copytree(toy_model, model)
    flags = commands(model, tmp_path, toy_texts)
    environment = SECRETS | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    train = [*flags["train"], "--metrics.wandb", "--metrics.tensorboard"]
    for command in (train, flags["evaluate"]):
        done = start(command, tmp_path, environment).wait()
        assert done.code == 0, done
    files = [path for name in ("run", "evaluation") for path in (tmp_path / name).rglob("*") if path.is_file()]
    kinds = {path.name if path.suffix in (".json", ".html", ".md") else path.suffix for path in files}
    assert {"config.json", "README.md", ".wandb", "results.json", "report.html", "report.md", ".safetensors"} <= kinds
    assert any("tfevents" in path.name for path in files)
    assert [path for path in files if b"CANARY" in path.read_bytes()] == []
    html = (tmp_path / "evaluation" / "report.html").read_text()
    assert "&lt;img" in html
    assert "<img" not in html
    assert re.search(r'<meta http-equiv="Content-Security-Policy" content="default-src \'none\';', html)
    assert not re.search(r"\b(src|href)=\"|url\(|@import", html)


class Unopened:
    def __init__(self, *arguments):
        raise KeyError("login")


class Broken:
    def __init__(self, *arguments):
        pass

    def log(self, step, numbers):
        raise OSError("network is gone")


def break_trackers():
    trackers.WandbTracker, trackers.TensorBoardTracker = Unopened, Broken


@pytest.mark.slow
def test_training_goes_on_without_its_trackers(toy_model, toy_texts, tmp_path):
    command = [*commands(toy_model, tmp_path, toy_texts)["train"], "--metrics.wandb", "--metrics.tensorboard"]
    done = start(command, tmp_path, before=break_trackers).wait()
    assert done.code == 0, done
    assert re.search("wandb failed and is switched off.*login", done.err)
    assert re.search("tensorboard failed and is switched off.*network is gone", done.err)
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()

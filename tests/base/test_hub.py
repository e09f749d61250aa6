"""Names of models that are no folder: found in the hub's cache, or refused within seconds by one line."""

import re
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from megaft.base import hub
from megaft.base.errors import DataError
from megaft.base.hub import connection_error, find_file, find_file_if_any
from megaft.base.untrusted import require_safe_files
from megaft.data.tokenizer import load_tokenizer
from megaft.weights.loading.pretrained import load_language_model

SECONDS = 10  # a single file's retries of huggingface_hub take 23
COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache: of one model, with one file."""
    snapshot = tmp_path / f"models--someone--tiny/snapshots/{COMMIT}"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--someone--tiny/refs").mkdir()
    (tmp_path / "models--someone--tiny/refs/main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    connection_error.cache_clear()
    return tmp_path


@pytest.fixture
def ask_at(cache, monkeypatch):
    """ask_at(endpoint) lets the hub be there, and be asked."""

    def change(endpoint):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)

    return change


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class NoSuchModel(BaseHTTPRequestHandler):
    """Answers as the hub does for a model that it does not have."""

    def do_HEAD(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def empty_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), NoSuchModel)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


WAYS = {
    "a tokenizer": load_tokenizer,
    "a model": load_language_model,
    "before code is looked for": lambda name: require_safe_files("model", name),
}


@pytest.mark.parametrize("load", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", ["gpt2x", "nosuch/thing"])
def test_a_misspelled_name_ends_within_seconds_where_the_hub_is_out_of_reach(ask_at, load, name, capfd):
    ask_at(f"http://127.0.0.1:{closed_port()}")
    begin = time.monotonic()
    with pytest.raises(DataError, match=rf"^{name} .* hub .*Connection refused"):
        load(name)
    assert time.monotonic() - begin < SECONDS
    assert capfd.readouterr() == ("", "")  # no line of retries


def test_what_is_cached_is_used_where_the_hub_is_out_of_reach(ask_at, cache):
    ask_at(f"http://127.0.0.1:{closed_port()}")
    begin = time.monotonic()
    assert find_file("someone/tiny", "config.json") == cache / f"models--someone--tiny/snapshots/{COMMIT}/config.json"
    assert find_file_if_any("someone/tiny", "tokenizer.json") is None
    assert time.monotonic() - begin < SECONDS


def test_a_name_that_the_hub_does_not_have(ask_at, empty_hub):
    ask_at(empty_hub)
    with pytest.raises(DataError, match=r"^gpt2x .*no such model"):
        load_tokenizer("gpt2x")


def test_a_name_that_may_not_be_looked_up(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "connection_error", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(DataError, match=rf"^gpt2x .* in {re.escape(str(cache))}, and HF_HUB_OFFLINE"):
        load_tokenizer("gpt2x")
    assert find_file("someone/tiny", "config.json")


def test_a_folder_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "connection_error", lambda *_: pytest.fail("the hub was asked"))
    assert find_file(tmp_path, "config.json") is None


def test_a_server_that_never_answers_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        assert "timed out" in connection_error(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2)
        assert time.monotonic() - begin < SECONDS


def test_any_answer_is_an_answer(empty_hub):
    assert connection_error(empty_hub, 5) is None


def test_an_endpoint_that_is_no_address_is_named_at_once():
    assert connection_error("huggingface", 5) == "unknown url type: 'huggingface'"

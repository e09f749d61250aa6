"""Files of a model or tokenizer, from a folder or from the Hugging Face hub and its cache."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from functools import cache
from http.client import HTTPException
from pathlib import Path
from threading import Thread

from megaft.base.errors import DataError

SPELLING_HINT = "Check the spelling, or give a local path"


def find_file(source: str | Path, name: str) -> Path | None:
    """Return the path of a file of a model's folder or hub repository; None if it is absent, or the hub unreachable.

    Args:
        source: A folder or a hub name.
        name: Name of the file, such as config.json.

    Raises:
        DataError: `source` is neither a folder nor a repository that the hub or its cache has.
        OSError: `source` is not a valid model name; the message is transformers'.
    """
    from huggingface_hub.errors import RepositoryNotFoundError
    from transformers.utils import cached_file

    if not Path(source).exists():
        _require_known(str(source))
    silenced = ("gated_repo", "missing_entries", "connection_errors")
    try:
        path = cached_file(str(source), name, **{f"_raise_exceptions_for_{kind}": False for kind in silenced})
    except OSError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise DataError(
                f"{source} is not a folder here, and the hub has no such model, or this account may not read it. "
                f"{SPELLING_HINT}; for a private model log in with `hf auth login`."
            ) from error
        raise
    return None if path is None else Path(path)


def find_file_if_any(source: str | Path, name: str) -> Path | None:
    """Like `find_file`, but return None for an invalid model name, which loading reports.

    Raises:
        DataError: As `find_file`.
    """
    try:
        return find_file(source, name)
    except OSError:
        return None


def _require_known(name: str) -> None:
    """Refuse a hub name that is not in the cache while the hub cannot be reached.

    huggingface_hub retries each file of a model for half a minute. To report a misspelled name within seconds, try the
    hub once; if it does not answer, continue as with HF_HUB_OFFLINE=1.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return  # transformers reports the rule for names
    is_offline = constants.is_offline_mode()
    failure = None if is_offline else connection_error(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)
    if failure:
        constants.HF_HUB_OFFLINE = True
    if (failure or is_offline) and not _is_cached(name):
        reason = f"the hub cannot be reached ({constants.ENDPOINT}: {failure})"
        if is_offline:
            reason = "HF_HUB_OFFLINE is set, so the hub is not asked"
        raise DataError(
            f"{name} is neither a folder here nor in {constants.HF_HUB_CACHE}, and {reason}. {SPELLING_HINT}; or "
            "download it into this cache on a machine with a network."
        )


def _is_cached(name: str) -> bool:
    """Return True if the hub's cache has files of a model."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    return any(folder.glob("snapshots/*/*"))


@cache
def connection_error(endpoint: str, timeout: float) -> str | None:
    """Return the reason why a server cannot be reached; None if it answers, with any HTTP status.

    The environment's proxies apply, as for huggingface_hub. The DNS lookup has no timeout of its own, and a host's
    addresses are tried in turn, so both together get twice the timeout of one request.

    Args:
        endpoint: URL of the server.
        timeout: Seconds for a request: HF_HUB_ETAG_TIMEOUT, by default 10.
    """
    failures: list[str | None] = []
    request = Thread(target=lambda: failures.append(_request_error(endpoint, timeout)), daemon=True)
    request.start()
    request.join(2 * timeout)
    return failures[0] if failures else f"no answer within {2 * timeout:g} seconds"


def _request_error(endpoint: str, timeout: float) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout).close()
    except (urllib.error.HTTPError, HTTPException):
        return None  # the server answered
    except (OSError, ValueError) as error:  # ValueError: HF_ENDPOINT is not a URL
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return None  # huggingface_hub has its own certificates
        return str(getattr(reason, "strerror", None) or reason)
    return None

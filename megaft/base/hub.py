"""Files of a model or tokenizer: in its folder, or in the cache of the Hugging Face hub."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from functools import cache
from http.client import HTTPException
from pathlib import Path
from threading import Thread

from megaft.base.errors import DataError

CHECK = "Check the spelling, or give a local path"


def find_file(source: str | Path, name: str) -> Path | None:
    """Return the path of a file of a model's folder or hub repository; None if there is none or no hub can be asked.

    Args:
        source: A folder or a hub name.
        name: The file's, such as config.json.

    Raises:
        DataError: It is no folder, and no repository that the hub or its cache has.
        OSError: `source` is not a valid model name; the message is transformers'.
    """
    from huggingface_hub.errors import RepositoryNotFoundError
    from transformers.utils import cached_file

    if not Path(source).exists():
        _require_known(str(source))
    silenced = ("gated_repo", "missing_entries", "connection_errors")
    try:
        found = cached_file(str(source), name, **{f"_raise_exceptions_for_{what}": False for what in silenced})
    except OSError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise DataError(
                f"{source} is no folder here, and the hub has no such model, or none that this account may read. "
                f"{CHECK}; for a private model log in with `hf auth login`."
            ) from error
        raise
    return None if found is None else Path(found)


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
    """Refuse a hub name that is not in the cache where the hub cannot be asked.

    huggingface_hub retries each file of a model for half a minute. So that a misspelt name ends within seconds, the hub
    is tried once, and the process goes on as with HF_HUB_OFFLINE=1 where it does not answer.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return  # transformers says what a name may have
    is_offline = constants.is_offline_mode()
    failure = None if is_offline else failure_of(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)
    if failure:
        constants.HF_HUB_OFFLINE = True
    if (failure or is_offline) and not _is_cached(name):
        reason = f"the hub cannot be reached ({constants.ENDPOINT}: {failure})"
        if is_offline:
            reason = "HF_HUB_OFFLINE keeps it from being looked up on the hub"
        raise DataError(
            f"{name} is no folder here nor in {constants.HF_HUB_CACHE}, and {reason}. {CHECK}; or download it where "
            "there is a network, and then set HF_HUB_OFFLINE=1."
        )


def _is_cached(name: str) -> bool:
    """Return whether the hub's cache has files of a model."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    return any(folder.glob("snapshots/*/*"))


@cache
def failure_of(endpoint: str, timeout: float) -> str | None:
    """Return why a server cannot be reached; None where it answers, with whatever status.

    Proxies are those of the environment, as for huggingface_hub. Looking up a host has no time-out of its own, and
    several addresses are tried in turn, so that both together get twice the time of one request.

    Args:
        endpoint: Its address.
        timeout: Seconds for a request: HF_HUB_ETAG_TIMEOUT, by default 10.
    """
    failures: list[str | None] = []
    asking = Thread(target=lambda: failures.append(_ask(endpoint, timeout)), daemon=True)
    asking.start()
    asking.join(2 * timeout)
    return failures[0] if failures else f"no answer within {2 * timeout:g} seconds"


def _ask(endpoint: str, timeout: float) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout).close()
    except (urllib.error.HTTPError, HTTPException):
        return None  # an answer
    except (OSError, ValueError) as error:  # ValueError: an HF_ENDPOINT that is no address
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return None  # huggingface_hub brings certificates of its own
        return str(getattr(reason, "strerror", None) or reason)
    return None

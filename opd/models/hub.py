"""Models of the hub: what ``NAME`` or ``NAME@REVISION`` means, downloaded or from its cache.

A model is made a folder first and then loaded like any other, so that there is one place that talks
to the network, and one that says why it could not.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from opd.errors import UserError

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds for the hub to answer at all
FILES = ["*.json", "*.jinja", "*.txt", "*.py", "*.model", "*.tiktoken"]
WEIGHTS = ["*.safetensors"]
# Other formats of the same weights lie in subfolders, or under the name that Mistral gives them
NOT_WANTED = ["*/*.safetensors", "consolidated*.safetensors"]
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def fetch(source: str, *, weights: bool) -> str:
    """Return the folder of a hub model, downloading what is not in the cache.

    Args:
        source: Hub id, or hub id and revision (branch, tag or commit) with an @ between.
        weights: Whether its weights are needed.

    Raises:
        UserError: There is no such model or revision, it is not ours to read, or neither the hub
            nor a whole copy can be reached.
    """
    name, at, revision = source.partition("@")
    if at and not revision:
        raise UserError(f"{source}: names no revision after the @")
    with _explained(source, name, revision):
        silent = unreachable(name, revision or None)
        try:
            return snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[*FILES, *(WEIGHTS if weights else [])],
                ignore_patterns=NOT_WANTED,
                local_files_only=silent is not None,
            )
        except LocalEntryNotFoundError as error:
            reason = silent or f"the hub failed ({_one_line(error)})"
            raise UserError(
                f"{source}: is no folder or file here, {reason}, and there is no whole copy of it "
                "in the hub's cache; name a folder, or see to it that the hub can be reached"
            ) from error


@functools.cache  # a process waits once
def unreachable(name: str, revision: str | None, kind: str = "model") -> str | None:
    """Ask the hub for a model or ``dataset``, not for long; say why it does not answer, else None.

    Where it does not, a line says that its cache is tried.
    """
    try:
        HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=PATIENCE)
    except (HfHubHTTPError, HFValidationError):
        return None  # an answer; perhaps there is a copy in the cache all the same
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # of whatever library the hub's client is made with
        log.warning("the hub cannot be reached for %s: trying its cache", name)
        return f"the hub cannot be reached ({_one_line(error)})"
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _explained(source: str, name: str, revision: str) -> Iterator[None]:
    """Say in one line what the hub has against a model."""
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{source}: is gated; ask for access on its page of the hub, and {LOG_IN}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{source}: {name} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{source}: is no folder or file here, and no model of the hub that you can read; "
            f"check the name, and if it is private {LOG_IN}"
        ) from error
    except HFValidationError as error:
        raise UserError(
            f"{source}: is no folder or file here, and no hub id ({_one_line(error)})"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"{source}: the hub refuses ({_one_line(error)}); {LOG_IN}") from error

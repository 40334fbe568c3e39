"""Models and data sets of others, and yours for them: a thin layer over huggingface_hub.

`pull` downloads only the files of a model folder, never code, into the hub's cache: an interrupted download leaves
nothing half-written. Pin a revision with `owner/name@revision`.
"""

from __future__ import annotations

import re
from pathlib import Path

MODEL_FILES = ["config.json", "tokenizer.json", "model.safetensors", "README.md"]
PICKLED = "pytorch_model.bin"

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(?:@[\w./-]+)?", re.ASCII)


class HubError(Exception):
    """The hub could not serve. The message is one sentence for a person."""


def is_repository(name: str) -> bool:
    """Whether `name` is written like a hub repository, `owner/name` or `owner/name@revision`."""
    return _REPOSITORY.fullmatch(name) is not None


def pull(name: str) -> Path:
    """Download the model `owner/name[@revision]` (or find it in the cache); returns its folder. Raises HubError."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = name.partition("@")
    try:
        # Asking what there is fails at once without a network, where a download would try for half a minute.
        found = HfApi().model_info(repository, revision=revision or None, timeout=20)
        files = {file.rfilename for file in found.siblings or []}
        wanted = MODEL_FILES if "model.safetensors" in files else [*MODEL_FILES, PICKLED]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except HFValidationError:
        raise HubError(f"'{name}' is no name that a model on the hub can have.") from None
    except RevisionNotFoundError:
        raise HubError(f"The model '{repository}' has no revision '{revision}'.") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"The hub has no model '{repository}', or it is private (then log in with 'hf auth login')."
        ) from None
    except Exception as error:  # which one a lost network raises depends on the client's HTTP library
        if folder := _cached(repository, revision or None):
            return folder
        raise HubError(
            f"Could not download '{name}': {type(error).__name__}. Check the network and try again."
        ) from None


def _cached(repository: str, revision: str | None) -> Path | None:
    """What an earlier download left, if it is whole."""
    from huggingface_hub import snapshot_download

    for weights in ("model.safetensors", PICKLED):
        wanted = ["config.json", "tokenizer.json", weights]
        try:
            folder = Path(
                snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=True)
            )
        except OSError:  # not there, or not all of it
            continue
        if all((folder / file).is_file() for file in wanted):
            return folder
    return None


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a model folder as the model `owner/name`; returns its address. Raises HubError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=MODEL_FILES, commit_message="A fish")
    except LocalTokenNotFoundError:
        raise HubError("You are not logged in to the hub; run 'hf auth login' first.") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise HubError(f"Could not upload to '{repository}': {error}") from None
    return f"{api.endpoint}/{repository}"

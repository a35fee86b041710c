"""Artifacts on the Hugging Face hub: one checked file and a model card in a repository each."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreamreader import _checked
from dreamreader._version import __version__
from dreamreader.artifacts.file import FILE
from dreamreader.artifacts.kinds import Artifact, load, save
from dreamreader.errors import InvalidInput, first_line

CARD = "README.md"
CONNECT_SECONDS = 3.0


def push_to_hub(
    thing: Artifact,
    repo_id: str,
    *,
    base_model: str | None = None,
    fingerprint: str | None = None,
    notes: str = "",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads a thing and its model card in one commit; the repository is made where it is missing.

    Args:
        thing: whatever `save` takes.
        repo_id: `owner/name` on the hub (or on the server that HF_ENDPOINT names).
        base_model: the model that it belongs to, by its name on the hub.
        fingerprint: of that model, for the card.
        notes: Markdown text for the card, such as what it was trained on.
        private: of a new repository; the account's default where None.
        revision: branch; the main one where None.
        token: of the account; the one that is logged in where None.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        InvalidInput: it cannot be saved, or the hub refuses or cannot be reached.

    Example:
        >>> push_to_hub(directions, "me/red-to-blue", base_model="owner/model")  # doctest: +SKIP
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token, library_name="dreamreader", library_version=__version__)
    with tempfile.TemporaryDirectory() as folder, _explain_hub_errors(f"push_to_hub: {repo_id}"):
        file = Path(folder) / FILE
        save(thing, file)
        own = _checked.checksum(file)
        card = model_card(thing, repo_id, own, base_model, fingerprint, notes)
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.create_commit(
            repo_id,
            [CommitOperationAdd(FILE, file), CommitOperationAdd(CARD, card.encode())],
            commit_message=message or f"Upload {thing.artifact_kind}",
            revision=revision,
        )
    return done.commit_url


def from_hub(
    repo_id: str,
    kind: type[Artifact] | None = None,
    *,
    file: str = FILE,
    checksum: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Any:
    """The thing in a repository of the hub; every byte is checked as `load` does.

    Args:
        repo_id: `owner/name` on the hub (or on the server that HF_ENDPOINT names).
        kind: the class that it must be of; any where None.
        file: its name in the repository.
        checksum: that the file must have, as its card names it: then it is that very file.
        revision: branch, tag or commit. token: of an account that may read it.
        cache_dir: where downloads are kept. local_files_only: ask no server, nor where the hub
            cannot be reached or HF_HUB_OFFLINE=1: what was downloaded before is read then.

    Raises:
        InvalidInput: there is no such repository or file, the hub cannot be reached, or the file is
            damaged or another one.
    """
    from huggingface_hub import hf_hub_download

    cut_off = None if local_files_only else _why_unreachable()
    with _explain_hub_errors(f"from_hub: {repo_id}", cut_off):
        path = hf_hub_download(
            repo_id,
            file,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only or cut_off is not None,
            library_name="dreamreader",
            library_version=__version__,
        )
    found = load(path) if kind is None else load(path, kind)
    if checksum is not None and (own := _checked.checksum(path)) != checksum:
        raise InvalidInput(f"from_hub: {file} of {repo_id} has checksum {own}, not {checksum}")
    return found


def model_card(
    thing: Artifact,
    repo_id: str,
    checksum: str,
    base_model: str | None = None,
    fingerprint: str | None = None,
    notes: str = "",
) -> str:
    """The README.md of a repository: what is in it, of which model and sites, and how to load it.

    Args:
        thing: what is uploaded; its `sites` are named where it has some.
        repo_id: of the repository. checksum: of the file.
        base_model, fingerprint, notes: as in `push_to_hub`.
    """
    sites: Sequence[str] = getattr(thing, "sites", ())
    facts = {
        "kind": thing.artifact_kind,
        "class": f"{type(thing).__module__}.{type(thing).__qualname__}",
        "base model": base_model or "not given",
        "fingerprint of the base model": fingerprint or "not given",
        "sites": ", ".join(f"`{each}`" for each in sites) or "none",
        "SHA-256 of the file": f"`{checksum}`",
        "written by": f"dreamreader {__version__}",
    }
    head = ["library_name: dreamreader", "tags:", "- dreamreader", f"- {thing.artifact_kind}"]
    head += [f"base_model: {json.dumps(base_model)}"] if base_model else []
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    call = f'thing = dreamreader.from_hub("{repo_id}")'
    body = [f"# {repo_id.rpartition('/')[2]}", "", *lines, "", *([notes, ""] if notes else [])]
    body += ["```python", "import dreamreader", "", call, "```"]
    return "\n".join(["---", *head, "---", "", *body, ""])


def _why_unreachable() -> str | None:
    """Why the hub cannot be asked; None where it answers, whatever it says.

    Its client would try again for half a minute.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except (OSError, HTTPError) as error:
        return f"the hub at {constants.ENDPOINT} cannot be reached ({first_line(error)})"
    return None


@contextmanager
def _explain_hub_errors(what: str, unreachable: str | None = None) -> Iterator[None]:
    """Turns what the hub's client raises into an error that says which repository."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        yield
    except (OSError, HTTPError) as error:
        if unreachable is not None and isinstance(error, LocalEntryNotFoundError):
            raise InvalidInput(
                f"{what}: {unreachable}, and it was not downloaded before. Download the file where "
                "there is a network, and read it here with dreamreader.load_artifact(path)"
            ) from error
        raise InvalidInput(
            f"{what}: {first_line(error)}; check the name, the token and the network"
        ) from error
    except ValueError as error:  # a name or revision that cannot be one
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{what}: {first_line(error)}") from error

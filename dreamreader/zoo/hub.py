"""Files of the model hub and of its local cache, and why one could not be had."""

from collections.abc import Iterator
from pathlib import Path

from dreamreader.errors import InvalidInput, first_line


def hub_file(repo: str, name: str) -> Path | None:
    """A small file of a hub repository, from the cache or downloaded; None where it has none.

    Raises:
        InvalidInput: the hub has no such repository, does not give it, or could not be reached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if (path := cached_file(repo, name)) is not None:
        return path
    try:
        # Asked once: without a network, the download asks six times in half a minute.
        get_hf_file_metadata(hf_hub_url(repo, name))
        return Path(hf_hub_download(repo, name))
    except LocalEntryNotFoundError as error:  # of the class below too, but nothing was asked
        raise InvalidInput(failure(repo, error)) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # whatever the hub's client and its transport raise
        raise InvalidInput(failure(repo, error)) from error


def cached_file(repo: str, name: str) -> Path | None:
    """The file of the local cache, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, name)
    return Path(path) if isinstance(path, str) else None


def failure(repo: str, error: BaseException) -> str:
    """Why a repository could not be had: unknown, closed, or the hub not reached.

    Args:
        repo: the hub id. error: of the hub's client, or of a library that used it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    chain = list(_causes(error))

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if any_of(GatedRepoError):
        return (
            f"{repo}: the hub gives it only to those who accepted its terms; do so at "
            f"{hub}/{repo} and log in with `hf auth login`"
        )
    if any_of(RepositoryNotFoundError):
        return (
            f"unknown model {repo!r}: the hub ({hub}) has no such id, or it is private (`hf auth "
            "login`)"
        )
    missing = f"{repo}: not whole in the local cache ({cache}), and the hub"
    if any_of(OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return f"{missing} is switched off by HF_HUB_OFFLINE"
    if any_of(LocalEntryNotFoundError, ConnectionError, TimeoutError) or any(map(_of_http, chain)):
        reason = next((each for each in reversed(chain) if str(each)), error)
        return f"{missing} ({hub}) could not be reached: {first_line(reason)} (no network?)"
    return f"{repo}: {first_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those from which it came."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _of_http(error: BaseException) -> bool:
    """Whether a transport raised it: which one depends on the version of the hub's client."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests")

"""What the hub says of a repository without sending its files: its commit, and their sizes and hashes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.run import downloads, fetched, hub
from stages.lib.run.artifact import Artifact
from stages.lib.run.exits import BadData

GIT = 40  # hex digits of its hashes


@dataclass(frozen=True)
class Listing:
    """A repository at a commit: bytes of each file that is wanted, and its sha256 or git's name for it."""

    repository: str
    what: str
    commit: str
    sizes: dict[str, int]
    hashes: dict[str, str]

    def check_access(self) -> None:
        """Ask for the head of a file: a gate may stand before the files and not before their list.

        Raises:
            NoPermission: there is one.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        for name in list(self.sizes)[:1]:
            with hub.explained(self.repository, self.commit):
                of = hub.kind(self.what)
                get_hf_file_metadata(
                    hf_hub_url(self.repository, name, revision=self.commit, repo_type=of)
                )

    def weights(self) -> int:
        """Bytes of a model's weights.

        Raises:
            BadData: it holds no safetensors.
        """
        size = sum(size for name, size in self.sizes.items() if name.endswith(".safetensors"))
        if not size:
            raise BadData(
                f"{self.repository} has no safetensors weights; convert them with save_pretrained"
            )
        return size

    def missing(self) -> int:
        """Bytes that are not in the hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        def there(name: str) -> bool:
            found = try_to_load_from_cache(
                self.repository, name, revision=self.commit, repo_type=hub.kind(self.what)
            )
            return isinstance(found, str)

        return sum(size for name, size in self.sizes.items() if not there(name))

    def differing(self, made: Artifact) -> list[str]:
        """The files of a fetched copy that are not what the hub has."""
        folder, files = made.path / fetched.FILES, made.manifest["files"]
        found = {name: files[f"{fetched.FILES}/{name}"]["sha256"] for name in self.hashes}
        return [
            name
            for name, known in self.hashes.items()
            if known
            != (downloads.hash_of(folder / name, known) if len(known) == GIT else found[name])
        ]


def cache() -> Path:
    """The folder of what was downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _hash(entry: Any) -> str:
    return str(entry.lfs.sha256 if entry.lfs else entry.blob_id)


def listing(repository: str, revision: str | None, what: str) -> Listing:
    """Ask the hub.

    Args:
        repository, revision, what: as of `hub.snapshot`.

    Raises:
        NoPermission, Missing, TryAgain: as there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects

    with hub.explained(repository, revision):
        api, of = HfApi(), hub.kind(what)
        commit = str(api.repo_info(repository, revision=revision, repo_type=of).sha)
        tree = api.list_repo_tree(repository, recursive=True, revision=commit, repo_type=of)
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    wanted = sorted(filter_repo_objects(files, allow_patterns=hub.FILES[what]))
    sizes = {name: files[name].size for name in wanted}
    hashes = {name: _hash(files[name]) for name in wanted}
    return Listing(repository, what, commit, sizes, hashes)

"""Artifacts from Weights & Biases as local folders: downloaded once, verified, used again without the network.

    folder, used = artifacts.fetch("wandb:wandb/davis/davis2016-val:contest", account)  # a path is returned as it is

Parted from tracking.py, which is left with what a run logs. Fetching starts no run, and works with logging off.
The cache is WANDB_CACHE_DIR/fetched/<server>/<entity>/<project>/<name>/<version>/.
"""
import base64
import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from files import BadInput, read_json, try_lock, write_json
from tracking import ENTRIES, Account, first_line, import_wandb, redact, say


class Reference(NamedTuple):
    """The parts of wandb:<entity>/<project>/<name>:<alias or version>."""

    entity: str
    project: str
    name: str
    version: str  # an alias such as latest, or v0, v1, ...

    def __str__(self):
        return f"{self.entity}/{self.project}/{self.name}:{self.version}"


def fetch(source: str | Path, account: Account) -> tuple[Path, str | None]:
    """Return a local folder for `source`, and the artifact's full name for `Tracker.use`.

    A source that does not start with "wandb:" is a path, returned as it is, with None. An artifact is
    downloaded into a cache by name and version, checked against its manifest, and used again from
    there. A version (`:v3`) that is there needs no network. An alias is looked up; where that fails,
    or the mode is offline, what it last stood for is used, and a line says so.
    Feature and model artifacts come with the file names that our readers expect (see ENTRIES).
    Raises BadInput for a malformed reference, an artifact that is not there or is not what its
    manifest says, and when it is neither in the cache nor to be had.
    """
    if not str(source).startswith("wandb:"):
        return Path(source), None
    wanted = parse_reference(str(source), account)
    home = cache_folder() / wanted.entity / wanted.project / wanted.name
    if re.fullmatch(r"v\d+", wanted.version) and (home / wanted.version).is_dir():
        return home / wanted.version, str(wanted)
    known = read_aliases(home)
    try:
        if account.mode == "offline":
            raise ConnectionError("--wandb offline asks for no network; --wandb disabled fetches without logging")
        artifact = find_artifact(wanted)
    except ConnectionError as error:
        if wanted.version not in known or not (home / known[wanted.version]).is_dir():
            raise BadInput(f"wandb:{wanted}: not in the cache {home}, and not to be had ({redact(first_line(error))})") from None
        say(f"using {known[wanted.version]} of {wanted} from the cache ({first_line(error)})")
        return home / known[wanted.version], str(wanted._replace(version=known[wanted.version]))
    folder = home / artifact.version
    with alone(home):
        if not folder.is_dir():
            download(artifact, str(wanted), folder)
        if wanted.version != artifact.version:
            write_json(home / "aliases.json", {**read_aliases(home), wanted.version: artifact.version})
    return folder, str(wanted._replace(version=artifact.version))


def plain_name(used: str) -> str:
    """Return the name of an artifact without its owner and version: davis2016-val of "wandb/davis/davis2016-val:v3"."""
    return used.rpartition("/")[2].partition(":")[0]


def parse_reference(text: str, account: Account) -> Reference:
    """Return the parts of "wandb:[[<entity>/]<project>/]<name>:<alias or version>".

    The project is the account's where it is left out; so is the entity, or the API key's own, which is asked for.
    """
    parts = re.fullmatch(r"wandb:(?:(?:([\w.-]+)/)?([\w.-]+)/)?([\w.-]+):([\w.-]+)", text)
    if not parts or any(set(part or "x") == {"."} for part in parts.groups()):
        raise BadInput(f"{text}: expected wandb:<entity>/<project>/<name>:<alias or version>, "
                       "such as wandb:wandb/davis/davis2016-val:contest")
    entity, project, name, version = parts.groups()
    return Reference(entity or account.entity or default_entity(account), project or account.project, name, version)


def default_entity(account: Account) -> str:
    """Return the entity of the API key, remembered in the cache for when nobody can be asked."""
    remembered = cache_folder() / "default-entity.json"
    try:
        if account.mode == "offline":
            raise ConnectionError("--wandb offline asks for no network")
        entity = ask(lambda wandb: wandb.Api().default_entity)
    except ConnectionError as error:
        if not remembered.exists():
            raise BadInput(f"the default entity is not known ({redact(first_line(error))}); pass --entity, "
                           "or write wandb:<entity>/<project>/<name>:<alias>") from None
        return read_json(remembered)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    write_json(remembered, entity)
    return entity


def cache_folder() -> Path:
    """Return where fetched artifacts are kept, one folder a server: WANDB_CACHE_DIR, else ~/.cache/wandb."""
    root = Path(os.environ.get("WANDB_CACHE_DIR") or Path.home() / ".cache" / "wandb")
    return root / "fetched" / urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc.replace(":", "_")


def read_aliases(home: Path) -> dict[str, str]:
    """Return {alias: version it last stood for} of an artifact in the cache."""
    return read_json(home / "aliases.json") if (home / "aliases.json").exists() else {}


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """Hold an artifact's place in the cache: of several processes that want it, one downloads and the others wait.

    Raises BadInput when the cache cannot be written.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = open(home.with_name(f".{home.name}.lock"), "a")  # noqa: SIM115  closed below
    except OSError as error:
        raise BadInput(f"{home}: cannot be written ({error.strerror}); set WANDB_CACHE_DIR to a folder that can") from error
    with lock:
        while not try_lock(lock):
            time.sleep(0.2)
        yield


def ask(question):
    """Return question(wandb), with the client's many errors as ConnectionError, or BadInput when the key is missing."""
    wandb = import_wandb("an artifact on Weights & Biases")
    try:
        return question(wandb)
    except Exception as error:
        raise ConnectionError(first_line(error)) from error


def find_artifact(wanted: Reference):
    """Return the artifact from the public API, without starting a run.

    Raises BadInput when the server says that there is none, ConnectionError when it does not say.
    """
    try:
        return ask(lambda wandb: wandb.Api().artifact(str(wanted)))
    except ConnectionError as error:
        if "not found" in str(error):
            raise BadInput(f"wandb:{wanted}: there is no such artifact ({error}); check the name and alias") from None
        raise


def download(artifact, name: str, folder: Path) -> None:
    """Download an artifact to `folder`, whole or not at all, and check every file against the manifest."""
    for path, entry in artifact.manifest.entries.items():
        check_entry(name, str(path), entry)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    say(f"downloading {name} ({artifact.version}, {artifact.size / 1e6:.1f} MB) to {folder}")
    try:
        with own_cache(temporary / "cache"):
            artifact.download(root=str(temporary / "files"))
        for path, entry in artifact.manifest.entries.items():
            check_digest(name, temporary / "files" / str(path), entry)
            if "\\" in str(path):  # written on Windows by an old client
                final = temporary / "files" / str(path).replace("\\", "/")
                final.parent.mkdir(parents=True, exist_ok=True)
                os.rename(temporary / "files" / str(path), final)
        for theirs, ours in ENTRIES.get(artifact.type, {}).items():
            if (temporary / "files" / theirs).is_file():
                os.rename(temporary / "files" / theirs, temporary / "files" / ours)
        os.rename(temporary / "files", folder)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"wandb:{name}: could not be downloaded ({redact(first_line(error))}); try again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_entry(name: str, path: str, entry) -> None:
    """Raise BadInput for a manifest entry that leaves the folder or stands for a file elsewhere."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0].startswith("/") or ":" in parts[0]:
        raise BadInput(f"wandb:{name}: has an entry {path!r}, expected paths inside the artifact; do not use it")
    if entry.ref is not None:
        raise BadInput(f"wandb:{name}: the entry {path!r} refers to {redact(entry.ref)}, expected a stored file; "
                       "fetch it by hand and pass a folder")


def check_digest(name: str, path: Path, entry) -> None:
    """Raise BadInput unless the file has the digest of its manifest entry: MD5, or XXH128 where it says so, in base64."""
    if not path.is_file():
        raise BadInput(f"wandb:{name}: the file {path.name} did not arrive; try again")
    digest: Any
    if entry.extra.get("alg") == "XXH128":
        import xxhash  # comes with wandb
        digest = xxhash.xxh128()
    else:
        digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if base64.b64encode(digest.digest()).decode() != entry.digest:
        raise BadInput(f"wandb:{name}: the file {path.name} is not what the manifest says (digest differs); "
                       "try again, or ask who made it")


@contextlib.contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Give the client an empty cache: its own, by digest, is never checked, and would keep a second copy."""
    before = os.environ.get("WANDB_CACHE_DIR")
    os.environ["WANDB_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_CACHE_DIR"]
        else:
            os.environ["WANDB_CACHE_DIR"] = before

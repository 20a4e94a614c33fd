"""Weights & Biases both ways: inputs that are artifacts there, and runs that log."""
import contextlib
import os
import re
import tempfile
from pathlib import Path

import numpy as np

from vos.cli import complain
from vos.inputs import BadInput, inside

# our file -> its entry in the contest's artifacts
ENTRIES = {"features.npy": "features_array", "masks.npy": "masks", "model.pt": "final_model"}


def plain(message) -> str:
    """Return a message as one line, without the passwords of the addresses in it."""
    return re.sub(r"://[^/\s]+@", "://***@", " ".join(str(message).split()))


def fetch(source: str, mode: str) -> tuple[Path, str]:
    """Return the folder and full name, entity/project/name:vN, of an artifact. Raises BadInput."""
    parts = source.removeprefix("wandb:").split("/")
    own = [os.environ.get("WANDB_ENTITY") or "_", os.environ.get("WANDB_PROJECT") or "davis"]
    wanted = "/".join([*own[:max(3 - len(parts), 0)], *parts])  # _: the API key's own entity
    if not re.fullmatch(r"([\w-][\w.-]*/){2}[\w-][\w.-]*:[\w-][\w.-]*", wanted):  # nor ".."
        raise BadInput(f"{source}: expected wandb:<entity>/<project>/<name>:<alias or version>")

    if cached(wanted).is_dir():  # a version, which never changes
        return cached(wanted), wanted
    try:
        if mode == "offline":
            raise ConnectionError("--wandb offline asks no server; name a version, as in :v3")
        used = download(wanted.removeprefix("_/"))
    except Exception as error:  # the client raises its own, requests' and plain ones alike
        raise BadInput(f"{source}: not in the cache {cached(wanted).parent} (WANDB_CACHE_DIR), "
                       f"and not to be had ({plain(error)})") from error
    return cached(used), used


def cached(name: str) -> Path:
    """Return the place of entity/project/name:version in the cache, whose folders are servers."""
    root = os.environ.get("WANDB_CACHE_DIR") or Path.home() / ".cache" / "wandb"
    server = (os.environ.get("WANDB_BASE_URL") or "api.wandb.ai").rpartition("@")[2]
    return Path(root, "fetched", re.sub(r"[^\w.-]+", "_", server), name.replace(":", "/"))


def download(wanted: str) -> str:
    """Have an artifact, verified and whole, in the cache, and return its full name."""
    import wandb
    artifact = wandb.Api().artifact(wanted)
    used = f"{artifact.entity}/{artifact.project}/{artifact.name.split(':')[0]}:{artifact.version}"
    folder, entries = cached(used), artifact.manifest.entries
    for path, entry in entries.items():
        inside(folder, entry.ref or path, listed_in=Path(used))  # a reference, a URL, is not
    if folder.is_dir():
        return used

    complain(f"downloading {used} ({artifact.size / 1e6:.1f} MB) to {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        files = Path(artifact.download(f"{temporary}/files", skip_cache=True))
        artifact.verify(str(files))
        for name, entry in ENTRIES.items():
            if entry in entries:
                (files / entry).rename(files / name)
        if not folder.is_dir():  # another process may have been faster
            files.rename(folder)
    return used


class Run(contextlib.AbstractContextManager):
    """A run that logs, in a `with` block. A failure of `client`, a wandb.Run, stops nothing."""

    def __init__(self, client):
        self.client, self.folder = client, client.settings.sync_dir

    def __exit__(self, kind, error, trace):
        """Say how to upload what will be missing, and wait for the uploads."""
        complain(f"the run is at {plain(self.client.url or self.folder)}; to upload what is "
                 f"missing there: wandb sync --include-online {self.folder}")
        with self.going_on("the end"):
            self.client.unwatch()
            self.client.finish(exit_code=int(kind is not None))

    @contextlib.contextmanager
    def going_on(self, what: str):
        """Turn a failure of the client into a warning."""
        try:
            yield
        except Exception as error:
            complain(f"{what} could not be logged ({plain(error)}); if `wandb sync` does not "
                     "bring it, give the command again with --wandb offline")

    def log(self, row: dict, step: int) -> None:
        """Log numbers and strings at `step`, which never decreases."""
        with self.going_on("metrics"):
            self.client.log(row, step=step)

    def image(self, step: int, frame, prediction, mask, caption: str | None = None) -> None:
        """Log a frame [H, W, 3] uint8 and masks [H, W], 0 or 1, as layers to switch."""
        with self.going_on("an image"):
            import wandb
            masks = {"predictions": {"mask_data": prediction.astype("uint8")},
                     "ground_truth": {"mask_data": mask.astype("uint8")}}
            self.client.log({"prediction": wandb.Image(frame, masks=masks, caption=caption)}, step)

    def watch(self, decoder, every: int) -> None:
        """Log histograms of the gradients in every `every`-th backward pass."""
        with self.going_on("gradients"):
            self.client.watch(decoder, log_freq=every)

    def artifact(self, name: str, type: str, files: dict, metadata: dict, aliases=(), tables=()):
        """Log files {name: path}, (wandb.Table, name) as `name`; metadata goes to the summary."""
        with self.going_on(f"the artifact {name}"):
            import wandb
            self.client.summary.update(metadata)
            artifact = wandb.Artifact(name, type=type, metadata=metadata)
            for file, path in files.items():
                artifact.add_file(str(path), name=ENTRIES.get(file, file), skip_cache=True)
            for table, entry in tables:
                artifact.add(table, entry)
            sent = self.client.log_artifact(artifact, aliases=["latest", *aliases])
            if not self.client.offline:
                sent.wait(timeout=self.client.settings.finish_timeout)  # raises if it is refused


def start(mode, job: str, config: dict, inputs: list[str]) -> Run:
    """Start a run of type `job` whose lineage is `inputs`, names from `fetch`. Raises BadInput."""
    try:
        import wandb
        quiet = wandb.Settings(  # no console, code or git state is sent
            console="off", silent=True, disable_code=True, disable_git=True,
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT") or 300),  # seconds
            finish_timeout_raises=True)
        run = Run(wandb.init(project=os.environ.get("WANDB_PROJECT") or "davis", job_type=job,
                             config=config | {"used": inputs}, mode=mode, settings=quiet))
    except Exception as error:
        raise BadInput(f"--wandb {mode}: cannot be used ({plain(error)}); pip install wandb, set "
                       "WANDB_API_KEY, or pass --wandb offline or disabled") from error
    for used in inputs if mode == "online" else ():
        with run.going_on("lineage"):
            run.client.use_artifact(used)
    return run


def log_result(run: Run, out: Path, metadata: dict, name: str, split: str | None, source,
               files: list, rows: list[dict], scores: dict | None) -> None:
    """Log a results folder as the submission, and the scores of `rows` as the contest's table."""
    decoder = metadata.get("decoder", name.removesuffix("-result"))
    if "decoder" in metadata:
        names = [*(f"outputs/{file.name}" for file in files), "paths.json", "metadata.json"]
        entries = {name: out / name for name in names}
        run.artifact(f"{decoder}-result", "result", entries, metadata)
    if not scores:
        return
    with run.going_on("the scores"):
        import wandb
        table = wandb.Table(columns=["out", "target", "iou_score"])
        for file, row in zip(files, rows):
            if row["J"] is not None:  # its frame has a mask
                mask, iou = source.mask(row["index"]) * np.uint8(255), row["iou"]
                table.add_data(wandb.Image(file, mode="L"), wandb.Image(mask, mode="L"),
                               -1.0 if iou is None else float(iou))
        run.artifact(f"{decoder}-result-submission", "submission", {},
                     scores | {"segmentation_metric": scores["mean_iou"]},
                     tables=[(table, f"{split or 'val'}-eval-data")])

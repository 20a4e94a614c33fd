"""Weights & Biases both ways: inputs that are artifacts there, and runs that log.

WANDB_PROJECT (else davis), WANDB_ENTITY, WANDB_NAME and WANDB_CACHE_DIR say where.
"""
import contextlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from vos.inputs import BadInput, inside
from vos.outputs import write_text

PART = r"([\w-][\w.-]*)"  # no dot in front: a part names a folder of the cache
REFERENCE = re.compile(f"wandb:(?:(?:{PART}/)?{PART}/)?{PART}:{PART}")
ENTRIES = {  # the contest's names of files in artifacts, and ours
    "features_array": "features.npy", "masks": "masks.npy", "final_model": "model.pt"}


def choose_mode(flag: str | None) -> str:
    """Return `flag`, else WANDB_MODE, else online in a sweep, else disabled. Raises BadInput."""
    default = "online" if os.environ.get("WANDB_SWEEP_ID") else "disabled"
    mode = flag or os.environ.get("WANDB_MODE", "").lower() or default
    if mode not in ("disabled", "offline", "online"):
        raise BadInput(f"WANDB_MODE={mode}: expected disabled, offline or online; pass --wandb")
    return mode


def check_account(mode: str) -> str:
    """Return `mode`, or offline where a key is asked for and declined. Raises BadInput."""
    try:
        import wandb
        if mode == "online" and os.environ.get("RANK", "0") == "0":  # of several, the first logs
            wandb.setup(settings=wandb.Settings(mode="online"))  # whatever WANDB_MODE says
            return "online" if wandb.login(verify=False) else "offline"
    except Exception as error:
        raise BadInput(f"--wandb {mode}: cannot be used ({reason(error)}); pip install wandb, set "
                       "WANDB_API_KEY, or pass --wandb disabled") from None
    return mode


def redact(value):
    """Return `value` as JSON has it, what JSON has not as text, without keys and passwords."""
    text = json.dumps(value, default=lambda item: item.item() if hasattr(item, "item") else str(item))
    text = re.sub(r"://[^/\s]+@", "://***@", text)
    key = os.environ.get("WANDB_API_KEY")
    return json.loads(text.replace(key, "***") if key else text)


def reason(error: BaseException) -> str:
    """Return the first line of an error's text, redacted, or its kind when it has none."""
    return redact((str(error).strip().splitlines() or [type(error).__name__])[0])


def say(message: str) -> None:
    """Print one line about Weights & Biases on standard error."""
    print(f"Weights & Biases: {redact(message)}", file=sys.stderr, flush=True)


def fetch(source: str, mode: str) -> tuple[Path, str]:
    """Return a local folder and the full name, entity/project/name:vN, of an artifact wandb:... .

    A version in the cache is used without the network. An alias is looked up; when that fails, or
    offline, its last known version is used. Raises BadInput when there is none.
    """
    match = REFERENCE.fullmatch(source)
    if not match:
        raise BadInput(f"{source}: expected wandb:<entity>/<project>/<name>:<alias or version>, "
                       "such as wandb:wandb/davis/davis2016-val:contest")
    entity, project, name, version = match.groups()
    entity = entity or os.environ.get("WANDB_ENTITY") or "_"  # that is, the API key's own
    project = project or os.environ.get("WANDB_PROJECT") or "davis"
    wanted = f"{entity}/{project}/{name}:{version}"

    memory = cached(f"{wanted}.name")  # a text file: the full name of last time
    known = memory.read_text() if memory.exists() else wanted
    if re.fullmatch(r"v\d+", version) and cached(known).is_dir():
        return cached(known), known
    try:
        if mode == "offline":
            raise ConnectionError("--wandb offline asks no server; --wandb disabled does")
        import wandb
        artifact = wandb.Api().artifact(wanted.removeprefix("_/"))
        plain = artifact.name.split(":")[0]
        used = f"{artifact.entity}/{artifact.project}/{plain}:{artifact.version}"
        download(artifact, used, cached(used))
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_text(memory, used)
    except Exception as error:  # the client raises its own, requests' and plain ones alike
        if not cached(known).is_dir():
            raise BadInput(f"{source}: not in the cache {cached(known).parent} (WANDB_CACHE_DIR), "
                           f"and not to be had ({reason(error)})") from error
        say(f"using {known} for {source} from the cache ({reason(error)})")
        return cached(known), known
    return cached(used), used


def cached(name: str) -> Path:
    """Return the place of entity/project/name:version in the cache, whose folders are servers."""
    root = os.environ.get("WANDB_CACHE_DIR") or Path.home() / ".cache" / "wandb"
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    host = server.rpartition("@")[2].replace(":", "_")  # without a password
    return Path(root, "fetched", host, name.replace(":", "/"))


def download(artifact, used: str, folder: Path) -> None:
    """Fill `folder`, unless it is there, with an artifact verified and whole."""
    entries = artifact.manifest.entries
    for path, entry in entries.items():
        inside(folder, path, listed_in=Path(f"wandb:{used}"))
        if entry.ref is not None:
            raise BadInput(f"{path!r} refers to {entry.ref}, expected a stored file")
    if folder.is_dir():
        return
    say(f"downloading {used} ({artifact.size / 1e6:.1f} MB) to {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        files = Path(artifact.download(f"{temporary}/files", skip_cache=True))
        artifact.verify(str(files))
        for path in entries:
            final = files / ENTRIES.get(path, path.replace("\\", "/"))  # from Windows
            final.parent.mkdir(parents=True, exist_ok=True)
            (files / path).rename(final)
        if not folder.is_dir():  # another process may have been faster
            files.rename(folder)


class Run:
    """A run that logs, used in a `with` block. A failure of `client`, a wandb.Run, stops nothing."""

    def __init__(self, client):
        self.client, self.folder = client, client.settings.sync_dir
        self.missing: list[str] = []  # what could not be logged
        self.sent: list = []  # artifacts on their way

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Wait for uploads, and say how to upload what is left."""
        try:
            with self.going_on("the end"):
                self.client.unwatch()
                self.client.finish(exit_code=int(kind is not None))
                for artifact in self.sent:
                    artifact.wait(timeout=10)  # seconds; asks how it went
        finally:  # after an interrupt too
            if self.missing:
                say(f"not logged: {', '.join(self.missing)}; if the next does not upload it, give "
                    "the command again with --wandb offline")
            flag = "" if self.client.offline else "--include-online "
            say(f"the run is at {self.client.url or self.folder}; to upload what is missing there: "
                f"wandb sync {flag}{self.folder}")

    @contextlib.contextmanager
    def going_on(self, what: str):
        """Turn failures of the client into one warning a run."""
        try:
            yield
        except Exception as error:
            if not self.missing:
                say(f"{what} could not be logged ({reason(error)}); going on without")
            self.missing += [what] if what not in self.missing else []

    def log(self, row: dict, step: int) -> None:
        """Log numbers and strings at `step`, which never decreases."""
        with self.going_on("metrics"):
            self.client.log(redact(row), step=step)

    def image(self, step: int, frame, prediction, mask=None, caption: str | None = None) -> None:
        """Log a frame [H, W, 3] uint8 and masks [H, W], 0 or 1, as layers to switch."""
        with self.going_on("an image"):
            import wandb
            labels = {0: "background", 1: "object"}
            layers = {"predictions": prediction, "ground_truth": mask}
            masks = {layer: {"mask_data": data.astype("uint8"), "class_labels": labels}
                     for layer, data in layers.items() if data is not None}
            picture = wandb.Image(frame, masks=masks, caption=caption)
            self.client.log({"prediction": picture}, step=step)

    def watch(self, decoder, every: int) -> None:
        """Log histograms of the gradients in every `every`-th backward pass."""
        with self.going_on("gradients"):
            self.client.watch(decoder, log_freq=every)

    def artifact(self, name: str, type: str, files: dict, metadata: dict, aliases=(), tables=None):
        """Log `metadata` as the run's summary, and with copies of files {entry: path} as `name`."""
        with self.going_on(f"the artifact {name}"):
            import wandb
            metadata = redact(metadata)
            self.client.summary.update(metadata)
            artifact = wandb.Artifact(name, type=type, metadata=metadata)
            for entry, path in files.items():
                artifact.add_file(str(path), name=entry, skip_cache=True)
            for entry, table in (tables or {}).items():
                artifact.add(table, entry)
            self.sent.append(self.client.log_artifact(artifact, aliases=["latest", *aliases]))


def start(mode, job: str, config: dict, inputs: list[str]) -> Run:
    """Start a run of type `job`, whose lineage is `inputs`, full names from `fetch`.

    Without an answer from the server the run is offline, which is told. Raises BadInput.
    """
    import wandb
    settings = wandb.Settings(  # no console, code or git state is sent
        console="off", silent=True, disable_code=True, disable_git=True, finish_timeout_raises=True,
        finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT") or 300))  # seconds
    try:
        run = Run(wandb.init(project=os.environ.get("WANDB_PROJECT") or "davis", job_type=job,
                             config=redact({**config, "used": inputs}), mode=mode, settings=settings))
    except Exception as error:
        if mode == "online" and re.search("tim(ed|e) ?out", str(error), re.IGNORECASE):
            say(f"no answer from the server ({reason(error)}); logging offline")
            return start("offline", job, config, inputs)
        raise BadInput(f"--wandb {mode}: refused ({reason(error)}); check WANDB_API_KEY, "
                       "WANDB_ENTITY and WANDB_PROJECT, or pass --wandb disabled") from error
    for used in inputs if mode == "online" else ():
        with run.going_on("lineage"):
            run.client.use_artifact(used)
    return run


def log_features(run: Run, folder: Path, featurizer: str, split: str, metadata: dict) -> None:
    """Log a feature folder as `<featurizer>-featurized-<split>`."""
    theirs = {ours: entry for entry, ours in ENTRIES.items()}
    files = {theirs.get(path.name, path.name): path for path in folder.iterdir()}
    run.artifact(f"{featurizer}-featurized-{split}", "featurized-data", files, metadata)


def log_model(run: Run, decoder: str, model_path: Path, checkpoints: list, metadata: dict) -> None:
    """Log a decoder as `<decoder>`, also `best` where its `val_iou` chose it among its steps."""
    files = {"final_model": model_path} | {path.name: path for path in checkpoints}
    aliases = ["best"] if metadata.get("val_iou") is not None else []
    run.artifact(decoder, "trained-model", files, metadata, aliases)


def log_results(run: Run, decoder: str, files: dict, metadata: dict) -> None:
    """Log the submission's files {entry: path} as `<decoder>-result`; metadata holds `nparams`."""
    run.artifact(f"{decoder}-result", "result", files, metadata)


def log_scores(run: Run, decoder: str, split: str, rows, scores: dict) -> None:
    """Log scores, and rows of (output, target, IoU or -1) as the contest's table of them.

    Output and target are PNG paths or arrays [H, W] uint8, 0 to 255.
    """
    with run.going_on("the scores"):
        import wandb
        table = wandb.Table(columns=["out", "target", "iou_score"])
        for output, target, iou in rows:
            pictures = [wandb.Image(source, mode="L") for source in (output, target)]
            table.add_data(*pictures, float(iou))
        scores = {**scores, "segmentation_metric": scores["mean_iou"]}
        run.artifact(f"{decoder}-result-submission", "submission", {}, scores,
                     tables={f"{split}-eval-data": table})

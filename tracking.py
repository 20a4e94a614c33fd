"""The run's log, always; Weights & Biases, only when asked for.

Every script opens one tracker, and what it logs goes to a local JSON-lines file and, with
`--wandb offline` or `--wandb online`, to Weights & Biases as well:

    account = tracking.from_flags(args)                          # right after parsing
    folder, used = artifacts.fetch(args.features, account)       # a path, or wandb:entity/project/name:alias
    with tracking.start(account, "train", config, log=out / "log.jsonl") as tracker:
        tracker.use(used)                                        # lineage
        tracker.log(step, {"loss": 0.3})
        tracking.log_model(tracker, "linear", final, checkpoints, metadata)

`wandb` is imported inside functions, so everything else works without it. Nothing it does stops a
run: a lost network or a failed upload is told once, and the end says how to upload later.
Console output, code and git state stay on this machine, and API keys are cut out of what is logged.
"""
import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from files import BadInput

MODES = ("disabled", "offline", "online")
SPELLINGS = {"dryrun": "offline", "run": "online", "": "disabled"}  # what else the client takes as WANDB_MODE
CLASS_LABELS = {0: "background", 1: "object"}
INIT_SECONDS = 30  # how long to wait for the server at the start; WANDB_INIT_TIMEOUT overrides
FINISH_SECONDS = 300  # how long to wait for uploads at the end; WANDB_FINISH_TIMEOUT overrides

# The contest's entry names, by artifact type, and what our readers call the same file. Both are plain
# NumPy or PyTorch files: np.load opens an entry `features_array`, torch.load one called `final_model`.
ENTRIES = {
    "featurized-data": {"features_array": "features.npy", "masks": "masks.npy"},
    "trained-model": {"final_model": "model.pt"},
}


class Account(NamedTuple):
    """Where a run logs to, and where a short artifact name is looked up."""

    mode: str  # disabled, offline or online
    project: str
    entity: str | None  # None: the default one of the API key
    name: str | None  # the run's name; None: Weights & Biases makes one up


def add_tracking_flags(parser: argparse.ArgumentParser) -> None:
    """Add --wandb, --project, --entity and --run-name to a script's parser."""
    group = parser.add_argument_group("Weights & Biases")
    group.add_argument("--wandb", choices=MODES, default=None, help="log there too (default: WANDB_MODE, else disabled)")
    group.add_argument("--project", default=None, help="project (default: WANDB_PROJECT, else davis)")
    group.add_argument("--entity", default=None, help="user or team (default: WANDB_ENTITY, else the key's own)")
    group.add_argument("--run-name", default=None, help="name of the run (default: made up by Weights & Biases)")


def from_flags(args: argparse.Namespace) -> Account:
    """Return the account that flags and environment name; call it right after parsing.

    Started by a sweep agent, a run is online unless told otherwise: the agent waits for its metrics.
    Raises BadInput for a WANDB_MODE there is not, when logging is asked for without wandb installed, and
    when there is no usable API key and nobody to ask for one.
    """
    mode = args.wandb
    if mode is None:
        default = "online" if os.environ.get("WANDB_SWEEP_ID") else "disabled"
        found = os.environ.get("WANDB_MODE", default).lower()
        mode = SPELLINGS.get(found, found)
        if mode not in MODES:
            raise BadInput(f"WANDB_MODE={found}: expected one of {', '.join(MODES)}; unset it or pass --wandb")
    if mode != "disabled":
        import_wandb(f"--wandb {mode}")
    if mode == "online" and os.environ.get("RANK", "0") == "0" and not has_key():  # of several processes, the first logs
        mode = "offline"
    project = args.project or os.environ.get("WANDB_PROJECT") or "davis"
    return Account(mode, project, args.entity or os.environ.get("WANDB_ENTITY"), args.run_name)


def import_wandb(wanted_by: str):
    """Return the wandb module. Raises BadInput, naming what wanted it, when it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise BadInput(f"{wanted_by}: needs the package wandb, which cannot be imported ({error}); "
                       "pip install wandb, or go on without it (--wandb disabled, and a local folder)") from None
    return wandb


def has_key() -> bool:
    """Say whether there is an API key, without asking the server; whoever is at a terminal is asked for it, and may decline.

    Raises BadInput when there is none, or a malformed one, and nobody to ask.
    """
    import wandb
    asks = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    wandb.setup(settings=wandb.Settings(mode="online", silent=not asks))  # whatever WANDB_MODE says: a flag goes before it
    try:
        if wandb.login(verify=False, prompt=asks) or asks:
            return wandb.setup().settings.mode == "online"
    except wandb.errors.Error as error:
        raise no_key(error) from None
    raise no_key("none was found")


def no_key(why: object) -> BadInput:
    """Return the error of a missing or malformed API key."""
    return BadInput(f"--wandb online: no API key that can be used ({redact(str(why).strip().splitlines()[0])}); "
                    "set WANDB_API_KEY, run `wandb login`, or pass --wandb offline")


def sweep_run_id() -> str | None:
    """Return the run id that a sweep agent gave this process, else None: a folder name no other run of it has."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def redact(value):
    """Return `value` (nested dicts, lists and scalars) as plain Python, without API keys and passwords in URLs."""
    if getattr(value, "ndim", None) == 0:  # a NumPy or PyTorch scalar
        value = value.item()
    if isinstance(value, dict):
        return {str(key): redact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = re.sub(r"://[^/@\s]+@", "://***@", str(value))
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text


class Tracker:
    """One run's log. Made by `start`, used in a `with` block.

    `run` is the wandb run, or None while nothing is logged there. `failed` says that something
    could not be logged there, which has then been told.
    """

    def __init__(self, account: Account, log: Path | None):
        self.account, self.path = account, log
        self.run: Any = None
        self.failed = False
        self.watched: tuple[Any, int] | None = None  # (model, every), see `watch`
        self.wanted: dict = {}  # what the run was made with
        self.folder: str | None = None  # where the client keeps it
        self.sent: list = []  # artifacts on their way
        self.unsent: list[tuple] = []  # (artifact, aliases) that the client would not take

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.finish(exit_code=0 if kind is None else 1)

    def log(self, step: int, row: dict, timings: dict | None = None) -> None:
        """Log the numbers and strings of `row` at `step` (which never decreases).

        The local line holds {"step": step, **row} with NaN and infinity as null, which JSON can say.
        `timings` go to Weights & Biases alone: two runs of one command write the same local log.
        Raises BadInput when the local log cannot be written.
        """
        row = redact(row)
        if self.path is not None:
            finite = {key: None if isinstance(item, float) and not math.isfinite(item) else item for key, item in row.items()}
            try:
                with open(self.path, "a", encoding="utf-8") as file:  # opened anew: a line is on disk, or it is not
                    file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            except OSError as error:
                raise BadInput(f"{self.path}: cannot be written ({error.strerror}); free some space") from error
        with self.going_on("metrics"):
            if self.run is not None:
                shown = gradients(self.watched[0]) if self.watched and step % self.watched[1] == 0 else {}
                self.run.log({**row, **(timings or {}), **shown}, step=step)

    def image(self, step: int, frame, prediction, mask=None, caption: str = "", key: str = "prediction") -> None:
        """Log a frame [H, W, 3] uint8 with its predicted and true masks [H, W], 0 or 1, as switchable layers."""
        if self.run is None:
            return
        with self.going_on("an image"):
            import wandb
            layers = {"predictions": prediction} | ({} if mask is None else {"ground_truth": mask})
            masks = {layer: {"mask_data": data.astype("uint8"), "class_labels": CLASS_LABELS} for layer, data in layers.items()}
            self.run.log({key: wandb.Image(frame, masks=masks, caption=caption or None)}, step=step)

    def watch(self, model, every: int = 1) -> None:
        """From now on, log histograms of `model`'s gradients with `log`, at steps that are multiples of `every`.

        They are those the last backward pass left. (The client's own `watch` would synchronise the
        device within every backward pass, and files what it sees under the step before.)
        """
        self.watched = (model, every)

    def summary(self, values: dict) -> None:
        """Set the run's final numbers, as the run table shows them."""
        with self.going_on("the summary"):
            if self.run is not None:
                self.run.summary.update(redact(values))

    def use(self, name: str | None) -> None:
        """Record "entity/project/name:version", as `fetch` returned it, as an input of this run.

        Offline there is no server to tell, so the name goes to the run's config under `used`.
        """
        if self.run is None or name is None:
            return
        with self.going_on("lineage"):
            if self.account.mode == "online":
                self.run.use_artifact(name)
            else:
                self.run.config.update({"used": [*self.run.config.get("used", []), name]}, allow_val_change=True)

    def artifact(self, name: str, type: str, files: dict, metadata: dict, aliases=(), tables=None) -> None:
        """Log the artifact `name` of `type` with files {entry name: local path} and tables {entry name: wandb.Table}.

        The files are copied aside first, so that they may change while the upload goes on.
        """
        if self.run is None:
            return
        with self.going_on(f"the artifact {name}"):
            import wandb
            artifact = wandb.Artifact(name, type=type, metadata=redact(metadata))
            for entry, path in files.items():
                artifact.add_file(str(path), name=entry, skip_cache=True)
            for entry, table in (tables or {}).items():
                artifact.add(table, entry)
            self.unsent.append((artifact, ["latest", *aliases]))  # until the next line has worked
            self.sent.append(self.run.log_artifact(artifact, aliases=["latest", *aliases]))
            self.unsent.pop()

    @contextlib.contextmanager
    def going_on(self, what: str):
        """Turn any failure of the client within the block into one warning a run; the work goes on."""
        try:
            yield
        except BadInput:
            raise
        except Exception as error:  # the client raises its own, requests', pydantic's and plain ones alike
            self.warn(f"{what} could not be logged ({first_line(error)})")

    def warn(self, message: str) -> None:
        """Say once a run that logging failed; later failures have the same cause as a rule."""
        if not self.failed:
            say(f"{message}; going on without, the local files are complete")
        self.failed = True

    def finish(self, exit_code: int = 0) -> None:
        """Wait for uploads, at most FINISH_SECONDS, and say how to upload what is left. Called by `with`."""
        if self.run is None:
            return
        run, self.run, online, folders = self.run, None, self.account.mode == "online", [self.folder]
        try:
            run.finish(exit_code=exit_code)
            for artifact in self.sent if online else ():
                artifact.wait(timeout=10)  # seconds; `finish` has waited, this only asks how it went
        except Exception as error:
            self.warn(f"not everything was uploaded ({first_line(error)})")
        finally:  # an interrupt too leaves something to upload
            with self.going_on("what was not uploaded"):
                folders += [self.keep_unsent(run.id)] if self.unsent else []
            upload = " ".join(["wandb sync", *(["--include-online"] if online else []), *map(str, folders)])
            if online and not self.failed:
                say(f"the run is at {run.url}; should something be missing there: {upload}")
            else:
                say(f"to upload this run: {upload}")

    def keep_unsent(self, run_id: str) -> str:
        """Log what the client would not take without its server to an offline twin of the run; return its folder."""
        import wandb
        twin = init(wandb, mode="offline", id=run_id, **self.wanted)
        folder = twin.settings.sync_dir
        for artifact, aliases in self.unsent:
            twin.log_artifact(artifact, aliases=aliases)
        twin.finish()
        return folder


def gradients(model) -> dict:
    """Return {"gradients/<parameter>": histogram of its finite values} of a model."""
    import wandb
    row = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            values = parameter.grad.detach().float().cpu()
            row[f"gradients/{name}"] = wandb.Histogram(values[values.isfinite()].numpy())
    return row


def say(message: str) -> None:
    """Print one line about Weights & Biases on standard error."""
    print(f"Weights & Biases: {redact(message)}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def start(account: Account, job: str, config: dict, log: Path | None = None, append: bool = False) -> Tracker:
    """Open the tracker of one run.

    `job` is the job type: featurize, train, run-val, run-test or val-eval. `config` is what the run was
    asked to do. `log` is the local JSON-lines file, started afresh unless `append`.
    A server that does not answer is told once and the run logged offline. Raises BadInput, before any
    work, when there is no usable API key and nobody to ask for one.
    """
    tracker = Tracker(account, None if log is None else Path(log))
    if log is not None and not append:
        try:
            Path(log).write_text("", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{log}: cannot be written ({error.strerror}); choose another --out") from error
    if account.mode == "disabled":
        return tracker
    wandb = import_wandb(f"--wandb {account.mode}")
    tracker.wanted = {"project": account.project, "entity": account.entity, "name": account.name, "job_type": job, "config": redact(config)}
    try:
        tracker.run = init(wandb, mode=account.mode, **tracker.wanted)
    except wandb.errors.UsageError as error:
        raise BadInput(f"--wandb online: no API key that can be used ({redact(first_line(error))}); "
                       "set WANDB_API_KEY, run `wandb login`, or pass --wandb offline") from None
    except Exception as error:
        if account.mode == "offline" or not re.search("tim(ed|e) ?out", str(error), re.IGNORECASE):
            raise BadInput(f"--wandb {account.mode}: refused ({redact(first_line(error))}); check WANDB_API_KEY, --entity "
                           "and --project, or pass --wandb offline or disabled") from error
        say(f"no answer from the server ({first_line(error)}); logging offline")
        tracker.account = account._replace(mode="offline")
        tracker.run = init(wandb, mode="offline", **tracker.wanted)
    tracker.folder = tracker.run.settings.sync_dir
    say(f"logging {tracker.account.mode} to {tracker.run.url if tracker.account.mode == 'online' else tracker.folder}")
    return tracker


def init(wandb, **wanted):
    """Call wandb.init so that nothing but what the scripts log leaves this machine, and nothing waits for ever."""
    limits = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
    chosen = {key: seconds for key, seconds in limits.items() if f"WANDB_{key.upper()}" not in os.environ}
    settings = wandb.Settings(console="off", silent=True, save_code=False, disable_code=True, disable_git=True,
                              finish_timeout_raises=True, **chosen)
    return wandb.init(settings=settings, **wanted)


# What the contest calls things. Each function logs one script's artifact, and does nothing when nothing is logged.


def entry_names(type: str, folder: Path, names) -> dict[str, Path]:
    """Return {entry name on Weights & Biases: path} for files of ours called `names` in `folder`."""
    called = {ours: theirs for theirs, ours in ENTRIES[type].items()}
    return {called.get(name, name): Path(folder) / name for name in names}


def log_features(tracker: Tracker, folder: Path, featurizer: str, split: str, metadata: dict) -> None:
    """Log a feature folder as `<featurizer>-featurized-<split>`; its only level becomes the entry `features_array`."""
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_file())
    files = entry_names("featurized-data", folder, names)
    tracker.artifact(f"{featurizer}-featurized-{split}", "featurized-data", files, metadata)


def log_model(tracker: Tracker, decoder: str, model: Path, checkpoints: list[Path], metadata: dict) -> None:
    """Log a trained decoder as `<decoder>`: `final_model` is the file `model`, checkpoints keep their names.

    The alias `latest` moves to it; `best` too unless the version that has it says a higher `val_iou`
    (offline, nobody can say).
    """
    files = {"final_model": model} | {path.name: path for path in checkpoints}
    aliases = ["best"] if beats_best(tracker, decoder, metadata.get("val_iou")) else []
    tracker.artifact(decoder, "trained-model", files, metadata, aliases)


def beats_best(tracker: Tracker, decoder: str, val_iou: float | None) -> bool:
    """Return whether a model of this `val_iou` may take the alias `best` of its name on the server."""
    if tracker.run is None or tracker.account.mode != "online" or val_iou is None:
        return True
    try:
        import wandb
        best = wandb.Api().artifact(f"{tracker.run.entity}/{tracker.run.project}/{decoder}:best").metadata.get("val_iou")
    except Exception:  # there is none yet, or nobody to ask
        return True
    return best is None or val_iou >= best


def log_results(tracker: Tracker, decoder: str, files: dict, metadata: dict) -> None:
    """Log the submission as `<decoder>-result`: files {"outputs/00000.png": path, "paths.json": path, ...}.

    `metadata` holds `nparams`, which the contest demands and which is logged as a metric too.
    """
    tracker.summary(metadata)
    tracker.artifact(f"{decoder}-result", "result", files, metadata)


def log_scores(tracker: Tracker, decoder: str, split: str, rows: Iterable[tuple], scores: dict) -> None:
    """Log scores, and `<decoder>-result-submission` with the contest's table `<split>-eval-data`.

    rows    (output, target, IoU) a frame; the pictures are PNG paths or arrays [H, W] uint8, 0 to 255; an
            IoU of a frame empty in both is -1, as the contest writes it.
    scores  has `mean_iou`, the contest's, which goes out as `segmentation_metric` too.
    """
    tracker.summary({**scores, "segmentation_metric": scores["mean_iou"]})
    if tracker.run is None:
        return
    with tracker.going_on("the table of scores"):
        import wandb
        table = wandb.Table(columns=["out", "target", "iou_score"])
        for output, target, iou in rows:
            table.add_data(picture(wandb, output, "model output"), picture(wandb, target, "target"), float(iou))
        tracker.artifact(f"{decoder}-result-submission", "submission", {}, scores, tables={f"{split}-eval-data": table})


def picture(wandb, source, caption: str):
    """Return a wandb.Image of a file's path or of a grey array [H, W] uint8."""
    if isinstance(source, (str, Path)):
        return wandb.Image(str(source), caption=caption)
    return wandb.Image(source, mode="L", caption=caption)

"""Train a decoder on a feature folder that sits whole in device memory.

    python train.py --features features/alexnet-train --val-features features/alexnet-val

writes runs/simple/: model.pt (the best by val IoU, else the last), log.jsonl, curves.svg,
predictions/, checkpoints/, and last.pt, from which `--resume runs/simple` goes on after any stop.
`--folds 4 --seeds 3` trains 12 times, a folder each, and ends with their mean and spread.

B batch, N rows of a feature folder, gh gw the decoder's grid, H W frame.
"""
import argparse
import dataclasses
import itertools
import math
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

import data
import models
from models import DECODERS, Decoder, Recipe
from vos import cli, layers, pictures, runs
from vos.inputs import BadInput
from vos.outputs import check_output, write_json

MAY_CHANGE = ("device", "threads", "wandb", "overwrite", "debug", "resume")  # when resuming


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--features", help="feature folder to train on, or wandb:...")
    group.add_argument("--val-features", help="feature folder to validate on; the best is kept")
    group.add_argument("--holdout", type=cli.number(0, 0.9), default=0.0,
                       help="without it: share of the clips kept out to validate on (default: 0)")
    group.add_argument("--folds", type=cli.count(1000, least=2), metavar="K",
                       help="train K times, validating on another K-th of the clips each time")
    group.add_argument("--levels", type=cli.parse_levels,
                       help="comma-separated levels to use (default: all that the folder has)")
    group.add_argument("--resident", choices=["device", "disk"],
                       help="where features are kept (default: on the device, if they fit)")
    group = parser.add_argument_group("decoder, and recipe (default: its own, in models.py)")
    group.add_argument("--decoder", choices=list(DECODERS), default="simple", help="(simple)")
    for field in dataclasses.fields(Recipe):
        group.add_argument("--" + field.name.replace("_", "-"), **field.metadata)
    group = parser.add_argument_group("log")
    group.add_argument("--seed", type=cli.count(2**31, least=0), default=0, help="(default: 0)")
    group.add_argument("--seeds", type=cli.count(1000, least=2), metavar="K",
                       help="train with each of K seeds from --seed on; beside --folds, each fold")
    group.add_argument("--out", type=Path, help="run folder to write (default: runs/<decoder>)")
    group.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run folder")
    group.add_argument("--log-every", type=cli.count(10**9), help="steps (default: a tenth)")
    group.add_argument("--no-pictures", action="store_true", help="write no overlays and no curves")
    cli.add_run_flags(parser)

    args = parser.parse_args()
    if args.resume:
        args = runs.recall(args.resume, parser, args, MAY_CHANGE)
    if not args.features:
        parser.error("--features: expected a folder written by featurize.py, or wandb:...")
    if bool(args.val_features) + bool(args.holdout) + bool(args.folds) > 1:
        parser.error("--val-features, --holdout, --folds: each says what to validate on; pass one")
    return args


def make_optimizer(decoder: Decoder, recipe: Recipe) -> torch.optim.Optimizer:
    """Return what changes the weights: anything with param_groups, zero_grad() and step() does."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(decoder.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def make_schedule(optimizer, recipe: Recipe) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Return what changes the learning rate after each step; None for a constant one.

    onecycle: Smith and Topin, "Super-Convergence", 2018; it rises for a tenth of the steps.
    """
    if recipe.schedule == "constant":
        return None
    steps = recipe.steps + 1  # so that the last step still moves
    rise = max(0.1, min(2 / steps, 0.9))
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, steps, pct_start=rise)


def fit(decoder: Decoder, training: data.Features, validation: data.Features | None = None,
        recipe: Recipe | None = None, out: Path | None = None, *, seed: int = 0,
        log_every: int | None = None, facts: dict | None = None, resume: bool = False,
        draw: bool = True, group=cli.ALONE, tracker=None) -> float | None:
    """Train a decoder in place; return the best IoU on `validation`, or None without.

    training, validation: features with masks. recipe: None for the decoder's own. out: the run
    folder to write (None: write nothing), with `facts` kept in model.pt; resume: go on from its
    last.pt. log_every: steps between two lines of the log, at which it also validates and saves.
    draw: write pictures. tracker: the run on Weights & Biases. Raises BadInput when the decoder
    does not fit, FloatingPointError when the loss is not finite.
    """
    recipe = recipe or decoder.recipe
    log_every = log_every or max(1, recipe.steps // 10)
    device = training.device
    layers.fit_standardise(decoder.to(device), training)
    found = decoder.eval()(training.batch(training.index[:1])).shape[1:]
    if found != decoder.grid:
        raise BadInput(f"decoder {type(decoder).__name__}: its forward gives {list(found)} for a "
                       f"frame; expected {list(decoder.grid)}, its grid")
    targets = data.pool_masks(training, decoder.cells)  # [N, gh, gw]
    clips = np.array(training.folder.meta["clips"])[training.index]  # a view counts as a clip
    optimizer = make_optimizer(decoder, recipe)
    schedule = make_schedule(optimizer, recipe)

    parts = {"decoder": decoder, "optimizer": optimizer, "schedule": schedule}  # to resume from
    parts = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
    state: dict = {"step": 0, "best": -1.0}
    if resume:
        state = runs.load_state(out, parts, state, write=group.main)
    best, losses = state["best"], []
    forward = torch.nn.parallel.DistributedDataParallel(decoder) if group.size > 1 else decoder
    if tracker:
        tracker.watch(decoder, log_every)
    bar = cli.progress(range(state["step"], recipe.steps), out.name if out else "train")
    started = time.perf_counter()

    decoder.train()
    for step in bar:
        # the batch: order and noise depend on (seed, step) alone, so a resumed run is the same
        torch.manual_seed(seed + 1 + step)
        order = data.batch_order(clips, recipe.batch_size, recipe.order, seed, step)
        rows = training.index[order[group.rank::group.size]]
        levels, target = training.batch(rows), data.rows_of(targets, rows)

        # forward, loss, backward, step
        loss = decoder.loss(forward(levels), target).sum() / len(order)
        optimizer.zero_grad()
        (loss * group.size).backward()  # several processes average their gradients
        if recipe.clip_gradient:
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), recipe.clip_gradient)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if schedule:
            schedule.step()
        losses.append(loss.detach())

        # log, validate, save: only here does the host wait for the device
        if step % log_every == 0 or step + 1 == recipe.steps:
            row = {"step": step, "loss": mean_loss(losses, step, group), "lr": lr}
            if validation:
                row["val_iou"] = validate(decoder, validation, group)
            is_best = row.get("val_iou", math.inf) > best
            best, losses = max(best, row.get("val_iou", best)), []
            if group.main and out:
                save(out, row, decoder, training, validation, facts or {}, is_best, draw, tracker)
                runs.save_state(out, parts, {"step": step + 1, "best": best})
            if group.main:
                tell(row, bar, time.perf_counter() - started, out)
            decoder.train()

    decoder.eval()
    return best if validation else None


def mean_loss(losses: list[torch.Tensor], step: int, group: cli.Group) -> float:
    """Return the mean of the losses up to `step`. Raises FloatingPointError at one not finite."""
    values = group.sum(torch.stack(losses))
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        at = step + 1 - len(losses) + int(bad[0])
        raise FloatingPointError(f"the loss is not finite at step {at}; the last good checkpoint "
                                 "is kept; try a lower --lr")
    return values.mean().item()


@torch.no_grad()
def validate(decoder: Decoder, features: data.Features, group=cli.ALONE) -> float:
    """Return the contest's mean IoU over frames, at the size that the featurizer saw."""
    rows = features.index[group.rank::group.size].tolist()
    ious = [torch.zeros(0, device=features.device)]  # a process may have no frames
    for row, pixels in zip(rows, models.predict(decoder, features, torch.tensor(rows))):
        found, mask = pixels > 127, data.unpack(features.masks[row], pixels.shape[1])
        ious.append((found & mask).sum()[None] / (found | mask).sum())  # NaN: both are empty
    total = torch.cat(ious)
    added, frames = group.sum(torch.stack([total.nansum(), total.isfinite().sum()])).tolist()
    return added / max(frames, 1)


def save(out: Path, row: dict, decoder: Decoder, training: data.Features,
         validation: data.Features | None, facts: dict, is_best: bool, draw: bool, tracker) -> None:
    """Write what a log point leaves: a checkpoint, a line of the log, a picture."""
    step = row["step"]
    description = models.describe(decoder, training.folder, training.names) | facts | row
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    models.save_model(out / f"checkpoints/model-{step:08d}.pt", description, decoder)
    if is_best:
        models.save_model(out / "model.pt", description, decoder)
    runs.append_log(out, row)
    if tracker:
        tracker.log({key: value for key, value in row.items() if key != "step"}, step)
    if draw:
        shown = (validation or training).without_views()
        middle = shown.index[len(shown.index) // 2:][:1]
        pixels = next(models.predict(decoder, shown, middle)).cpu()
        mask = data.unpack(shown.masks[int(middle)].cpu(), pixels.shape[1]).numpy()
        prediction = pixels.numpy() > 127
        file = out / f"predictions/{step:08d}.png"
        frame = runs.write_overlay(file, shown.folder, int(middle), prediction, mask)
        pictures.write_curves(out / "curves.svg", runs.read_log(out))
        if tracker:
            tracker.image(step, frame, prediction, mask, shown.folder.meta["clips"][int(middle)])


def tell(row: dict, bar, seconds: float, out: Path | None) -> None:
    """Show a log point: in the bar on a terminal, elsewhere as a line, if there is a run folder."""
    text = f"loss {row['loss']:.4f}"
    if "val_iou" in row:
        text += f", val IoU {row['val_iou']:.4f}"
    bar.set_postfix_str(text)
    if bar.disable and out:
        text = f"{out.name}, step {row['step']}: {text}, lr {row['lr']:.3g}, {seconds:.1f} s"
        cli.say(text, flush=True)


def list_trainings(features: data.Features, args: argparse.Namespace) -> list[tuple]:
    """Return (its folder in --out, the clips that it holds out, its seed) of each training."""
    clips = features.folder.clips[features.index]
    there = len(set(clips.tolist()))
    if there < (args.folds or (2 if args.holdout else 1)):
        raise BadInput(f"{features.folder.path}: has {there} labelled clips, too few to hold out")
    count = min(max(1, round(args.holdout * there)), there - 1) if args.holdout else 0
    drawn = data.draw_clips(clips, args.folds or there, args.seed)
    held_out = drawn if args.folds else [list(itertools.chain(*drawn[:count]))]

    parts = {"fold-{fold}": args.folds, "seed-{seed}": args.seeds}
    name = "-".join(part for part, asked in parts.items() if asked)
    seeds = range(args.seed, args.seed + (args.seeds or 1))
    return [(name.format(fold=fold, seed=seed), held, seed)
            for fold, held in enumerate(held_out) for seed in seeds]


def next_command(args: argparse.Namespace, out: Path, folder: data.FeatureFolder) -> str:
    """Return a command that can be pasted: score on `folder`, or compare several trainings."""
    if args.folds or args.seeds:
        return f"python -m vos.runs {shlex.quote(str(out.parent))}"
    command = ["python", "evaluate.py", "--model", str(out)]
    command += ["--features", args.val_features or args.features]
    if not Path(folder.meta["data"]).exists():  # without frames there are no pictures
        command += ["--no-pictures", "--refine", "none"]
    return shlex.join(command + ["--overwrite"] * args.overwrite)  # earlier results are there too


def main() -> None:
    args = parse_args()
    group, device = cli.join(cli.choose_device(args.device, args.threads))
    said = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    said = {name: value for name, value in said.items() if value is not None}
    recipe = dataclasses.replace(DECODERS[args.decoder].recipe, **said)
    out = args.out or Path("runs") / os.environ.get("WANDB_RUN_ID", args.decoder)

    # open what the flags name, and check that it fits together
    used: list[str] = []
    paths = [cli.fetch(source, args.wandb, used) for source in (args.features, args.val_features)]
    folders = [data.open_features(path) for path in paths if path]
    inputs = [folder.path for folder in folders]
    levels = args.levels or list(folders[0].shapes)
    folders[0].check_levels(levels, cues=False)
    shapes = {level: folders[0].shapes[level] for level in levels}
    decoder = models.make_decoder(args.decoder, shapes, folders[0].size, args.seed)
    description = models.describe(decoder, folders[0], levels)
    for folder in folders:
        folder.check_fit(description, folders[0].path, decoder.cues > 0)
    if group.main and not args.resume:
        check_output(out, "run", args.overwrite, inputs)
    features = [data.load_features(folder, levels, decoder.cues > 0, device, args.resident)
                for folder in folders]
    trainings, several = list_trainings(features[0], args), bool(args.folds or args.seeds)
    nparams = sum(weight.numel() for weight in decoder.parameters())
    nparams += description["featurizer_parameters"]
    if group.main:
        print(f"{args.decoder} on {description['featurizer']}, {device}: {nparams:,} parameters of "
              f"at most {layers.LIMIT - 1:,}; {recipe.steps} steps of {recipe.batch_size} from "
              f"{len(features[0].index)} frames, {recipe.optimizer}, lr {recipe.lr:g}")

    make_optimizer(decoder, recipe)  # imports PyTorch's compiler: a second that is not training's

    # train once, or once for each fold and seed
    command = runs.describe_command(args, dataclasses.asdict(recipe), folders, used)
    logged = cli.tracked(args.wandb if group.main else "disabled", "train", command, used)
    ends, started = {}, time.perf_counter()
    owned = runs.open_run(out, command, args.overwrite, inputs, bool(args.resume), group)
    with owned, logged as log:
        for name, held, seed in trainings:
            training, validation = features[0].hold_out(held) if held else (features[0], None)
            if len(features) > 1:
                validation = features[1].without_views()
            facts = {"recipe": command["recipe"], "code": command["code"], "seed": seed}
            clips = sorted(set(training.folder.clips[training.index].tolist()))
            facts |= {"clips": clips, "held_out": held}
            if group.main:
                (out / name).mkdir(exist_ok=True)
            decoder = models.make_decoder(args.decoder, shapes, folders[0].size, seed)
            best = fit(decoder, training, validation, recipe, out / name, seed=seed, facts=facts,
                       log_every=args.log_every, resume=bool(args.resume), group=group,
                       draw=not args.no_pictures, tracker=None if several else log)
            if group.main:
                ends[name] = runs.find_end(runs.read_log(out / name))
                if several:
                    print(f"{name}: {runs.say_end(ends[name])}", flush=True)
        seconds = time.perf_counter() - started
        if group.main and not args.resume:  # trained in one go
            write_json(out / "args.json", command | {"seconds": round(seconds, 3)})
        if log and not several:
            saved = [out / "model.pt", *sorted((out / "checkpoints").glob("*.pt"))]
            log.artifact(args.decoder, "trained-model", {path.name: path for path in saved},
                         facts | {"val_iou": best, "nparams": nparams},
                         ["best"] if best is not None else [])  # chosen by it among the steps

    if group.main:
        print(f"seconds: {seconds:.3f} ({len(trainings) * recipe.steps} steps)")
        what = f"mean +- standard deviation of {len(ends)}: " if several else "model.pt, "
        cli.say(f"wrote {out}: {what}{runs.say_end(*ends.values())}")
        cli.say(f"next: {next_command(args, out, folders[-1])}")


if __name__ == "__main__":
    sys.exit(cli.run(main, several=True))

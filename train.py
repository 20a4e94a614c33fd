"""Train a decoder on a feature folder that sits whole in device memory.

    python train.py --features features/alexnet-train --decoder simple --val-features features/alexnet-val

writes runs/simple/: model.pt (the best by val IoU, else the last), log.jsonl, curves.svg, predictions/,
checkpoints/, and last.pt, from which `--resume runs/simple` goes on after any stop.
"""
import argparse
import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import artifacts
import checkpoints
import data
import distributed
import inference
import metrics
import models
import pictures
import resident
import runs
import tracking
from cli import Parser, add_run_flags, choose_device, positive_int, progress, run
from files import plain, refuse_existing, write_json
from models import DECODERS, Decoder, Recipe
from optimizer import Adam, learning_rate


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--features", default=None, help="feature folder to train on, written by featurize.py, or wandb:...")
    group.add_argument("--val-features", default=None, help="feature folder to validate on; the best model by its IoU is kept")
    group.add_argument("--holdout", type=share, default=0.0,
                       help="without --val-features: share of the clips kept out to validate on, 0 to 0.9 (default: 0)")
    group.add_argument("--folds", type=int, default=None, metavar="K",
                       help="train K times, each time validating on another K-th of the clips, and print the mean")
    group.add_argument("--levels", default=None, help="comma-separated levels to use (default: all the folder has)")
    group.add_argument("--resident", choices=resident.RESIDENT, default=None,
                       help="where features are kept (default: on the device, else host memory, else disk: the first that fits)")
    group.add_argument("--no-verify", action="store_true", help="skip the SHA-256 check of the features")
    group = parser.add_argument_group("model")
    group.add_argument("--decoder", choices=list(DECODERS), default="simple", help="(default: simple)")
    group.add_argument("--compile", action="store_true", help="run the decoder through torch.compile")
    group.add_argument("--amp", action="store_true", help="run the decoder in bfloat16 autocast")
    group.add_argument("--deterministic", action="store_true",
                       help="the same bytes from the same command on CUDA too, as always on the CPU; may be slower there")
    group = parser.add_argument_group("optimisation (default: the decoder's own recipe in models.py)")
    group.add_argument("--steps", type=positive_int, default=None, help="optimiser steps")
    group.add_argument("--batch-size", type=positive_int, default=None, help="frames a step")
    group.add_argument("--lr", type=float, default=None, help="learning rate, the highest of a schedule")
    group.add_argument("--optimizer", choices=["adam", "adamw"], default=None)
    group.add_argument("--weight-decay", type=float, default=None, help="of adamw")
    group.add_argument("--schedule", choices=["constant", "onecycle"], default=None)
    group.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=None, help="draw an order each epoch")
    group.add_argument("--balanced", action=argparse.BooleanOptionalAction, default=None,
                       help="with --shuffle: draw a batch's frames from as many clips as it can")
    group.add_argument("--clip-gradient", type=float, default=None, help="largest norm of the gradients, 0 for no limit")
    group.add_argument("--ema", type=share, default=None, help="decay of the moving average of the weights, 0 for none")
    group.add_argument("--patience", type=positive_int, default=None,
                       help="stop after this many validations without a better one (default: never)")
    group = parser.add_argument_group("log")
    group.add_argument("--out", type=Path, default=None, help="run folder to write (default: runs/<decoder>)")
    group.add_argument("--resume", type=Path, default=None, metavar="RUN", help="go on with the run in this folder")
    group.add_argument("--args", type=Path, default=None, metavar="FILE", help="repeat the run of an args.json, into --out")
    group.add_argument("--log-every", type=positive_int, default=None, help="steps (default: a tenth of --steps)")
    group.add_argument("--no-pictures", action="store_true", help="write no overlays and no curves")
    group.add_argument("--log-gradients", action="store_true", help="histograms of gradients, on Weights & Biases")
    tracking.add_tracking_flags(parser)
    add_run_flags(parser)
    args = parser.parse_args(argv)
    if args.resume or args.args:
        return runs.recall(args, parser)
    if args.features is None:
        parser.error("--features is required: a folder written by featurize.py")
    return args


def share(text: str) -> float:
    """Parse a share of at least 0 and below 1 (argparse type)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 up to, not including, 1, found {text}")
    return value


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """The decoder's recipe with what the flags say instead."""
    flags = {"steps": args.steps, "batch": args.batch_size, "lr": args.lr, "optimizer": args.optimizer, "ema": args.ema,
             "weight_decay": args.weight_decay, "schedule": args.schedule, "shuffle": args.shuffle, "balanced": args.balanced,
             "clip_gradient": args.clip_gradient}
    return DECODERS[args.decoder].recipe._replace(**{name: value for name, value in flags.items() if value is not None})


@torch.no_grad()
def validate(decoder: Decoder, split: resident.Split) -> float:
    """Return the contest's mean IoU of the decoder on a split (at the size the featurizer saw)."""
    decoder.eval()
    group, device, own = split.features.group, split.features.device, split.own()
    total, count = torch.zeros(2, device=device).unbind()
    predictions = inference.predict(decoder, split.features, own)
    for index in own.split(32):
        pixels = torch.stack(list(itertools.islice(predictions, len(index))))
        masks = resident.gather(split.masks, index, device, group)
        iou = metrics.contest_iou(metrics.pack(metrics.foreground(pixels)), masks)
        total += iou.nansum().to(total.dtype)
        count += iou.isfinite().sum()
    group.sum(total, count)
    decoder.train()
    return float(total / count.clamp_min(1))


def train(args: argparse.Namespace, recipe: Recipe, training: resident.Split, validation: resident.Split | None, levels: list[str],
          out: Path, account: tracking.Account, used: list[str | None]) -> tuple[float | None, Decoder]:
    """Train one decoder and write its run folder. Returns the best val IoU (None without validation) and the decoder."""
    folder, device, group = training.folder, training.features.device, training.features.group
    frames, log_every = len(training.index), args.log_every or max(1, recipe.steps // 10)
    shapes = {level: tuple(folder.meta["levels"][level]) for level in levels}
    torch.manual_seed(args.seed)  # immediately before the decoder: its first weights are a function of the seed alone
    decoder = models.make_decoder(args.decoder, shapes, folder.size).to(device)
    decoder.standardise(training.features, training.index)
    description = checkpoints.describe(args.decoder, folder, levels)
    if group.main:
        print_rules(decoder, description, recipe, frames)

    optimizer = Adam(decoder.parameters(), recipe.weight_decay, decoupled=recipe.optimizer == "adamw")
    average = torch.optim.swa_utils.AveragedModel(
        decoder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
    parts: runs.Parts = {"decoder": decoder, "optimizer": optimizer} | ({"average": average} if average else {})
    state: dict[str, Any] = {"step": 0, "best": -1.0, "since_best": 0, "total": torch.zeros((), device=device), "count": 0}
    if args.resume:
        runs.load_state(out, parts, state, group)
    forward = torch.compile(decoder) if args.compile else decoder
    kept: Decoder = cast(Decoder, average.module) if average else decoder  # what is validated and saved

    rows, columns = decoder.cells()
    area = (torch.bincount(rows)[:, None] * torch.bincount(columns) / math.prod(folder.size)).to(device)  # [gh, gw]
    has_ended = args.patience and state["since_best"] >= args.patience  # and was killed before it could say so
    steps = range(state["step"], state["step"] if has_ended else recipe.steps)
    clips = np.array(folder.meta["clips"])[training.index.numpy()]
    seed = args.seed if recipe.shuffle else None
    orders = (resident.batch_order(step, clips, recipe.batch, seed, recipe.balanced) for step in steps)
    batches = resident.batches(training, orders, (rows, columns))
    config = {**plain(args), **recipe._asdict(), "frames": frames}
    with runs.StopSignal() as stop, runs.open_tracker(account, config, out, args, group) as tracker:
        for name in used:
            tracker.use(name)
        if args.log_gradients:
            tracker.watch(decoder, log_every)
        decoder.train()
        started, seen = time.perf_counter(), 0
        for step, batch in zip(progress(steps, "train"), batches):
            torch.default_generator.manual_seed(args.seed + 1 + step)  # what is random in a step depends on these alone
            if device.type != "cpu":  # (torch.manual_seed seeds every kind of device: half a millisecond)
                torch.get_device_module(device).manual_seed(args.seed + 1 + step)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                output = forward(batch.levels)  # [B, gh, gw]
                loss = decoder.loss(output, batch.target, area).sum() / batch.size
            decoder.zero_grad()
            loss.backward()
            group.sum_gradients(decoder)
            if recipe.clip_gradient:
                torch.nn.utils.clip_grad_norm_(decoder.parameters(), recipe.clip_gradient)
            lr, beta1 = learning_rate(recipe.schedule, recipe.lr, step, recipe.steps)
            optimizer.step(lr, beta1)
            if average:
                average.update_parameters(decoder)
            state["total"] += loss.detach()
            state["count"] += 1
            state["step"] = step + 1
            seen += batch.size

            logging = step % log_every == 0 or step + 1 == recipe.steps
            if logging:  # here, and only here, the host waits for the device
                group.sum(state["total"])
                row = {"loss": float(state["total"]) / state["count"], "lr": lr}
                state["total"].zero_()
                state["count"] = 0
                seconds = time.perf_counter() - started
                if validation:
                    row["val_iou"] = validate(kept, validation)
                    state["since_best"] = 0 if row["val_iou"] > state["best"] else state["since_best"] + 1
                is_best = not validation or state["since_best"] == 0
                state["best"] = row.get("val_iou", -1.0) if is_best else state["best"]
                if group.main:
                    runs.save_checkpoint(out, step, {**description, "step": step}, kept, is_best)
                    timings = {"seconds": round(seconds, 3), "frames_per_second": round(seen / seconds, 1)}
                    tracker.log(step, row, timings)
                    runs.append_line(out / runs.TIMES, {"step": step, **timings})
                    if not args.no_pictures:
                        runs.write_overlay(out, step, kept, validation or training, tracker)
                    runs.save_state(out, parts, state)
            if args.patience and state["since_best"] >= args.patience:
                break
            if stop.asked(group, logging):
                raise runs.stop_here(out, parts, state, step, stop, group)
        best = state["best"] if validation else None
        metadata = {"val_iou": best, "nparams": models.count_all(decoder, description), "steps": state["step"], **config}
        tracker.summary({key: metadata[key] for key in ("val_iou", "nparams")})
        tracking.log_model(tracker, args.decoder, out / "model.pt", sorted((out / "checkpoints").glob("*.pt")), metadata)
    if group.main and not args.no_pictures:
        pictures.write_curves(out / "curves.svg", runs.read_log(out))
    return best, kept


# --- around the loop ---------------------------------------------------------------------------


def print_rules(decoder: Decoder, description: dict, recipe: Recipe, frames: int) -> None:
    """Print what the contest asks of a model: its size, and what a frame costs."""
    own, total = models.count_parameters(decoder), models.count_all(decoder, description)
    flops = models.count_flops(decoder, description["shapes"])
    print(f"{description['decoder']} on {description['featurizer']}: {total:,} parameters ({own:,} in the decoder) of at most "
          f"{models.LIMIT - 1:,}; {(description['featurizer_flops'] + flops) / 1e9:.2f} GFLOP a frame ({flops / 1e9:.3f} in the decoder)")
    print(f"{recipe.steps} steps of {recipe.batch} from {frames} frames: {recipe.optimizer}, lr {recipe.lr:g} {recipe.schedule}")


def main() -> None:
    args = parse_args()
    account = tracking.from_flags(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts, and adds in a fixed order
        torch.use_deterministic_algorithms(True)
    group, device = distributed.join(choose_device(args.device))
    recipe = choose_recipe(args)
    out = args.out or Path("runs") / (tracking.sweep_run_id() or args.decoder)
    fetched = [artifacts.fetch(source, account) for source in (args.features, args.val_features) if source]
    folders = [data.open_features(path) for path, _ in fetched]
    used = [name for _, name in fetched]
    if used[0]:  # --resume and --args go on with this version, whatever its alias has come to mean
        args.features = f"wandb:{used[0]}"
    if args.val_features and used[1]:
        args.val_features = f"wandb:{used[1]}"
    if args.resume or args.args:
        runs.check_same_data(args, folders)
    levels = args.levels.split(",") if args.levels else list(folders[0].meta["levels"])
    for folder in folders:
        data.check_levels(folder, levels)
    checkpoints.check_same_features(folders, levels)
    clips = folders[0].sources
    folds = resident.fold_clips(clips, args.folds, args.seed) if args.folds else []
    apart = resident.split_clips(clips, args.holdout, args.seed) if args.holdout and len(folders) == 1 else None
    models.make_decoder(args.decoder, {level: tuple(folders[0].meta["levels"][level]) for level in levels}, folders[0].size)  # or BadInput
    if not args.resume and group.main:
        refuse_existing(out, args.overwrite)
    place = resident.choose_resident(args.resident, folders, levels, device, group)
    if group.main:
        total = sum(folder.files[level].stat().st_size for folder in folders for level in levels)
        print(f"{' and '.join(str(folder.path) for folder in folders)}: levels {', '.join(levels)}, {total / 1e6:,.0f} MB "
              f"to {'disk (read as needed)' if place == 'disk' else device if place == 'device' else 'host memory'}")
    splits = [resident.load_split(folder, levels, device, place, not args.no_verify, group) for folder in folders]
    splits = [split._replace(features=models.look_at_clips(args.decoder, split.features, split.folder.meta["clips"], split.folder, levels))
              for split in splits]

    with runs.own_folder(out, fresh=not args.resume, group=group):
        if not args.resume and group.main:
            runs.write_args(args, recipe, folders, out)
        training, validation = splits[0], resident.without_views(splits[1]) if len(splits) > 1 else None
        if folds:
            train_folds(args, recipe, training, folds, levels, out, account, used)
            return
        if apart:
            kept, held = (resident.select(training, index) for index in apart)
            training, validation = kept, resident.without_views(held)
        best, _ = train(args, recipe, training, validation, levels, out, account, used)
    if group.main:
        print(f"wrote {out}: model.pt" + (f", val IoU {best:.4f}" if best is not None else ""))
        print(f"next: python evaluate.py --model {out} --features {args.val_features or 'FEATURES'}")


def train_folds(args, recipe: Recipe, training: resident.Split, folds: list[np.ndarray], levels: list[str], out: Path,
                account, used) -> None:
    """Train --folds times, each validating on other clips, and print and write the mean IoU over all frames' folds."""
    ious = []
    for fold, held in enumerate(folds):
        kept = np.setdiff1d(np.arange(training.folder.frames), held)
        validation = resident.without_views(resident.select(training, held))
        runs.prepare_folder(out / f"fold-{fold}")
        best, decoder = train(args, recipe, resident.select(training, kept), validation, levels, out / f"fold-{fold}", account, used)
        ious.append(validate(decoder, validation))
        print(f"fold {fold}: val IoU {ious[-1]:.4f} at the last step, {best:.4f} at the best")
    if training.features.group.main:
        write_json(out / "folds.json", {"val_iou": ious, "mean": float(np.mean(ious))})
        print(f"wrote {out}: mean IoU of {args.folds} folds {np.mean(ious):.4f} at the last step")


if __name__ == "__main__":
    sys.exit(run(main))

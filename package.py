"""Check a results folder against the contest's rules and make the submission from it.

    python package.py --results results/simple

writes results/simple.zip with outputs/, paths.json and metadata.json. Broken rules are all listed, and
the exit status is then 1.
"""
import argparse
import re
import sys
import zipfile
from pathlib import Path

import artifacts
import clips
import distributed
import tracking
from cli import Parser, add_run_flags, one_line, progress, run
from files import BadInput, cannot_write, plain, read_json, whole_file
from models import LIMIT

EPOCH = (1980, 1, 1, 0, 0, 0)  # every entry's date: the same results give the same bytes


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--results", type=str, required=True, help="results folder written by evaluate.py, or wandb:...")
    parser.add_argument("--out", type=Path, default=None, help="zip to write (default: <results>.zip, in results/ for wandb:...)")
    tracking.add_tracking_flags(parser)
    add_run_flags(parser)
    return parser.parse_args()


def check(folder: Path) -> tuple[list[str], list[str]]:
    """Return (files of the submission, relative to `folder`; broken rules, a line each)."""
    broken: list[str] = []
    metadata = read_or_note(folder / "metadata.json", broken)
    table = read_or_note(folder / "paths.json", broken)
    paths = check_paths(folder / "paths.json", table, broken) if table is not None else []
    if metadata is not None:
        broken += check_metadata(folder / "metadata.json", metadata, len(paths))
    sizes = expected_sizes(metadata, len(paths))
    for path, size in progress(zip(paths, sizes), "check", len(paths)):
        problem = check_output(folder / path, size) if path is not None else None
        broken += [problem] if problem else []
    return [*(path for path in paths if path is not None), "paths.json", "metadata.json"], broken


def read_or_note(file: Path, broken: list[str]):
    """Return the object that a JSON file holds; None, and a line in `broken`, when it cannot be read or holds something else."""
    try:
        value = read_json(file)
        if not isinstance(value, dict):
            raise BadInput(f"{file}: expected a JSON object, found something else")
        return value
    except BadInput as error:
        broken.append(str(error))
        return None


def check_paths(file: Path, table, broken: list[str]) -> list[str | None]:
    """Return paths.json's output of every index from 0, None for one missing or odd, which is noted."""
    column = table.get("output") if isinstance(table, dict) else None
    if not isinstance(column, dict) or not column:
        broken.append(f'{file}: expected {{"output": {{"0": "outputs/00000.png", ...}}}}')
        return []
    expected = {str(index) for index in range(len(column))}
    broken += [f"{file}: index {key!r} is not a number from 0 to {len(column) - 1}" for key in sorted(column.keys() - expected)]
    broken += [f"{file}: index {key} is missing" for key in sorted(expected - column.keys(), key=int)]
    keys = sorted(expected, key=int)
    paths = [column[key] for key in keys if key in column]
    bad = [path for path in paths if not isinstance(path, str) or not re.fullmatch(r"outputs/[\w.-]+\.png", path)
           or not clips.is_name(path[8:])]
    broken += [f"{file}: {path!r} is not a PNG in outputs/" for path in bad]
    broken += [f"{file}: {path!r} is named {paths.count(path)} times" for path in sorted({p for p in paths if isinstance(p, str)})
               if paths.count(path) > 1] if len(set(map(str, paths))) < len(paths) else []
    return [column[key] if key in column and column[key] not in bad else None for key in keys]


def check_metadata(file: Path, metadata, outputs: int) -> list[str]:
    """Return the rules that metadata.json breaks."""
    count = metadata.get("nparams") if isinstance(metadata, dict) else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        return [f"{file}: 'nparams', the parameters of featurizer and decoder, is missing or not a whole number"]
    broken = [] if count < LIMIT else [f"{file}: nparams is {count:,}, the contest allows fewer than {LIMIT:,}"]
    frames = metadata.get("frames")
    if isinstance(frames, int) and outputs and frames != outputs:
        broken.append(f"{file}: speaks of {frames} frames, but paths.json of {outputs} outputs")
    return broken


def expected_sizes(metadata, count: int) -> list[tuple[int, int] | None]:
    """Return each output's (H, W) as metadata.json has it; None where it does not say."""
    metadata = metadata if isinstance(metadata, dict) else {}
    sizes = metadata.get("sizes") or [metadata.get("size")] * count
    sizes = [tuple(size) if isinstance(size, list) and len(size) == 2 else None for size in sizes] if isinstance(sizes, list) else []
    return (sizes + [None] * count)[:count]


def check_output(file: Path, size: tuple[int, int] | None) -> str | None:
    """Return the rule that one output breaks: there, decodable, 8-bit grey (mode L), of its frame's size; or None."""
    if not file.is_file():
        return f"{file}: no such file, though paths.json names it"
    try:
        pixels = clips.decode(file, None)
    except BadInput as error:
        return str(error)
    with open(file, "rb") as handle:
        head = handle.read(26)
    if head[:4] != b"\x89PNG" or head[24:26] != b"\x08\x00":  # bit depth 8, colour type 0
        return f"{file}: is not an 8-bit grey PNG (mode L)"
    if size and pixels.shape != size:
        return f"{file}: is {pixels.shape[1]} x {pixels.shape[0]}, its frame {size[1]} x {size[0]}"
    return None


def write_zip(folder: Path, names: list[str], out: Path, overwrite: bool) -> None:
    """Write the files `names` of `folder` into a zip, whole or not at all; PNGs are packed already and stored as they are."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    with whole_file(out, overwrite) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(".png") else zipfile.ZIP_DEFLATED
            archive.writestr(entry, (folder / name).read_bytes())


def main() -> int:
    args = parse_args()
    distributed.refuse_several("package.py")
    account = tracking.from_flags(args)
    folder, used = artifacts.fetch(args.results, account)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such results folder; evaluate.py makes one")
    out = args.out or (Path("results") / f"{artifacts.plain_name(used)}.zip" if used else folder.with_name(folder.name + ".zip"))
    if out.exists() and not args.overwrite:
        raise BadInput(f"{out}: is there already; pass --overwrite to replace it, or another --out")
    names, broken = check(folder)
    if broken:
        print("\n".join(map(one_line, broken)), file=sys.stderr)
        print(f"package.py: {folder} breaks {len(broken)} of the contest's rules; nothing was written", file=sys.stderr)
        return 1
    metadata = read_json(folder / "metadata.json")
    with tracking.start(account, "run-val" if metadata.get("annotated") else "run-test", plain(args)) as tracker:
        tracker.use(used)
        write_zip(folder, names, out, args.overwrite)
        tracking.log_results(tracker, metadata.get("decoder", "model"), {name: folder / name for name in names}, metadata)
    print(f"wrote {out}: {len(names) - 2} outputs, nparams {metadata['nparams']:,}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

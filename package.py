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

from models import LIMIT
from vos import cli, distributed
from vos.images import image_file
from vos.inputs import BadInput, is_name, opened, read_json
from vos.outputs import check_output, new_file

EPOCH = (1980, 1, 1, 0, 0, 0)  # every entry's date: the same results give the same bytes


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--results", required=True, help="folder written by evaluate.py, or wandb:...")
    parser.add_argument("--out", type=Path, help="zip to write (default: <results>.zip)")
    cli.add_run_flags(parser, computes=False)
    return parser.parse_args()


def check(folder: Path) -> tuple[list[str], dict, list[str]]:
    """Return (files of the submission, relative to `folder`; metadata; broken rules, a line each)."""
    broken: list[str] = []
    metadata = read_object(folder / "metadata.json", broken)
    table = read_object(folder / "paths.json", broken)
    outputs = check_paths(folder / "paths.json", table, broken)
    check_metadata(folder / "metadata.json", metadata, len(outputs), broken)

    sizes = metadata.get("sizes") or [metadata.get("size")] * len(outputs)
    if not isinstance(sizes, list) or len(sizes) != len(outputs):
        sizes = [None] * len(outputs)
    for output, size in cli.progress(list(zip(outputs, sizes)), "check"):
        try:
            check_output_file(folder / output, size)
        except BadInput as error:
            broken.append(str(error))
    return [*outputs, "paths.json", "metadata.json"], metadata, broken


def read_object(file: Path, broken: list[str]) -> dict:
    """Return the object that a JSON file holds; {} and a line in `broken` when it holds none."""
    try:
        value = read_json(file)
        if isinstance(value, dict):
            return value
        broken.append(f"{file}: expected a JSON object, found something else")
    except BadInput as error:
        broken.append(str(error))
    return {}


def check_paths(file: Path, table: dict, broken: list[str]) -> list[str]:
    """Return the outputs that paths.json names rightly, in order; the rest is noted in `broken`."""
    column = table.get("output")
    if not isinstance(column, dict) or not column:
        broken.append(f'{file}: expected {{"output": {{"0": "outputs/00000.png", ...}}}}')
        return []
    outputs: list[str] = []
    wanted = [str(index) for index in range(len(column))]
    broken += [f"{file}: index {key!r} is not a number from 0 to {len(column) - 1}"
               for key in sorted(set(column) - set(wanted))]
    for key in wanted:
        path = column.get(key)
        if key not in column:
            broken.append(f"{file}: index {key} is missing")
        elif not isinstance(path, str) or not re.fullmatch(r"outputs/[\w.-]+\.png", path, re.ASCII) \
                or not is_name(path[8:]):
            broken.append(f"{file}: {path!r} is not a PNG in outputs/")
        elif path in outputs:
            broken.append(f"{file}: {path!r} is named more than once")
        else:
            outputs.append(path)
    return outputs


def check_metadata(file: Path, metadata: dict, outputs: int, broken: list[str]) -> None:
    """Note the rules that metadata.json breaks."""
    count, frames = metadata.get("nparams"), metadata.get("frames")
    if type(count) is not int or count < 0:
        broken.append(f"{file}: 'nparams', the parameters of featurizer and decoder, is missing or not "
                      "a whole number")
    elif count >= LIMIT:
        broken.append(f"{file}: nparams is {count:,}, the contest allows fewer than {LIMIT:,}")
    if isinstance(frames, int) and outputs and frames != outputs:
        broken.append(f"{file}: speaks of {frames} frames, but paths.json of {outputs} outputs")


def check_output_file(file: Path, size: list[int] | None) -> None:
    """Raise BadInput unless an output can be decoded, is 8-bit grey, and of its frame's size."""
    with image_file(file) as image:
        found = [image.height, image.width]
        if image.format != "PNG" or image.mode != "L":
            raise BadInput(f"{file}: is not an 8-bit grey PNG (mode L)")
        image.load()
    if size and found != size:
        raise BadInput(f"{file}: is {found[1]} x {found[0]}, its frame {size[1]} x {size[0]}")


def write_zip(folder: Path, names: list[str], file: Path) -> None:
    """Write files of `folder` into a zip; PNGs are packed already and stored as they are."""
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            packed = name.endswith(".png")
            entry.compress_type = zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED
            with opened(folder / name) as source:
                archive.writestr(entry, source.read())


def main() -> int:
    args = parse_args()
    distributed.refuse_several()
    mode = cli.wandb_mode(args.wandb)
    used: list[str] = []
    folder = cli.fetch(args.results, mode, used)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such results folder; evaluate.py makes one")
    name = used[0].rpartition("/")[2].partition(":")[0] if used else folder.resolve().name
    out = args.out or (Path("results") if used else folder.parent) / f"{name}.zip"
    check_output(out, "submission", args.overwrite, [folder])

    names, metadata, broken = check(folder)
    if broken:
        cli.complain("\n".join(map(cli.one_line, broken)))
        cli.complain(f"package.py: {folder} breaks {len(broken)} of the contest's rules; nothing was "
                     "written")
        return 1
    job = "run-val" if metadata.get("annotated") else "run-test"
    with (cli.tracked(mode, job, vars(args), used) as tracker,
          new_file(out, "submission", args.overwrite, [folder]) as temporary):
        write_zip(folder, names, temporary)
        if tracker:
            from vos import tracking
            decoder = str(metadata.get("decoder", "model"))
            tracking.log_results(tracker, decoder, {name: folder / name for name in names}, metadata)
    cli.say(f"wrote {out}: {len(names) - 2} outputs, nparams {metadata['nparams']:,}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

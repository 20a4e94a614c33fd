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

OUTPUT = re.compile(r"outputs/[\w.-]+\.png", re.ASCII)
EPOCH = (1980, 1, 1, 0, 0, 0)  # every entry's date: the same results give the same bytes


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--results", required=True, help="folder written by evaluate.py, or wandb:...")
    parser.add_argument("--out", type=Path, help="zip to write (default: <results>.zip)")
    cli.add_run_flags(parser, computes=False)
    return parser.parse_args()


def check(folder: Path) -> tuple[list[str], dict, list[str]]:
    """Return (the outputs that paths.json names, in order; metadata; broken rules, a line each)."""
    broken: list[str] = []
    metadata, table = {}, {}
    try:
        metadata, table = read_json(folder / "metadata.json"), read_json(folder / "paths.json")
        outputs = [table["output"][str(index)] for index in range(len(table["output"]))]
        count, sizes = metadata.get("nparams"), metadata.get("sizes")
        sizes = sizes or [metadata.get("size")] * len(outputs)
        named = [isinstance(name, str) and is_name(name[8:]) and OUTPUT.fullmatch(name)
                 for name in outputs]
    except BadInput as error:
        return [], metadata, [str(error)]
    except (KeyError, TypeError, AttributeError):
        return [], metadata, [f'{folder / "paths.json"}: expected {{"output": {{"0": "outputs/00000.png", '
                              "...}}, its keys the numbers from 0 on, and an object in metadata.json"]

    if type(count) is not int or not 0 <= count < LIMIT:
        broken.append(f"{folder / 'metadata.json'}: nparams, the parameters of featurizer and decoder, "
                      f"is {count}; the contest allows fewer than {LIMIT:,}")
    if not outputs or metadata.get("frames", len(outputs)) != len(outputs):
        broken.append(f"{folder / 'metadata.json'}: speaks of {metadata.get('frames')} frames, but "
                      f"paths.json of {len(outputs)} outputs")
    for name, fine, size in zip(outputs, named, sizes):
        if not fine or outputs.count(name) > 1:
            broken.append(f"{folder / 'paths.json'}: {name!r} is not a PNG in outputs/ named once")
            continue
        try:
            check_output_file(folder / name, size)
        except BadInput as error:
            broken.append(str(error))
    return outputs, metadata, broken


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

    outputs, metadata, broken = check(folder)
    if broken:
        for line in broken:
            cli.complain(line)
        cli.complain(f"package.py: {folder} breaks {len(broken)} of the contest's rules; nothing was "
                     "written")
        return 1
    names = [*outputs, "paths.json", "metadata.json"]
    logged = cli.tracked(mode, "run-val" if metadata.get("annotated") else "run-test", vars(args), used)
    with new_file(out, "submission", args.overwrite, [folder]) as temporary, logged as log:
        write_zip(folder, names, temporary)
        if log:
            from vos import tracking
            decoder = str(metadata.get("decoder", "model"))
            tracking.log_results(log, decoder, {name: folder / name for name in names}, metadata)
    cli.say(f"wrote {out}: {len(outputs)} outputs, nparams {metadata['nparams']:,}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

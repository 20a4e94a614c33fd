"""Check a results folder against the contest's rules and make the submission from it.

    python package.py --results results/simple

writes results/simple.zip with outputs/, paths.json and metadata.json; nothing if a rule is broken.
"""
import argparse
import re
import sys
import zipfile
from pathlib import Path

from vos import cli
from vos.images import image_file
from vos.inputs import BadInput, read_json, read_paths
from vos.layers import LIMIT
from vos.outputs import check_output, locked, whole_file

OUTPUT = re.compile(r"outputs/[\w.-]{1,190}\.png", re.ASCII)


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--results", required=True, help="folder of evaluate.py, or wandb:...")
    parser.add_argument("--out", type=Path, help="zip to write (default: <results>.zip)")
    cli.add_run_flags(parser, computes=False)
    return parser.parse_args()


def check(folder: Path) -> tuple[list[str], dict]:
    """Return the outputs that paths.json names, and metadata.json. BadInput at a broken rule."""
    listed, described = folder / "paths.json", folder / "metadata.json"
    outputs, metadata = read_paths(listed).get("output", []), read_json(described)
    count, frames = metadata.get("nparams"), metadata.get("frames", len(outputs))
    sizes = metadata.get("sizes") or [metadata.get("size")] * len(outputs)
    if type(count) is not int or not 0 <= count < LIMIT:
        raise BadInput(f"{described}: nparams is {count}; the contest allows fewer than {LIMIT:,}, "
                       "of featurizer and decoder together")
    if not outputs or type(sizes) is not list or not len(outputs) == len(sizes) == frames:
        raise BadInput(f"{described}: speaks of {frames} frames, sizes {str(sizes)[:100]}, but "
                       f"{listed} of {len(outputs)} outputs")

    for name, size in zip(outputs, sizes):
        if not OUTPUT.fullmatch(name) or outputs.count(name) > 1:
            raise BadInput(f"{listed}: {name!r} is not a PNG in outputs/ named once")
        with image_file(folder / name) as image:
            if image.format != "PNG" or image.mode != "L":
                raise BadInput(f"{folder / name}: is not an 8-bit grey PNG (mode L)")
            image.load()
            found = [image.height, image.width]
            if size and found != size:
                raise BadInput(f"{folder / name}: is {found} (H, W), its frame {size}")
    return outputs, metadata


def main() -> None:
    args = parse_args()
    used: list[str] = []
    folder = cli.fetch(args.results, args.wandb, used)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such results folder; evaluate.py makes one")
    name = (folder.parent if used else folder.resolve()).name
    out = args.out or (Path("results") if used else folder.parent) / f"{name}.zip"
    check_output(out, "submission", args.overwrite, [folder])
    outputs, metadata = check(folder)

    files = {name: folder / name for name in [*outputs, "paths.json", "metadata.json"]}
    job = "run-val" if metadata.get("annotated") else "run-test"
    logged = cli.tracked(args.wandb, job, vars(args), used)
    with locked(out), whole_file(out) as temporary, logged as log:
        check_output(out, "submission", args.overwrite, [folder])  # made just before by another?
        with zipfile.ZipFile(temporary, "w") as archive:  # not deflated: PNGs are already
            for entry in map(zipfile.ZipInfo, files):  # dated 1980, for the same bytes always
                archive.writestr(entry, files[entry.filename].read_bytes())
        if log:
            log.artifact(f"{metadata.get('decoder', 'model')}-result", "result", files, metadata)
    cli.say(f"wrote {out}: {len(outputs)} outputs, nparams {metadata['nparams']:,}")


if __name__ == "__main__":
    sys.exit(cli.run(main))

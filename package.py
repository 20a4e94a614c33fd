"""Check a results folder against the contest's rules and make the submission from it.

    python package.py --results results/simple

writes results/simple.zip with outputs/, paths.json and metadata.json. Broken rules are all listed,
and the exit status is then 1.
"""
import argparse
import itertools
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


def check(folder: Path) -> tuple[list[str], dict, list[str]]:
    """Return (the outputs that paths.json names, metadata, broken rules, a line each)."""
    listed, described = folder / "paths.json", folder / "metadata.json"
    try:
        outputs, metadata = read_paths(listed).get("output", []), read_json(described)
        count, frames = metadata.get("nparams"), metadata.get("frames", len(outputs))
        sizes = metadata.get("sizes") or [metadata.get("size")] * len(outputs)
        shapes = [size and f"{size[1]} x {size[0]}" for size in sizes]
    except BadInput as error:
        return [], {}, [str(error)]
    except (AttributeError, LookupError, TypeError) as error:
        return [], {}, [f"{described}: expected what evaluate.py writes ({error})"]

    broken = []
    if type(count) is not int or not 0 <= count < LIMIT:
        broken.append(f"{described}: nparams is {count}; the contest allows fewer than {LIMIT:,}, "
                      "of featurizer and decoder together")
    if not outputs or not len(outputs) == len(shapes) == frames:
        broken.append(f"{described}: speaks of {frames} frames, but {listed} of {len(outputs)}")
    for name, shape in itertools.zip_longest(outputs, shapes[:len(outputs)]):
        try:
            if not OUTPUT.fullmatch(name) or outputs.count(name) > 1:
                raise BadInput(f"{listed}: {name!r} is not a PNG in outputs/ named once")
            with image_file(folder / name) as image:
                if image.format != "PNG" or image.mode != "L":
                    raise BadInput(f"{folder / name}: is not an 8-bit grey PNG (mode L)")
                image.load()
                found = f"{image.width} x {image.height}"
                if shape and found != shape:
                    raise BadInput(f"{folder / name}: is {found}, its frame {shape}")
        except BadInput as error:
            broken.append(str(error))
    return outputs, metadata, broken


def main() -> int:
    args = parse_args()
    mode = cli.wandb_mode(args.wandb)
    used: list[str] = []
    folder = cli.fetch(args.results, mode, used)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such results folder; evaluate.py makes one")
    name = (folder.parent if used else folder.resolve()).name
    out = args.out or (Path("results") if used else folder.parent) / f"{name}.zip"
    check_output(out, "submission", args.overwrite, [folder])

    outputs, metadata, broken = check(folder)
    if broken:
        broken.append(f"package.py: {folder} breaks {len(broken)} of the contest's rules; nothing "
                      "was written")
        for line in broken:
            cli.complain(line)
        return 1
    names = [*outputs, "paths.json", "metadata.json"]
    job = "run-val" if metadata.get("annotated") else "run-test"
    logged = cli.tracked(mode, job, vars(args), used)
    with locked(out), whole_file(out) as temporary, logged as log:
        check_output(out, "submission", args.overwrite, [folder])  # made just before by another?
        with zipfile.ZipFile(temporary, "w") as archive:  # not deflated: PNGs are already
            for entry in map(zipfile.ZipInfo, names):  # dated 1980, for the same bytes always
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, (folder / entry.filename).read_bytes())
        if log:
            files = {name: folder / name for name in names}
            log.artifact(f"{metadata.get('decoder', 'model')}-result", "result", files, metadata)
    cli.say(f"wrote {out}: {len(outputs)} outputs, nparams {metadata['nparams']:,}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Going on with a run that was stopped."""
import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from vos.inputs import BadInput, read_json
from vos.outputs import write_text
from vos.runs import code_revision, load_checkpoint, read_log


def recall(run: Path, parser: argparse.ArgumentParser, given: argparse.Namespace,
           may_change: Sequence[str]) -> argparse.Namespace:
    """Return a run's arguments parsed anew, with those of `may_change` as `given`. BadInput."""
    file, flags = run / "args.json", []
    saved = read_json(file)
    try:
        for name, value in {**saved["args"], **saved["recipe"], "out": run}.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                flags.append(flag)
            elif value is not None and value is not False:
                flags.append(f"{flag}={','.join(value) if isinstance(value, list) else value}")
        args = parser.parse_args(flags)
    except (BadInput, TypeError, KeyError) as error:
        raise BadInput(f"{file}: is not what train.py writes ({error})") from error

    for name, value in vars(given).items():
        if name in may_change:
            setattr(args, name, value)
        elif value not in (parser.get_default(name), getattr(args, name)):
            raise BadInput(f"{file}: the run has --{name.replace('_', '-')} {getattr(args, name)}, "
                           f"not {value}; leave the flag out, or start another run")
    if saved.get("code") != code_revision():
        print(f"note: {run} was started by another revision of the code: {saved.get('code')}")
    return args


def load_state(out: Path, parts: dict, state: dict, write: bool) -> dict:
    """Put `parts` back as last.pt has them; return its counters. write: cut the log to them."""
    if (out / "last.pt").exists():
        saved = load_checkpoint(out / "last.pt", {*parts, "run"})
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            state = {name: type(value)(saved["run"][name]) for name, value in state.items()}
            state["losses"] = [loss.float() for loss in state["losses"]]
        except Exception as error:  # a damaged state can break what loads it in any way
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadInput(f"{out / 'last.pt'}: does not fit this run ({reason}); remove it to go "
                           "on from the start") from error
    if write:
        rows = [row for row in read_log(out) if row["step"] < state["step"]]
        write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return state

"""What a run checks before it starts: its folder, a lock on it, its inputs, and what --resume continues from."""

import dataclasses
import fcntl
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import dist, nets
from common.judges import ROOT
from data.files import InputError, sources
from data.tokenizer import encoding_from_state

INPUTS = ("data", "eval_data", "init", "ref", "reward", "judge")  # options that name what a run reads
MAY_DIFFER = ("resume", "device", "out", "save_every", "kl_stop", *INPUTS)  # in a resumed run
VERSION = 3  # of state.pt
ANEW = "start anew without --resume"


def check_out(cfg: Any) -> None:
    """Raises InputError if --out cannot become a run folder: it is an input, or it holds other files."""
    out, ours = Path(cfg.out), ("metrics.jsonl", "model.pt")
    given = {name: getattr(cfg, name, "") for name in ("init", "ref", "reward")}
    for name, source in ((name, Path(each or "/")) for name, names in given.items() for each in names.split(",")):
        if out.resolve() in (source.resolve(), source.parent.resolve() if source.suffix == ".pt" else None):
            raise InputError(f"--out {out}: is --{name} too; name another folder, so that it is not overwritten")
    try:
        foreign = out.exists() and any(path.suffix != ".tmp" for path in out.iterdir())
    except OSError as error:
        raise InputError(f"--out {out}: cannot be a folder ({error.strerror}); name another") from None
    if out.resolve() == Path.cwd() or foreign and not any((out / name).exists() for name in ours):
        raise InputError(f"--out {out}: not empty and not a run folder; name another, so that no file is lost")


def lock(out: Path) -> Any:
    """An open file whose lock says that a run writes to `out`. The system drops it when the process ends, however.

    Raises InputError if another process holds it, or if nothing can be written there.
    """
    path = out.with_name(f".{out.resolve().name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not os.access(out, os.W_OK):
            raise PermissionError(13, "Permission denied")
        file = open(path, "a")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {out}: another run writes to it; wait for its end, or name another folder") from None
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from None
    return file


def read_state(cfg: Any, inputs: dict[str, str]) -> dict | None:
    """What --resume continues from, or None if there is nothing. Raises InputError if it is of another run.

    `inputs` are the fingerprints of what the options name now.
    """
    path, options = Path(cfg.out) / "state.pt", dataclasses.asdict(cfg)
    if not path.exists():
        dist.print0(f"nothing to resume in {cfg.out}, so this starts from the beginning")
        return None
    state = load_state(path)
    for name, before in state["options"].items():
        if name not in MAY_DIFFER and options.get(name) != before:
            raise InputError(f"--resume: {path} was made with --{name} {before}; give the same options")
    if state["processes"] != dist.WORLD:
        raise InputError(f"--resume: {path} was made by {state['processes']} processes; start as many")
    for name, now in inputs.items():
        if now != state["inputs"].get(name, now):
            what = f"--{name} {options[name]} has changed since {path} was made, by its contents"
            raise InputError(f"--resume: {what}; bring back what it was, or {ANEW}")
    return state


def load_state(path: Path) -> dict:
    """A state.pt, with its tokenizer as "encoding". Raises InputError if it is damaged, or of another version."""
    state = nets.read_checkpoint(path, ANEW)
    if state.get("version") != VERSION:
        raise InputError(f"--resume: {path} is of another version of this project; {ANEW}")
    return state | {"encoding": encoding_from_state(state["tokenizer"])}


def fingerprint(names: str) -> str:
    """The sha256 of files of data, of run folders' model.pt, or of the files of functions; "" where there is none."""
    digests = []
    for name in filter(None, [names] if Path(names).exists() else names.split(",")):
        file = name.rpartition(":")[0] if ".py:" in name else name
        paths = [path for path in (Path(file) / "model.pt", Path(file), ROOT / file) if path.is_file()][:1]
        with suppress(InputError):  # of a folder without data
            paths = paths or [path for path in sources(file) if path.is_file()]
        for path in paths:
            with open(path, "rb") as opened:
                digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return " ".join(digests)


def started_from(out: str, init: str) -> bool:
    """Whether the run in `out` started from the model that is in `init` now."""
    path = Path(out) / "state.pt"
    if not path.exists():
        return True
    return load_state(path)["inputs"].get("init") == fingerprint(init)

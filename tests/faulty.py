"""Runs a script that dies: `faulty.py kill=N ppo.py …` by SIGKILL before its N-th change of a file, `full=BYTES` on a
disk that holds no larger file. `count` lets it live and prints how many changes there are. No page is written.
"""

import importlib
import os
import resource
import runpy
import signal
import sys

CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def changes(event: str, args: tuple) -> bool:
    """Whether an audit event is the script about to change a file in the current folder."""
    if event not in CHANGES or not isinstance(args[0], (str, bytes, os.PathLike)):
        return False
    reads = event == "open" and isinstance(args[1], str) and args[1].startswith("r")
    return not reads and os.path.abspath(os.fsdecode(args[0])).startswith(os.getcwd() + os.sep)


def main() -> None:
    kind, _, number = sys.argv[1].partition("=")
    sys.argv = sys.argv[2:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    seen = 0

    def count(event: str, args: tuple) -> None:
        nonlocal seen
        if not changes(event, args):
            return
        seen += 1
        if kind == "kill" and seen == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    if kind == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))
    runs = importlib.import_module("common.runs")
    runs.SAVE_SECONDS = 1e9  # so that the clock does not decide how many changes there are
    runs.write_page = lambda folder: None  # which takes longer than the run
    sys.addaudithook(count)
    runpy.run_path(sys.argv[0], run_name="__main__")
    if kind == "count":
        print(f"changes: {seen}")


if __name__ == "__main__":
    main()

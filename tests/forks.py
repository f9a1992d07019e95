"""Runs scripts in forks of one process that has loaded torch: loading it takes longer than most scripts of the tests.

A line of JSON comes in (argv, cwd, env, files for stdout and stderr, and whether the script writes its page), the exit
code goes out. `python tests/forks.py SCRIPT …` runs one script, as torchrun needs it. By default no page is written: a
Python of its own would load torch for it.
"""

import json
import os
import runpy
import signal
import sys
import traceback

import numpy  # noqa: F401
import tiktoken  # noqa: F401
import torch
import torch._dynamo  # noqa: F401 (the first optimizer would load it)


def script(argv: list[str], page: bool) -> int:
    """Run a script in this process as `python argv[0] …` would. Returns its exit code."""
    sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
    try:
        if not page:
            from common import runs  # of the script's own project, which may be a copy

            runs.write_page = lambda folder: None
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(argv: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str, page: bool) -> int:
    """Run a script in this process, which is a fork, with its own folder, environment and streams."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.alarm(900)
    return script(argv, page)


def serve() -> None:
    for line in sys.stdin:
        if not (child := os.fork()):
            code = fork(**json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(script(sys.argv[1:], page=False)) if sys.argv[1:] else serve()

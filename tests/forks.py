"""Runs scripts in forks of one process that has loaded torch: loading it takes longer than most scripts of the tests.

A line of JSON comes in (argv, cwd, env, and files for stdout and stderr), the exit code goes out.
"""

import json
import os
import runpy
import signal
import sys
import traceback

import numpy  # noqa: F401
import tiktoken  # noqa: F401
import torch  # noqa: F401


def script(argv: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str) -> int:
    """Run a script in this process as `python argv[0] …` would. Returns its exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
    signal.alarm(900)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for line in sys.stdin:
    if not (child := os.fork()):
        code = script(**json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

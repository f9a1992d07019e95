"""Runs scripts in forks of one process that has loaded torch: loading it takes longer than most scripts of the tests.

A line of JSON comes in (argv, cwd, env, files for stdout and stderr, the number of processes, and whether the script
writes its page, which costs a Python that loads torch), the exit code goes out.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback

import numpy  # noqa: F401
import tiktoken  # noqa: F401
import torch._dynamo  # noqa: F401 (the first optimizer would load it)


def script(argv: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str, page: bool) -> int:
    """Run a script in this process as `python argv[0] …` would. Returns its exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
    signal.alarm(900)
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


def start(job: dict) -> int:
    """The id of a fork that runs a script."""
    if not (child := os.fork()):
        code = script(**job)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child


def start_two(job: dict) -> int:
    """What `torchrun --nproc_per_node=2` does: two processes; if one fails, the other is ended, and the code is 1."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    children = {start(job | {"env": job["env"] | world | {"RANK": rank, "LOCAL_RANK": rank}}) for rank in "01"}
    failed, patience = 0, 0.0
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        children.discard(child)
        if child and os.waitstatus_to_exitcode(status):
            failed, patience = 1, time.time() + 30
            for other in children:
                os.kill(other, signal.SIGTERM)
        if failed and time.time() > patience:
            for other in children:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    return failed


for line in sys.stdin:
    job = json.loads(line)
    two = job.pop("processes") == 2
    code = start_two(job) if two else os.waitstatus_to_exitcode(os.waitpid(start(job), 0)[1])
    print(code, flush=True)

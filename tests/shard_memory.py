"""Memory of each process of stage 3 at GPT-2's size, whole and with --shard, in an iteration after the first.

    torchrun --nproc_per_node=2 -m tests.shard_memory             every process holds the four nets
    torchrun --nproc_per_node=2 -m tests.shard_memory --shard     they are divided over the processes

Weights are random. What torch and Python take before there is a net is not counted.
"""

import copy
import sys
import threading
import time
from pathlib import Path

import common
import ppo
from common import dist as processes
from model import GPT, GPTConfig, ScalarModel


def resident() -> float:
    """Memory of this process now, in GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**30


def main() -> None:
    processes.keep_memory = lambda: None  # freed memory goes back to the system, so that it is not counted
    size = {"batch_size": 4, "minibatch_size": 4, "response_len": 16}
    cfg = ppo.Config(device="cpu", shard="--shard" in sys.argv, **size)
    _, autocast = common.setup(cfg)
    before = resident()
    policy = GPT(GPTConfig()).eval()
    reward = ScalarModel(copy.deepcopy(policy)).eval()
    ref = common.shard(common.freeze(copy.deepcopy(policy), autocast), cfg)
    value = common.shard(copy.deepcopy(reward), cfg)
    reward = common.shard(common.freeze(reward, autocast), cfg)
    policy = common.shard(policy, cfg)
    optimizers = [common.adamw(net, 1e-5, 0.0) for net in (policy, value)]
    prompts = [[i + 1] * 16 for i in range(cfg.batch_size // common.WORLD)]
    highest = {"rollout": 0.0, "score": 0.0, "update": 0.0, "at rest": 0.0}
    phase = "at rest"

    def watch() -> None:
        while True:
            highest[phase] = max(highest[phase], resident() - before)
            time.sleep(0.01)

    for step in range(2):
        if step == 1:
            highest["at rest"] = resident() - before
            threading.Thread(target=watch, daemon=True).start()
        phase = "rollout"
        batch = ppo.rollout(common.whole(policy), prompts, cfg, common.generator(step))
        phase = "score"
        batch |= ppo.read(batch, policy, ref, value, ppo.scorer(reward, None, 50256), cfg)
        batch |= ppo.estimate(batch, 0.05, -1.0, cfg)
        phase = "update"
        ppo.update(policy, value, *optimizers, batch, 1e-5, cfg, autocast, step)
        phase = "at rest"
    shown = ", ".join(f"{name} {gib:.2f}" for name, gib in highest.items())
    print(f"process {common.RANK}: {shown} GiB", flush=True)


if __name__ == "__main__":
    common.run_main(main)

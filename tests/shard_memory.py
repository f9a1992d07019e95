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

import ppo
from common import cli, dist, nets
from data.rng import generator
from model import GPT, GPTConfig, ScalarModel


def resident() -> float:
    """Memory of this process now, in GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**30


def main() -> None:
    cli.keep_memory = lambda: None  # freed memory goes back to the system, so that it is not counted
    size = {"batch_size": 4, "minibatch_size": 4, "response_len": 16}
    cfg = ppo.Config(device="cpu", shard="--shard" in sys.argv, **size)
    _, autocast = cli.setup(cfg)
    before = resident()
    policy = GPT(GPTConfig()).eval()
    reward = ScalarModel(copy.deepcopy(policy)).eval()
    ref, value = nets.freeze(copy.deepcopy(policy), autocast), copy.deepcopy(reward)
    reward = nets.freeze(reward, autocast)
    cli.prepare(cfg, policy, ref, value, reward)
    optimizers = [nets.adamw(net, 1e-5, 0.0) for net in (policy, value)]
    prompts = [[i + 1] * 16 for i in range(cfg.batch_size // dist.WORLD)]
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
        batch = ppo.rollout(dist.gathered(policy), prompts, cfg, generator(step))
        phase = "score"
        batch |= ppo.read(batch, policy, ref, value, ppo.scorer(reward, None, 50256, cfg), cfg)
        batch |= ppo.estimate(batch, 0.05, cfg)
        phase = "update"
        ppo.update(policy, value, *optimizers, batch, 1e-5, 1e-5, cfg, autocast, step)
        phase = "at rest"
    shown = ", ".join(f"{name} {gib:.2f}" for name, gib in highest.items())
    print(f"process {dist.RANK}: {shown} GiB", flush=True)


if __name__ == "__main__":
    cli.run_main(main)

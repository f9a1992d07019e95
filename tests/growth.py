"""How time and memory of a PPO iteration grow, and what a training step and an update spend their time on."""

import json
import math

import torch

import fast
from tests.contenders import OURS, make_gpt, ppo_iterations, train
from tests.measure import alone, limits

AXES = {
    "batch": [16, 32, 64, 128],
    "response length": [32, 64, 128, 256],
    "vocabulary": [1024, 4096, 16384, 65536],
    "parameters": [128, 256, 384, 512],  # by width
}
NAMES = {
    "train": "stage 1: step",
    "reward": "stage 2: step",
    "rollout": "stage 3: rollout",
    "score": "score",
    "update": "update",
    "own_GiB": "memory",
}


def growth(device: torch.device, target: str) -> None:
    """Time and memory of each stage at four points of each axis; the exponent is the power law's from end to end.

    Stages 1 and 2 take one step on as many rows, or pairs of rows, as stage 3 has prompts. What does not vary stays at
    32 prompts of 16 tokens, 32 new tokens, a vocabulary of 1,024 and 128 channels. Memory is what an iteration of PPO
    adds to an interpreter with torch.
    """
    curves = []
    for axis, points in AXES.items():
        found: list[dict] = []
        for x in points:
            at = {"batch": 32, "response length": 32, "vocabulary": 1024, "parameters": 128} | {axis: x}
            shape = f"{at['vocabulary']}x4x4x{at['parameters']}"
            batch, length = at["batch"], 16 + at["response length"]
            found.append(alone(OURS, "ppo", shape, batch, 4, 16, length - 16, device=device))
            for what in ("train", "reward"):
                found[-1][what] = alone(OURS, what, shape, batch, length, device=device)["step_s"]
        if axis == "parameters":
            nets = [make_gpt(f"1024x4x4x{x}", 48, torch.device("cpu")) for x in points]
            points = [sum(p.numel() for p in net.parameters()) for net in nets]
        line: dict = {"what": "growth", "with": axis, "at": points}
        for key in NAMES:
            values = [each[key] for each in found]
            line[key] = [round(value, 4) for value in values]
            line[f"{key}_exponent"] = round(math.log(values[-1] / values[0]) / math.log(points[-1] / points[0]), 2)
        curves.append(line)
        print(json.dumps(line), flush=True)
    if target:
        draw(curves, target)


def draw(curves: list[dict], target: str) -> None:
    from experiments.harness import label_ends, pyplot, save

    figure, axes = pyplot().subplots(2, 2, figsize=(9, 7), layout="constrained", sharey=True)
    for axis, line in zip(axes.flat, curves):
        ends = {}
        for i, (key, name) in enumerate(NAMES.items()):
            style = dict(color=f"C{i}", marker="o", linestyle="--" if key == "own_GiB" else "-")
            axis.loglog(line["at"], line[key], **style)
            ends[f"{name} {line[f'{key}_exponent']:.2f}"] = line["at"][-1], line[key][-1], f"C{i}"
        axis.set(xlabel=line["with"], ylabel="seconds; GiB (dashed)")
        axis.set_xticks(line["at"], [f"{x / 1e6:.1f}M" if x >= 1e5 else f"{x:,}" for x in line["at"]])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        label_ends(axis, ends)
    figure.suptitle("behind each line the exponent of its power law", fontsize="medium")
    save(figure, target)


def profile(name: str, device: torch.device) -> None:
    """Shares of a training step and of an epoch of PPO's update, by kernel; and how near the products come to the peak.

    What the profiler itself allocates breaks up the memory that is kept; so there is plenty of it from the start, lest
    clearing new pages be counted as work.
    """
    batch, minibatches, rows = (8, 2, 8) if "gpt2" in name else (64, 4, 32)
    if device.type == "cpu":
        fast.keep_memory()
        torch.empty(2**31 if "gpt2" in name else 2**29).fill_(0)
    peak = limits(device)["products"] / 1e9
    families = {"attention": ("attention", "bmm", "softmax"), "products": ("mm", "mkldnn")}
    families |= {"activation": ("gelu", "GELU", "sigmoid", "pow", "addcmul")}
    families |= {"norms": ("layer_norm",), "optimizer": ("adam", "foreach"), "copies": ("copy_", "fill_", "::cat")}
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for what in ("train", "update"):
        found = torch.profiler.profile(record_shapes=True, with_flops=True)
        if what == "train":
            step, _ = train(OURS, name, rows, 64, device)
            step(), step()
            with found:
                step()
        else:
            ppo_iterations(OURS, name, batch, minibatches, 16, 32, device=device, n=2, epochs=1, watch=found)
        spent: dict[str, float] = dict.fromkeys([*families, "other"], 0.0)
        flops = 0.0
        for event in found.key_averages(group_by_input_shape=True):
            if event.device_type != torch.autograd.DeviceType.CPU:
                continue  # a kernel, which its operator counts already
            family = next((f for f, parts in families.items() if any(part in event.key for part in parts)), "other")
            flops += event.flops * (family == "products")
            if "linear_pointwise" in event.key:  # which the profiler does not count: x (…, I), W (O, I)
                flops += 2 * event.count * math.prod(event.input_shapes[0]) * event.input_shapes[1][0]
            spent[family] += getattr(event, time_of) / 1e6  # seconds
        whole = sum(spent.values())
        line = {"what": "profile", "of": what, "shape": name, "seconds": round(whole, 3)}
        line |= {family: round(seconds / whole, 3) for family, seconds in spent.items()}
        line |= {"products_GFLOPs": round(flops / spent["products"] / 1e9), "peak_GFLOPs": round(peak)}
        print(json.dumps(line))

"""The curves of a run: curves.png, a few panels of metrics that belong together. Needs matplotlib."""

from pathlib import Path

# A panel: its title, the name of its y axis, and its metrics with their labels. Held-out ones are drawn as points.
SFT = [
    ("loss", "nats a token", {"loss/train": "training", "loss/held_out": "held out"}),
    ("gradient norm before clipping", "norm", {"grad_norm": ""}),
    ("learning rate", "rate", {"lr": ""}),
    ("speed", "tokens a second", {"tokens_per_s": ""}),
]
ACCURACY = {"accuracy": "training", "eval/accuracy": "held out", "eval/accuracy_ceiling": "ceiling"}
REWARD = [
    ("loss", "nats a pair", {"loss/train": "training", "eval/loss": "held out"}),
    ("accuracy", "share of pairs", ACCURACY),
    ("gradient norm before clipping", "norm", {"grad_norm": ""}),
]
SCORE = {"objective/scores": "score", "objective/rlhf_reward": "score − β KL", "eval/score": "score, held out"}
UPDATE = {"policy/clipfrac_avg": "share of clipped tokens", "policy/approxkl_avg": "KL to before (nats a token)"}
PPO = [
    ("score and reward", "score", SCORE),
    ("judge, never trained on", "judge", {"objective/judge": "rollouts", "eval/judge": "held out"}),
    ("KL to the frozen copy", "nats a response", {"objective/kl": "mean", "eval/kl": "held out"}),
    ("score against KL", "score, early iterations pale", {}),
    ("largest KL of a response", "nats", {"objective/kl_max": ""}),
    ("how far an update goes", "share, or nats", UPDATE),
    ("ratio of new to old policy", "mean ratio", {"val/ratio": ""}),
    ("value net", "share of variance explained", {"value/explained_variance": ""}),
    ("gradient norms before clipping", "norm", {"policy/grad_norm": "policy", "value/grad_norm": "value net"}),
    ("entropy of the next token", "nats", {"token_entropy": ""}),
    ("length of a response", "tokens", {"response_len": ""}),
    ("ended by EOS", "share of responses", {"val/num_eos_tokens": ""}),
    ("β", "reward a nat", {"kl_coef": ""}),
]
AT_LEAST = {"val/ratio": (0.95, 1.05), "val/num_eos_tokens": (0.0, 1.02)}  # what the y axis shows, or more
POINTS = ("eval/", "loss/held_out")


def curves(lines: list[dict], target: Path, title: str = "", calibration: list[list[float]] = ()) -> None:
    """Draw the metrics of `lines`, those of a metrics.jsonl, into `target`. A panel that never changes is left out.

    `calibration` holds the rows of reward.py's table: (from, to, pairs, mean predicted, observed win rate).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kind = kind_of(lines)
    panels = [panel for panel in kind if not panel[2] or any(varies(lines, name) for name in panel[2])]
    if kind is PPO and not varies(lines, "objective/kl"):
        panels = [panel for panel in panels if panel[2]]
    n = len(panels) + bool(calibration)
    columns = 2 if n <= 4 else 3
    rows = -(-n // columns) or 1
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    unit = "iteration" if kind is PPO else "step"
    for axis, (name, label, metrics) in zip(axes.flat, panels):
        axis.set(title=name, ylabel=label, xlabel=unit)
        if not metrics:
            path(axis, lines)
        for i, (metric, text) in enumerate(metrics.items()):
            series(axis, lines, metric, text, f"C{i}")
            if metric in AT_LEAST:
                low, high = axis.get_ylim()
                axis.set_ylim(min(low, AT_LEAST[metric][0]), max(high, AT_LEAST[metric][1]))
        if any(metrics.values()):
            axis.legend(frameon=False, fontsize=8)
    if calibration:
        reliability(axes.flat[len(panels)], calibration)
    for axis in axes.flat[:n]:
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[n:]:
        axis.axis("off")
    figure.savefig(target, dpi=100)
    pyplot.close(figure)


def kind_of(lines: list[dict]) -> list[tuple]:
    """The panels of the stage that wrote these metrics."""
    names = set().union(*lines)
    return PPO if "objective/kl" in names else REWARD if "accuracy" in names else SFT


def values(lines: list[dict], name: str) -> list[tuple[int, float]]:
    return [(line["step"] + 1, line[name]) for line in lines if name in line]


def varies(lines: list[dict], name: str) -> bool:
    return len({x for _, x in values(lines, name)}) > 1


def series(axis, lines: list[dict], name: str, label: str, colour: str) -> None:
    """The raw numbers pale, and over them their running mean; measured points as points."""
    if not (points := values(lines, name)):
        return
    steps, raw = zip(*points)
    if name.startswith(POINTS):
        axis.plot(steps, raw, "o", color=colour, markersize=4, label=label)
        return
    reach = len(raw) // 30  # of the mean, in steps to either side
    near = [raw[max(0, i - reach) : i + reach + 1] for i in range(len(raw))]
    smooth = [sum(part) / len(part) for part in near]
    axis.plot(steps, raw, color=colour, alpha=0.3, linewidth=1)
    axis.plot(steps, smooth, color=colour, linewidth=1.6, label=label)


def path(axis, lines: list[dict]) -> None:
    """Where the run went: each iteration a point, later ones darker."""
    axis.set_xlabel("KL to the frozen copy (nats a response)")
    kl, score = ([line[name] for line in lines] for name in ("objective/kl", "objective/scores"))
    axis.plot(kl, score, color="0.8", linewidth=0.8, zorder=1)
    axis.scatter(kl, score, c=range(len(kl)), cmap="Blues", s=18, edgecolors="0.5", linewidths=0.3, zorder=2)


def reliability(axis, table: list[list[float]]) -> None:
    """Predicted against observed win rate; a larger dot stands for more pairs."""
    most = max(row[2] for row in table)
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
    axis.scatter([row[3] for row in table], [row[4] for row in table], s=[8 + 80 * row[2] / most for row in table])
    axis.set(title="reliability, held out", xlabel="predicted win rate", ylabel="observed win rate")

"""The curves of a run. Needs matplotlib."""

from pathlib import Path


def curves(lines: list[dict], target: Path) -> None:
    """Draw every metric of `lines`, those of a metrics.jsonl, over the steps, into `target`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    skipped = ("step", "episode", "lr")
    names = sorted({k for line in lines for k in line if k not in skipped and not k.startswith("time/")})
    columns = min(4, len(names)) or 1
    rows = -(-len(names) // columns) or 1
    size = (3.6 * columns, 2.4 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names):
        points = [(line["step"] + 1, line[name]) for line in lines if name in line]
        axis.plot(*zip(*points), linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)

"""The page of the atlas: experiments/atlas.md and its figures, made of results/atlas.json and the table of mistakes."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import ppo
from experiments.harness import JUDGE, KL, markdown, pyplot, read_results, save

HERE = Path(__file__).parent
KEPT = {  # of each run → its metric
    "judge": "objective/judge", "score": "objective/scores", "KL": "objective/kl", "ratio": "policy/ratio",
    "approxkl": "policy/approxkl", "explained variance": "value/explained_variance", "entropy": "token_entropy",
    "length": "response_len", "ended": "ended",
}  # fmt: skip
DRAWN = ("judge", "score", "KL", "explained variance", "length")
ENDS = {"judge": JUDGE, "score": "score", "KL": KL}  # of the closing table
COST, PAY = 0.02, 0.05  # what counts as a cost, on each seed: of judge, or of the way to J*; of score − β KL
Form = tuple[str, str, dict[str, str]]
FRONT = {  # of the figure on README: what is seen → form, curve
    "KL below 0": ("6b", "KL"),
    "KL leaps": ("28b", "KL"),
    "the score does not rise": ("28a", "score"),
    "explained variance stays low": ("5a", "explained variance"),
    "answers do not end": ("26a", "length"),
    "silent: twice the KL": ("14b", "KL"),
}
SYMPTOMS: dict[str, Callable[[dict], bool]] = {  # what is seen without judge and without a right run; the first counts
    "The run stops": lambda run: "failed" in run,
    "KL is not 0, or the ratio not 1, before the policy has moved": lambda run: (
        max(abs(run["KL"]["first"]), run["approxkl"]["first"], abs(run["ratio"]["first"] - 1)) > 0.01
    ),
    "KL is below 0": lambda run: run["KL"]["lowest"] < -0.3,
    "Answers end too rarely": lambda run: run["ended"]["last"] < 0.9,
    "The score does not rise": lambda run: run["score"]["last"] < run["score"]["first"] + 0.5,
    "KL leaps": lambda run: run["KL"]["highest"] > 10,
    "The ratio leaves 1": lambda run: run["ratio"]["highest"] > 1.02 or run["ratio"]["lowest"] < 0.98,
    "Explained variance stays low": lambda run: run["explained variance"]["last"] < 0.2,
}
MISSED = "KL ends above twice its target"
SILENT, FREE, INERT = "Silent: it costs, and no curve says so", "Costs nothing measurable", "Changes no number here"
HEAD = """# An atlas of mistakes

*My curves look like this: what is wrong?* Known mistakes of RLHF code, each made in a copy of this project and run
beside the right run: the tales, seeds {seeds}, 64 iterations, the default options unless a row names others{letters}.
Find what you see, then compare the lines. `python -m experiments.atlas` makes this page.

| of {n} forms | |
|---|---|
| show in the log of a seed, without a judge and without a right run beside it | {plain} |
| are silent: our thresholds do not see them, and they cost | {silent} |
| cost nothing measurable | {free} |
| change no number at these options | {inert} |
| of all, the log calls impossible in a sentence | {alarmed} |

A form has the number of its mistake and a letter. Judge, score and KL are those of the policy at the end, by the right
code, on 512 held-out prompts. The other columns are what the log says, mistake and all: the score, the KL of the worst
iteration, and the ratio that is furthest from 1; score, explained variance, entropy (nats per token), length (tokens)
and the share of answers that ended are means of the last four iterations.

What the log shows is decided by a threshold for each heading, which no right run passes. A mistake costs if it loses,
on each seed, {cost} of judge or {pay} of score − β KL; or if it loses {cost} of the way from J(π₀) to J\\*. Share is
that part of the way, and TV the distance to π\\*. In the figures the right run is grey; a line is a seed.

{chance}"""


def runs_of(form: dict) -> list[dict]:
    return [run for world, run in form.items() if world != "options" and ("KL" in run or "failed" in run)]


def seeds_of(form: dict) -> list[dict]:
    return [run for world, run in form.items() if world not in ("options", "letters")]


def right_of(form: dict, found: dict) -> dict:
    """The right run with the same options."""
    rights = (each for key, each in found.items() if key.startswith("right"))
    return next((each for each in rights if each["options"] == form["options"]), {})


def section(form: dict, right: dict) -> str:
    """The heading under which a form stands."""
    for symptom, seen in SYMPTOMS.items():
        if any(seen(run) for run in runs_of(form)):
            return symptom
    if any(run["KL"]["last"] > 2 * form["options"].get("kl_target", 99) for run in seeds_of(form)):
        return MISSED
    if all(form[world] == right.get(world) for world in form):
        return INERT
    seeds = [world for world in form if world.isdigit()]
    judge = min(right[seed]["end"]["judge"] - form[seed]["end"]["judge"] for seed in seeds)
    paid = min(paid_at_end(right[seed]) - paid_at_end(form[seed]) for seed in seeds)
    ways = [each.get("letters", {"share": 1})["share"] for each in (right, form)]
    return SILENT if judge > COST or paid > PAY or ways[0] - ways[1] > COST else FREE


def paid_at_end(run: dict) -> float:
    """What PPO maximises, by the right code."""
    return run["end"]["score"] - ppo.Config.kl_coef * run["end"]["KL"]


def row(name: str, form: dict) -> list[str]:
    runs = [run for run in seeds_of(form) if "end" in run]
    if not runs:
        return [name, "stopped", *[""] * 8]
    at_end = {each: f"{mean(run['end'][each] for run in runs):.2f}" for each in ("judge", "score", "KL")}
    last = {
        each: mean(run[each]["last"] for run in runs) for each in ("explained variance", "entropy", "length", "ended")
    }
    highest = max(run["KL"]["highest"] for run in runs)
    ratio = max((run["ratio"][end] for run in runs for end in ("lowest", "highest")), key=lambda x: abs(x - 1))
    logged = f"{mean(run['score']['last'] for run in runs):.2f}"
    exact = form.get("letters", {})
    exact = f"{exact['share']:.2f}, {exact['TV']:.2f}" if "share" in exact else "stops" * ("failed" in exact)
    kl, spread = f"{at_end['KL']}, {highest:.1f}", f"{last['length']:.0f}, {last['ended']:.2f}"
    columns = f"{ratio:.3g}", f"{last['explained variance']:.2f}", f"{last['entropy']:.2f}", spread, exact
    return [name, at_end["judge"], at_end["score"], logged, kl, *columns]


TITLES = ["", "judge", "score", "logged", "KL, highest", "ratio", "explained variance"]
TITLES += ["entropy", "length, ended", "share, TV"]


def table(names: list[str], found: dict) -> str:
    """A line for each right run that the forms need, and one for each form."""
    rights = {str(right_of(found[name], found)["options"]): right_of(found[name], found) for name in names}
    shown = lambda right: " ".join(["right", *(f"`--{o} {x}`" for o, x in right["options"].items())])  # noqa: E731
    return markdown(TITLES, [row(shown(each), each) for each in rights.values()] + [row(n, found[n]) for n in names])


def lines_of(name: str, form: Form) -> str:
    """What the code says right and wrong, and the test that sees it."""
    test, file, changes = form
    code = []
    for right, wrong in changes.items():
        code += [
            f"{sign} {line}" for sign, text in (("-", right), ("+", wrong)) for line in text.strip("\n").split("\n")
        ]
    fact = test.removeprefix("test_").replace("_", " ")
    return f"**{name}** breaks “{fact}” (`{file}`)\n\n```diff\n" + "\n".join(code) + "\n```"


def lines(axis, form: dict, found: dict, curve: str) -> None:
    """The curves of a form, a line per seed, the right run grey behind."""
    for each, colour in ((right_of(form, found), "0.7"), (form, "C3")):
        for run in (run for run in seeds_of(each) if curve in run):
            axis.plot(run[curve]["curve"], color=colour, linewidth=1)
    axis.set_xticks([])
    if curve == "KL":
        axis.set_yscale("symlog", linthresh=5)
        axis.yaxis.set_major_locator(pyplot().FixedLocator([0, 5, 10, 100, 1000]))
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.locator_params(axis="y", nbins=2)


def draw_front(found: dict, target: Path) -> None:
    """What six mistakes look like, a curve each."""
    figure, axes = pyplot().subplots(1, len(FRONT), figsize=(13, 2), layout="constrained")
    for axis, (title, (name, curve)) in zip(axes, FRONT.items()):
        lines(axis, found[name], found, curve)
        axis.set_title(title, loc="left", fontsize="small")
        axis.set_ylabel(curve.replace(" ", "\n") + " (nats)" * (curve == "KL") + " (tokens)" * (curve == "length"))
    figure.supxlabel("iteration", fontsize="small")
    save(figure, target)


def draw(names: list[str], found: dict, target: Path) -> None:
    """A row of small panels for each form."""
    size = dict(figsize=(9, 0.9 * len(names) + 0.6), layout="constrained", sharex=True, squeeze=False)
    figure, axes = pyplot().subplots(len(names), len(DRAWN), **size)
    for name, panels in zip(names, axes):
        for each, axis in zip(DRAWN, panels):
            lines(axis, found[name], found, each)
        panels[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for each, axis in zip(DRAWN, axes[0]):
        axis.set_title(each)
    figure.supxlabel("iteration", fontsize="medium")
    save(figure, target)


def write(forms: dict[str, Form], needs: dict[int, str], why: dict[str, str], target: Path = HERE / "atlas.md") -> None:
    """Write the page and a figure a section, beside each other."""
    found = read_results("atlas")
    for form in found.values():
        for world in form.keys() - right_of(form, found).keys():
            del form[world]  # its right run has not ended yet
    ran = {name: found[name] for name in forms if seeds_of(found.get(name, {}))}
    places: dict[str, list[str]] = {heading: [] for heading in (*SYMPTOMS, MISSED, SILENT, FREE, INERT)}
    for name, form in ran.items():
        places[section(form, right_of(form, found))].append(name)
    counts = {key: len(places[heading]) for key, heading in (("silent", SILENT), ("free", FREE), ("inert", INERT))}
    counts |= {"n": len(ran), "plain": len(ran) - sum(counts.values())}
    counts["alarmed"] = sum(any("alarm" in run for run in form.values()) for form in ran.values())
    for key, form in found.items():
        assert key[0].isdigit() or section(form, right_of(form, found)) in (FREE, INERT), f"{key} looks like a mistake"
    both = [
        row(shown, found[key]) for shown, key in (("right", "right"), ("another seed", "another-seed")) if key in found
    ]
    letters = ", and the world of letters ([exact.md](exact.md))" if "letters" in found["right"] else ""
    parts = [
        HEAD.format(
            **counts,
            cost=COST,
            pay=PAY,
            seeds=" and ".join(world for world in found["right"] if world.isdigit()),
            letters=letters,
            chance=markdown(TITLES, both),
        )
    ]
    for i, (heading, names) in enumerate(places.items()):
        if names:
            parts += [f"## {heading}", table(names, found)]
        if names and heading != INERT:
            figure = target.with_name(f"{target.stem}-{i + 1}.svg")
            draw(names, found, figure)
            parts.append(f"![{heading}: {', '.join(names)}]({figure.name})")
        for name in names:
            parts.append(lines_of(name, forms[name]))
            said = [run["alarm"] for run in found[name].values() if "alarm" in run]
            parts += [f"The log says “{said[0]}”."] if said else []
            stops = [f"{world}, “{run['failed']}”" for world, run in found[name].items() if "failed" in run]
            parts += [f"It stops: {'; '.join(stops)}."] if stops else []
            parts += [why[name]] if heading == INERT and name in why else []
    if all(name in found for name, _ in FRONT.values()):
        draw_front(found, target.with_name("wrong.svg"))
    parts.append("## Not shown\n\n" + "; ".join(f"mistake {n} needs {what}" for n, what in needs.items()) + ".")
    left = ", ".join(name for name in forms if name not in ran)
    parts[-1] += f" Not yet run: {left}." * bool(left) + " The others are of stages 1 and 2, of files, or of the data."
    target.write_text("\n\n".join(parts) + "\n")
    print(target)

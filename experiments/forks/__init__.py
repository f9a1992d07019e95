"""Forks of ppo.py as short diffs, and DPO as one file. tests/test_forks.py applies, runs and checks each.

By hand, in the folder of ppo.py: `patch -p1 < experiments/forks/rloo.diff`, or `git apply` with the same file.
"""

from pathlib import Path

HERE = Path(__file__).parent


def hunks(diff: str) -> list[tuple[str, str]]:
    """(old, new) text of each hunk of a unified diff, with its line of context above and below."""
    found: list[tuple[list[str], list[str]]] = []
    for line in diff.splitlines(keepends=True):
        if line.startswith("@@"):
            found.append(([], []))
        elif found:
            old, new = found[-1]
            if line[0] != "+":
                old.append(line[1:])
            if line[0] != "-":
                new.append(line[1:])
    return [("".join(old), "".join(new)) for old, new in found]


def patched(source: str, *names: str) -> str:
    """`source` with the named diffs applied in turn. Raises ValueError unless each hunk's old text is there once."""
    for name in names:
        for old, new in hunks((HERE / f"{name}.diff").read_text()):
            if source.count(old) != 1:
                raise ValueError(f"{name}.diff does not apply: this text is there {source.count(old)} times\n{old}")
            source = source.replace(old, new)
    return source

"""The files depend on each other in one direction, and the top level is what there is to read first."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

STAGES = ("sft", "reward", "ppo")
MAY = {  # who → whom it may import, of ours
    "fast": (),
    "model": ("fast",),
    "data": ("data",),
    "common": ("model", "fast", "data", "common"),
    **dict.fromkeys(STAGES, ("common", "data", "model")),
    "tools": ("tools", *STAGES, "common", "data", "model", "fast"),
    "experiments": ("experiments", "tests", "tools", *STAGES, "common", "data", "model", "fast"),
    "tests": ("tests", "experiments", "tools", *STAGES, "common", "data", "model", "fast"),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for name in MAY for path in [*ROOT.glob(f"{name}.py"), *(ROOT / name).rglob("*.py")]}


def imports(path: Path, inside: bool = True) -> set[str]:
    """Our files that a file imports; where not `inside`, without the imports in functions."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= FILES.keys() else names | {node.module}
    return found & FILES.keys()


def test_no_file_imports_itself_through_others():
    reached = {name: imports(path, inside=False) for name, path in FILES.items()}
    for _ in FILES:
        reached = {name: into.union(*(reached[other] for other in into)) for name, into in reached.items()}
    assert [name for name, into in reached.items() if name in into] == []


@pytest.mark.parametrize("who", MAY)
def test_imports_go_one_way(who):
    files = [name for name in FILES if name.partition(".")[0] == who]
    wrong = [(name, to) for name in files for to in imports(FILES[name]) if to.partition(".")[0] not in MAY[who]]
    assert files and not wrong


def test_the_top_level_is_the_model_its_speed_and_the_three_stages():
    assert {path.name for path in ROOT.glob("*.py")} == {"model.py", "fast.py", "sft.py", "reward.py", "ppo.py"}


def test_only_fast_knows_what_a_device_is_good_at():
    words = ("mkldnn", "onednn", "is_cuda", "pin_memory", "float32 ==", "CUDAGraph", "contiguous")
    text = "".join(FILES[name].read_text() for name in ("model", *STAGES))
    assert [word for word in words if word in text] == []

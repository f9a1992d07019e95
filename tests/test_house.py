"""The files depend on each other in one direction."""

import ast
from pathlib import Path

from tests.conftest import ROOT

STAGES = {"sft", "reward", "ppo"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    name_of(path): path for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("experiments/*.py")]
}


def imports(path: Path) -> set[str]:
    """Our files that a file imports when it is imported itself: not those inside functions."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & FILES.keys()


def test_no_file_imports_itself_through_others():
    reached = {name: imports(path) for name, path in FILES.items()}
    for _ in FILES:
        reached = {name: into.union(*(reached[other] for other in into)) for name, into in reached.items()}
    assert [name for name, into in reached.items() if name in into] == []


def test_fast_knows_no_other_file_and_no_stage_knows_another():
    assert imports(FILES["fast"]) == set()
    assert all(imports(FILES[stage]).isdisjoint(STAGES) for stage in STAGES)
    assert imports(FILES["model"]) == {"fast"}


def test_only_fast_knows_what_a_device_is_good_at():
    words = ("mkldnn", "onednn", "is_cuda", "device.type", "pin_memory", "float32 ==", "autocast")
    model = FILES["model"].read_text()
    assert [word for word in words if word in model] == []

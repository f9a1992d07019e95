"""Forks of ppo.py as short diffs, and DPO as one file. tests/test_forks.py applies, runs and checks each.

By hand, in the folder of ppo.py: `patch -p1 < experiments/forks/grpo.diff`, or `git apply` with the same file.
"""

import os
import subprocess
import tempfile
from pathlib import Path

from data.files import InputError

HERE = Path(__file__).parent
JUDGE = "data/tales.py:judge"
FORKS = {  # name → its diffs in turn, the first β that is tried (None: there is nothing to match), its options
    "PPO": ([], 0.05, []),
    "RLOO": (["grpo", "rloo"], 0.05, []),
    "GRPO": (["grpo", "kl_in_loss"], 0.2, []),
    "GRPO with the KL in the reward": (["grpo"], 0.05, []),
    "Dr. GRPO": (["grpo", "dr_grpo"], 0.05, []),
    "KL in the loss as k3": (["kl_in_loss"], 0.4, []),
    "KL in the loss as k2": (["kl_in_loss", "k2"], 0.4, []),
    "DAPO clip-higher": (["clip_higher"], 0.05, []),
    "DAPO length penalty": (["length_penalty"], 0.05, []),
    "per-token rewards": (["per_token"], 0.05, []),
    "RLVR by a rule": (["rule"], None, ["--kl_coef", 0.01]),
    "RLVR by the exact judge": ([], None, ["--reward", JUDGE, "--kl_coef", 0]),
    "on-policy distillation": (["distil"], None, ["--ref", "teacher/out/sft"]),
    "DPO": ([], 0.15, []),
}


def patched(source: str, *diffs: str | Path) -> str:
    """ppo.py's text with diffs applied in turn, by path or by name. Raises InputError if one does not apply."""
    with tempfile.TemporaryDirectory() as folder:
        script, alone = Path(folder) / "ppo.py", {"GIT_CEILING_DIRECTORIES": str(Path(folder).resolve().parent)}
        script.write_text(source)
        for diff in diffs:
            path = HERE / f"{diff}.diff" if isinstance(diff, str) else diff
            done = subprocess.run(
                ["git", "apply", path.resolve()], cwd=folder, env=os.environ | alone, capture_output=True, text=True
            )
            if done.returncode:
                why = done.stderr.splitlines()[0].removeprefix("error: ")
                how = "make it with `git diff ppo.py > FILE && git checkout ppo.py`"
                raise InputError(f"{path}: does not apply to ppo.py ({why}); {how}")
        return script.read_text()

"""Do the quick tests pass on other versions of torch? Prints a table; each version has an environment of its own.

python -m tests.versions 2.6.0 2.8.0 2.14.1        gigabytes each, kept in out/versions
"""

import platform
import re
import subprocess
import sys
import venv
from pathlib import Path

from tests.conftest import ROOT


def requirements() -> list[str]:
    """What the tests need, but torch, which brings another numpy if it needs one."""
    lines = [
        line for name in ("requirements.txt", "requirements-dev.txt") for line in (ROOT / name).read_text().split("\n")
    ]
    return [line for line in lines if line and not line.startswith(("torch", "-r"))]


def environment(version: str) -> Path:
    """The Python of an environment with this torch."""
    folder = ROOT / "out" / "versions" / version
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "-q", f"torch=={version}", *requirements()]
        subprocess.run(install, check=True)
        (folder / "done").touch()
    return python


def main() -> None:
    print("| torch | Python | the quick tests | that fail |\n|---|---|---|---|")
    for version in sys.argv[1:]:
        try:
            python = environment(version)
        except subprocess.CalledProcessError as error:
            print(
                f"| {version} | {platform.python_version()} | cannot be installed: pip ends with {error.returncode} | |"
            )
            continue
        done = subprocess.run([python, "-m", "pytest", "-q", "-rf"], cwd=ROOT, capture_output=True, text=True)
        failed = re.findall(r"^FAILED (?:tests/)?(\S+)", done.stdout, re.MULTILINE)
        said = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
        told = re.sub(r" in [\d.]+s.*", "", said)
        print(f"| {version} | {platform.python_version()} | {told} | {', '.join(failed)} |", flush=True)


if __name__ == "__main__":
    main()

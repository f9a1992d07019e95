"""Download files, check their checksums, and write the files of a data set."""

import hashlib
import http.client
import os
import re
import sys
import time
import urllib.request
from pathlib import Path

from data.files import InputError, write_jsonl

HUB = "https://huggingface.co"


def download(url: str, target: Path, checksum: str | None, tries: int = 3) -> None:
    """Download `url` to `target`, unless it exists. `checksum` is "sha256:…", "md5:…", or None for no check."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    for attempt in range(tries):
        try:
            receive(url, temporary, checksum)
            temporary.replace(target)
            return
        except (OSError, http.client.HTTPException) as error:
            problem = error
        finally:
            temporary.unlink(missing_ok=True)
        time.sleep(attempt < tries - 1)
    raise InputError(f"{url}: could not be downloaded ({problem}); try again later, or download it in another way")


def receive(url: str, target: Path, checksum: str | None) -> None:
    """Write what the server sends. Raises OSError if it is incomplete or its checksum is wrong."""
    with urllib.request.urlopen(url, timeout=60) as response, open(target, "wb") as file:
        size = int(response.headers.get("Content-Length") or 0)
        digest = hashlib.new(checksum.split(":")[0] if checksum else "md5")
        while chunk := response.read(2**20):
            file.write(chunk)
            digest.update(chunk)
            if sys.stderr.isatty():
                print(f"\r{Path(url).name}: {file.tell() / 1e6:.0f} of {size / 1e6:.0f} MB ", end="", file=sys.stderr)
        if file.tell() < size:
            raise OSError(f"only {file.tell():,} of {size:,} bytes arrived")
    if checksum and f"{digest.name}:{digest.hexdigest()}" != checksum:
        raise OSError("what arrived has the wrong checksum")


def download_from_hub(repository: str, file: str, target: Path) -> None:
    """Download a file of a Hugging Face repository, unless `target` exists. Its Git LFS pointer contains its sha256."""
    if target.exists():
        return
    pointer = target.with_name(f"{target.name}.{os.getpid()}.pointer")
    download(f"{HUB}/{repository}/raw/main/{file}", pointer, None)
    oid = re.search(r"^oid (sha256:[0-9a-f]{64})$", pointer.read_text(errors="replace"), re.MULTILINE)
    pointer.unlink()
    if not oid and target.suffix != ".json":
        raise InputError(f"{HUB}/{repository}/raw/main/{file}: contains no sha256; download it in another way")
    download(f"{HUB}/{repository}/resolve/main/{file}", target, oid and oid[1])


def write_files(folder: Path, files: dict[str, list[dict]], tally: dict[str, int] | None = None) -> None:
    """Write each list of rows to folder/NAME.jsonl. Prints their lengths, and then the counts in `tally`."""
    for name, rows in files.items():
        print(f"{folder / name}.jsonl: {write_jsonl(folder / f'{name}.jsonl', rows):,} rows")
    for what, n in sorted((tally or {}).items()):
        print(f"{what}: {n:,}")

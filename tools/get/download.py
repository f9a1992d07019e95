"""Download files, check their checksums, and write the files of a data set."""

import base64
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
    """Download `url` to `target`, unless it exists. `checksum` is "sha256:…", "md5:…", or None for the server's own.

    Raises InputError if the download is incomplete or the checksum is wrong. In that case it writes no `target`.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    kind, _, expected = (checksum or "md5:").partition(":")
    for attempt in range(tries):
        digest, done = hashlib.new(kind), 0
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(temporary, "wb") as file:
                size = int(response.headers.get("Content-Length") or 0)
                if checksum is None:
                    expected = base64.b64decode(response.headers.get("Content-MD5") or "").hex()
                while chunk := response.read(2**20):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if sys.stderr.isatty():
                        print(f"\r{target.name}: {done / 1e6:.0f} of {size / 1e6:.0f} MB ", end="", file=sys.stderr)
            if done < size:
                problem = f"only {done:,} of {size:,} bytes arrived"
            elif expected and digest.hexdigest() != expected:
                problem = f"{done:,} bytes arrived with the wrong checksum"
            else:
                temporary.replace(target)
                return
        except (OSError, http.client.HTTPException) as error:
            problem = f"could not be downloaded ({error})"
        finally:
            temporary.unlink(missing_ok=True)
        time.sleep(attempt < tries - 1)
    raise InputError(f"{url}: {problem}; try again later, or download it in another way")


def download_from_hub(repository: str, file: str, target: Path) -> None:
    """Download a file of a Hugging Face repository to `target`, unless it exists.

    The Git LFS pointer of a large file contains its sha256. The hub serves the pointer; another host serves the file.
    """
    if target.exists():
        return
    pointer = target.with_name(f"{target.name}.{os.getpid()}.pointer")
    download(f"{HUB}/{repository}/raw/main/{file}", pointer, None)
    oid = re.search(r"^oid (sha256:[0-9a-f]{64})$", pointer.read_text(errors="replace"), re.MULTILINE)
    pointer.unlink()
    if not oid and target.suffix != ".json":
        raise InputError(f"{HUB}/{repository}/raw/main/{file}: contains no sha256; download it in another way")
    download(f"{HUB}/{repository}/resolve/main/{file}", target, oid and oid[1])


def write_files(folder: Path, files: dict[str, list[dict]]) -> None:
    """Write each list of rows to folder/NAME.jsonl."""
    for name, rows in files.items():
        print(f"{folder / name}.jsonl: {write_jsonl(folder / f'{name}.jsonl', rows):,} rows")

"""Download files and check their checksums."""

import base64
import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from data.files import InputError

HUB = "https://huggingface.co"


def download(url: str, target: Path, checksum: str | None, tries: int = 3) -> None:
    """Download `url` to `target` and show progress. `checksum` is "sha256:…", "md5:…", or None for the server's own.

    Raises InputError if the download is incomplete or the checksum is wrong. In that case it writes no `target`.
    """
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    kind, _, expected = (checksum or "md5:").partition(":")
    for attempt in range(tries):
        digest, done = hashlib.new(kind), 0
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(temporary, "wb") as file:
                size = int(response.headers.get("Content-Length") or 0)
                if checksum is None and (named := response.headers.get("Content-MD5")):
                    expected = base64.b64decode(named).hex()
                while chunk := response.read(2**20):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if sys.stderr.isatty():
                        print(f"\r{target.name}: {done / 1e6:.0f} of {size / 1e6:.0f} MB ", end="", file=sys.stderr)
            if size and done < size:
                problem = f"only {done:,} of {size:,} bytes arrived"
            elif expected and digest.hexdigest() != expected:
                problem = f"{done:,} bytes arrived with the wrong checksum"
            else:
                temporary.replace(target)
                return
        except (OSError, http.client.HTTPException) as error:
            problem = f"could not be downloaded ({error})"
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
        finally:
            temporary.unlink(missing_ok=True)
        time.sleep(attempt < tries - 1)
    raise InputError(f"{url}: {problem}; try again later, or download it in another way")


def download_from_hub(repository: str, file: str, target: Path) -> None:
    """Download a file of a Hugging Face repository to `target`.

    The Git LFS pointer of a large file contains its sha256. The hub serves the pointer; another host serves the file.
    """
    url = f"{HUB}/{repository}/raw/main/{file}"
    pointer = target.with_name(f"{target.name}.{os.getpid()}.pointer")
    try:
        download(url, pointer, None)
        oid = re.search(r"^oid (sha256:[0-9a-f]{64})$", pointer.read_text(errors="replace"), re.MULTILINE)
    finally:
        pointer.unlink(missing_ok=True)
    if not oid and target.suffix != ".json":
        raise InputError(f"{url}: contains no sha256; try again later, or download it in another way")
    download(f"{HUB}/{repository}/resolve/main/{file}", target, oid and oid[1])

"""Fetch files of Hugging Face's hub, and write the files of a data set."""

from pathlib import Path

from data.files import InputError, write_jsonl


def from_hub(repository: str, *patterns: str, kind: str = "model") -> Path:
    """Return a folder with the files of a repository that fit the patterns. Each is downloaded once."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError("downloads need huggingface_hub: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(repository, repo_type=kind, allow_patterns=[*patterns]))
    except Exception as error:  # of the network, the hub or the disk
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{repository}: cannot be downloaded ({what}); try again, or fetch it another way") from None


def write_files(folder: Path, files: dict[str, list[dict]], tally: dict[str, int] | None = None) -> None:
    """Write each list of rows to folder/NAME.jsonl. Prints their lengths, and then the counts in `tally`."""
    for name, rows in files.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
        print(f"{folder / name}.jsonl: {len(rows):,} rows")
    for what, n in sorted((tally or {}).items()):
        print(f"{what}: {n:,}")

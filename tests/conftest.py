"""What several tests share: a tiny model, a tiny tokenizer, and a script run as a user runs it."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of every process of the tests, before torch is loaded

import numpy as np
import pytest
import tiktoken
import torch

import common
import data
from common import runs
from common.folders import lock
from model import GPT, GPTConfig, ScalarModel

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that one process does not wait for them at the end."""
    items.sort(key=lambda item: item.path.name != "test_loop.py")


@pytest.fixture(autouse=True)
def no_page(request, monkeypatch) -> None:
    """A run writes no page, which takes a Python of its own seconds, but in a test that is marked `page`."""
    if not request.node.get_closest_marker("page"):
        monkeypatch.setattr(runs, "write_page", lambda folder: None)


@pytest.fixture(scope="session")
def encoding() -> tiktoken.Encoding:
    return data.learn_bpe(["ask me. yes yes no. tell me a tale of a fox. yes! no?"] * 9, 300)


@pytest.fixture
def gpt(encoding) -> GPT:
    """Two layers with weights large enough that its distribution is far from uniform."""
    return make_gpt(vocab_size=encoding.n_vocab, eos=encoding.eot_token)


LLAMA = dict(n_head=4, n_kv_head=2, n_inner=48, swiglu=True, bias=False, qkv_bias=False, rms_norm=True)
LLAMA |= dict(norm_eps=1e-6, rope_theta=5e3, tied=False)
FAMILIES = {"gpt2": {}, "llama": LLAMA, "llama, tied": LLAMA | {"tied": True}, "qwen2": LLAMA | {"qkv_bias": True}}
FAMILIES |= {
    "qwen3": LLAMA | {"qk_norm": True, "head_dim": 12},
    "llama3.1": LLAMA | {"rope_llama3": (8.0, 1.0, 4.0, 16.0)},
    "smollm3": LLAMA | {"no_rope": (1,)},
    "mistral": LLAMA | {"head_dim": 12},
}


def make_gpt(seed: int = 0, vocab_size: int = 61, eos: int = 60, **shape) -> GPT:
    torch.manual_seed(seed)
    shape = dict(block_size=48, n_layer=2, n_head=2, n_embd=32) | shape
    model = GPT(GPTConfig(vocab_size=vocab_size, eos=eos, **shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def uneven(model: torch.nn.Module) -> torch.nn.Module:
    """The model with norms and biases that are not all ones and zeros, so that leaving one out shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def folders(tmp_path, gpt, encoding) -> dict[str, Path]:
    """Run folders of a stage-1 model and a reward model, and small files of every kind."""
    for name, model in (("sft", gpt), ("reward", ScalarModel(gpt))):
        (tmp_path / name).mkdir()
        common.save_model(model, encoding, tmp_path / name / "model.pt")
    words = ["yes", "no", "fox", "tale", "me"]
    pairs = [(a, b, c) for a in words for b in words for c in words]
    write(tmp_path / "prompts.jsonl", [{"prompt": f"ask {a} {b} {c}."} for a, b, c in pairs])
    write(tmp_path / "pairs.jsonl", [{"prompt": f"ask {a} {b}.", "completion": f" {c} {a}."} for a, b, c in pairs])
    chosen = [{"prompt": f"ask {a} {b} {c}.", "chosen": " yes.", "rejected": " no."} for a, b, c in pairs]
    write(tmp_path / "comparisons.jsonl", chosen)
    write(tmp_path / "text.jsonl", [{"text": f"tell me a tale of {a} and {b}, {c}. " * 3} for a, b, c in pairs])
    return {name: tmp_path / name for name in ("sft", "reward")} | {"tmp": tmp_path}


def ragged(rng: np.random.Generator, rows: int = 5, columns: int = 7) -> dict[str, torch.Tensor]:
    """A random float64 batch for `ppo.estimate`."""
    lengths = rng.integers(1, columns + 1, rows)
    lengths[0] = columns
    mask = torch.tensor(np.arange(columns) < lengths[:, None])
    draw = lambda: torch.tensor(rng.normal(size=(rows, columns))) * mask  # noqa: E731
    return {
        "mask": mask, "logp": draw(), "ref_logp": draw(), "values": draw(),
        "score": torch.tensor(rng.normal(size=rows)), "ended": torch.tensor(rng.random(rows) < 0.5),
    }  # fmt: skip


def flat(net: torch.nn.Module) -> torch.Tensor:
    """All parameters of a net in one row."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TORCHRUN = ["-c", "import sys; from torch.distributed.run import main; sys.exit(main())", "--nproc_per_node=2"]
TORCHRUN += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]  # a free port


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """A fork of this process holds the lock of a run folder, and is killed at the end of the block."""
    ready, told = os.pipe()
    if not (child := os.fork()):
        try:
            held = lock(out)
            os.write(told, b"x" if held else b"")
            signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    try:
        assert os.read(ready, 1)
        yield
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@functools.cache
def forks() -> subprocess.Popen:
    """The process of forks.py. It ends with this one, whose end of the pipe it reads from."""
    command, pipe = [sys.executable, str(ROOT / "tests" / "forks.py")], subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=pipe, stdout=pipe, text=True)


def run(
    script: str, *options: object, cwd: Path = ROOT, processes: int = 1, page: bool = False
) -> subprocess.CompletedProcess:
    """A script as a user runs it, with one process or with two as of torchrun. With `page` its run writes one."""
    argv, environment = [str(ROOT / script), *map(str, options)], os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        job = {"argv": argv, "cwd": str(cwd), "env": environment, "processes": processes, "page": page}
        print(json.dumps(job | {"stdout": stdout.name, "stderr": stderr.name}), file=forks().stdin, flush=True)
        code = int(forks().stdout.readline())
        return subprocess.CompletedProcess(argv, code, stdout.read().decode(), stderr.read().decode())


def address_of(process: subprocess.Popen) -> str:
    """The address that `tools.label` prints once it serves."""
    line = next(line for line in process.stdout if line.startswith("Open "))
    return re.search(r"http\S+", line)[0].rstrip(";")

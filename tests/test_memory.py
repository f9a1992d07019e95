"""The memory that stage 3 takes: policy, frozen copy, reward model and value net at once."""

import itertools
import re

import pytest
import tiktoken

import data
from common import nets, runs
from model import GPT, GPTConfig, ScalarModel
from tests.conftest import run, write

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank, gib", [(0, 10), (16, 4)])
def test_the_four_models_of_stage_3_at_gpt2s_124m_fit_in_10_gib_and_with_adapters_in_4(tmp_path, rank, gib):
    """An iteration on 8 prompts of 64 tokens with answers of 48, in float32."""
    two = itertools.islice(itertools.product(range(256), repeat=2), 50_000)
    ranks = {bytes([b]): b for b in range(256)} | {bytes(pair): 256 + i for i, pair in enumerate(two)}
    encoding = tiktoken.Encoding(
        "50k", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={data.EOS_TEXT: len(ranks)}
    )
    gpt = GPT(GPTConfig())
    assert encoding.n_vocab == gpt.config.vocab_size and sum(p.numel() for p in gpt.parameters()) == 124_439_808
    for name, model in (("sft", gpt), ("reward", ScalarModel(gpt))):
        (tmp_path / name).mkdir()
        nets.save_model(model, encoding, tmp_path / name / "model.pt")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": chr(97 + i) * 64} for i in range(10)])
    options = [
        "--iterations",
        1,
        "--epochs",
        1,
        "--batch_size",
        8,
        "--minibatch_size",
        8,
        "--response_len",
        48,
        "--lora",
        rank,
    ]
    options += ["--init", tmp_path / "sft", "--reward", tmp_path / "reward", "--out", tmp_path / "ppo"]
    done = run("ppo.py", "--data", prompts, *options, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (line,) = runs.read_metrics(tmp_path / "ppo")
    assert line["response_len"] > 40  # hardly an answer of random weights ends early
    assert float(re.search(r"peak memory: (\S+) GiB", done.stdout)[1]) < gib

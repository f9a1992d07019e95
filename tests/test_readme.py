"""README says what the code does."""

import ast
import math
import re
import shutil

import pytest
import torch

import ppo
from experiments import adaptive, default, estimators, exact, fewer, harness, kl, lora, price
from tests.conftest import ROOT

PAGES = [ROOT / folder / "README.md" for folder in (".", "data", "tools", "tests", "experiments")]
PAGES += [ROOT / "experiments" / name for name in ("exercises.md", "exact.md", "atlas.md")]
README = (ROOT / "README.md").read_text()
PROMPT = "Tell me about a shy owl who lost a red key near the lake."


def test_the_three_tokens_of_the_kl_term_are_charged_as_readme_says():
    rows = re.findall(r"^\| `(.+?)` \| (0\.\d+) \| (0\.\d+) \| ([+−]\d\.\d+) \| (.+) \|$", README, re.MULTILINE)
    assert len(rows) == 3
    ref_logp, logp = (torch.tensor([[math.log(float(row[i])) for row in rows]]) for i in (1, 2))
    mask, zero = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3)
    batch = {"logp": logp, "ref_logp": ref_logp, "values": zero, "mask": mask}
    batch |= {"score": torch.tensor([1.2]), "ended": torch.tensor([True])}
    rewards = ppo.estimate(batch, 0.05, ppo.Config())["rewards"][0]
    numbers = [[float(x.replace("−", "-")) for x in (row[3], row[4].split("= ")[-1])] for row in rows]
    for (log_ratio, reward), mine, theirs, paid in zip(numbers, logp[0], ref_logp[0], rewards):
        assert (mine - theirs).item() == pytest.approx(log_ratio, abs=6e-4)
        assert paid.item() == pytest.approx(reward, abs=6e-4)
    total = re.search(r"^\| sum \| \| \| ([+−]\S+) nats \| ([+−]\S+) \|$", README, re.MULTILINE)
    assert (logp - ref_logp).sum().item() == pytest.approx(float(total[1]), abs=6e-4)
    assert rewards.sum().item() == pytest.approx(float(total[2]), abs=6e-4)


def test_the_lines_of_python_run(folders, tmp_path, monkeypatch, capsys):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "load_gpt" in block]
    for name, source in (("ppo", "sft"), ("sft", "sft"), ("reward", "reward")):
        shutil.copytree(folders[source], tmp_path / "out" / name)
    monkeypatch.chdir(tmp_path)
    names = {}
    with torch.enable_grad():  # and as it was behind this
        exec(code.replace("max_new_tokens=64", "max_new_tokens=8").replace(PROMPT, "ask"), names)
    length, prompt_len = names["length"], names["prompt_len"]
    texts, scores, kl = capsys.readouterr().out.split("tensor")
    assert len(ast.literal_eval(texts)) == 4 and all(text.startswith("ask") for text in ast.literal_eval(texts))
    assert torch.equal(torch.tensor(ast.literal_eval(kl)), torch.zeros(4, int((length - prompt_len).max())))
    assert scores.count(",") == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_file_that_a_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_figure_stands_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    figures = [path for folder in ("experiments", "tests") for path in (ROOT / folder).glob("*.svg")]
    unshown = [path.name for path in figures if f"{path.name})" not in text]
    assert len(figures) > 10 and unshown == []


def test_readme_counts_what_the_atlas_counts():
    counted = re.findall(r"^\| \D.* \| (\d+) \|$", (ROOT / "experiments" / "atlas.md").read_text(), re.MULTILINE)[:5]
    said = README.partition("[The atlas]")[2].partition("\n\n")[0]
    plain, alarmed, silent, free, inert = re.findall(r"\b\d+\b", said)[1:]
    assert [plain, silent, free, inert, alarmed] == counted


TABLES = {"default": default.tables, "kl": kl.tables, "exact": exact.tables, "estimators": estimators.tables}
TABLES |= {"lora": lora.tables, "lora-own": lora.own_tables, "price": price.tables, "fewer": fewer.tables}
TABLES["adaptive"] = adaptive.tables


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_a_page_are_those_of_the_result_file(name):
    text = "".join((ROOT / "experiments" / page).read_text() for page in ("README.md", "exact.md"))
    assert [table for table in TABLES[name](harness.read_results(name)) if table not in text] == []


def test_every_option_that_a_page_names_is_one():
    known = set()
    for path in (
        path
        for place in ("", "common/", "data/", "tools/**/", "experiments/**/", "tests/")
        for path in ROOT.glob(f"{place}*.py")
    ):
        source = path.read_text()
        known |= set(re.findall(r"^    (\w+): .* = .*#", source, re.MULTILINE))
        known |= set(re.findall(r'add_argument\(\s*"--(\w+)"', source))
    known |= {"help", "adapter", "index-url", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "logdir"}
    known.add("shutdown-timeout")
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text()))
        assert named <= known, page

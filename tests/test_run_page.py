"""A run as one page: what stage 3 keeps for it, and the page in a real browser, a headless Chromium."""

import copy
import http.client
import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import ppo
import reward
import sft
from common import about, cli, nets, runs
from common.measure import ENDED, by_token, cell, report, share
from data import InputError, token_text
from model import ScalarModel
from tests.conftest import CHROMIUM, ROOT, make_gpt, needs_chromium, write
from tools import page

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright drives the browser")
OFF = torch.autocast("cpu", enabled=False)
HOSTILE = (
    "<script>document.title = 'owned'</script></script><img src=x onerror=\"document.title='owned'\">"
    "<!--\u2028\u2029\u202etxet\u0000 ]]> </style> ${1} POLICY SCRIPT CONTENT"
)


# --- what stage 3 keeps -----------------------------------------------------------------------------------------------


def learned(epochs, lr=0.05):
    """A batch of six answers after `update`, the nets, and the policy before it."""
    cfg = ppo.Config(response_len=12, minibatch_size=6, micro_batch_size=2, epochs=epochs, cliprange=10.0)
    policy = make_gpt()
    before = copy.deepcopy(policy)
    value = ScalarModel(copy.deepcopy(policy)).eval()
    batch = ppo.rollout(policy, [[1], [2, 3], [4], [5, 6, 7], [8], [9]], cfg, torch.Generator().manual_seed(0))
    batch |= ppo.read(batch, policy, before, value, lambda part: torch.ones(len(part["tokens"])), cfg)
    batch |= ppo.estimate(batch, 0.1, cfg)
    optimizers = [torch.optim.SGD(net.parameters(), lr=lr) for net in (policy, value)]
    ppo.update(policy, value, *optimizers, batch, lr, lr, cfg, OFF, seed=0)
    return batch, policy


def test_the_ratio_that_is_kept_is_that_of_the_last_epoch():
    once, after_one_step = learned(epochs=1)
    assert torch.equal(once["ratio"], once["mask"].float())  # no step had been taken
    twice, _ = learned(epochs=2)
    logp = after_one_step.logprobs(twice["tokens"], twice["prompt_len"], twice["length"])
    expected = torch.where(twice["mask"], (logp - twice["logp"]).exp(), 0.0)
    assert torch.allclose(twice["ratio"], expected, atol=1e-5)
    assert (twice["ratio"] - twice["mask"].float()).abs().max() > 1e-3


def test_a_rollout_is_kept_token_by_token_and_adds_up(folders, monkeypatch, encoding):
    run_ppo(folders, monkeypatch, "out/ppo", kl_coef=0.3, lr=0.01)
    kept = json.loads((folders["tmp"] / "out/ppo/rollout.json").read_text())
    assert kept["iteration"] == 4 and kept["kl_coef"] == 0.3 and len(kept["answers"]) == 16
    last = runs.read_metrics(folders["tmp"] / "out/ppo")[-1]
    kl = [sum(a["logp"]) - sum(a["ref_logp"]) for a in kept["answers"]]
    assert sum(kl) / 16 == pytest.approx(last["objective/kl"], abs=1e-3) and last["objective/kl"] > 0.01
    for answer, each in zip(kept["answers"], kl):
        n = len(answer["tokens"])
        assert {len(answer[name]) for name in ("logp", "values", "rewards", "advantages", "returns", "ratio")} == {n}
        assert sum(answer["rewards"]) == pytest.approx(answer["final_score"] - 0.3 * each, abs=1e-3)
        assert answer["ended"] == isinstance(answer["tokens"][-1], dict)
        raw = [bytes(t) if isinstance(t, list) else t.encode() for t in answer["tokens"] if not isinstance(t, dict)]
        assert b"".join(raw).decode(errors="replace") == answer["response"]
    assert any(isinstance(t, list) for a in kept["answers"] for t in a["tokens"])  # bytes of a part of a character


def test_what_is_kept_of_a_rollout_is_bounded(encoding):
    B, R = 300, 512
    mask = torch.ones(B, R, dtype=torch.bool)
    batch = {"mask": mask, "logp": mask * -0.5, "score": torch.ones(B), "final_score": torch.ones(B)}
    batch |= {"tokens": torch.full((B, R + 1), 65), "prompt_len": torch.ones(B).long()}
    batch |= {"length": torch.full((B,), R + 1), "ended": torch.zeros(B, dtype=torch.bool)}
    rows = [{"prompt": "a", "response": "b"}] * B
    assert len(by_token(batch, rows, encoding, 1, 0.1, [])["answers"]) == 128
    short = batch | {"mask": mask[:, :3], "length": torch.full((B,), 4)}
    assert len(by_token(short, rows, encoding, 1, 0.1, [])["answers"]) == 256


def test_the_likeliest_tokens_of_the_first_answers_are_those_of_both_softmaxes(folders, monkeypatch):
    run_ppo(folders, monkeypatch, "out/ppo", lr=0.01, temperature=0.7)
    kept = json.loads((folders["tmp"] / "out/ppo/rollout.json").read_text())["answers"]
    lengths = [len(answer["tokens"]) for answer in kept]
    monkeypatch.setattr("tools.page.likeliest.MOST_TOKENS", sum(lengths[:3]) + lengths[3] - 1)
    answers = page.read_run("out/ppo")["rollout"]["answers"]
    assert ["likeliest" in answer for answer in answers] == [True] * 3 + [False] * 13 and "ids" not in answers[0]
    for name, j in (("out/ppo", 0), ("sft", 1)):
        net, encoding = nets.load_gpt(name)
        ids = kept[2]["ids"]
        logits = net(torch.tensor([ids]))[0].detach().numpy().astype(np.float64)[-lengths[2] - 1 : -1] / 0.7
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        for found, p in zip(answers[2]["likeliest"][j], probs, strict=True):
            best = np.argsort(-p)[:5]
            assert [each for each, _ in found] == [token_text(i, encoding) for i in best]
            assert [x for _, x in found] == pytest.approx(p[best], rel=0.05)
    assert "likeliest" not in page.read_run("out/ppo", watched=True)["rollout"]["answers"][0]
    monkeypatch.setattr("tools.page.likeliest.MOST_BYTES", 0)
    assert not {"likeliest", "ids"} & page.read_run("out/ppo")["rollout"]["answers"][0].keys()  # nor of large nets


def run_ppo(folders, monkeypatch, out, **more):
    monkeypatch.chdir(folders["tmp"])
    (folders["tmp"] / "judge.py").write_text("def judge(prompt, response):\n    return float(len(response) % 7)\n")
    given = dict(data="prompts.jsonl", init="sft", reward="reward", judge="judge.py:judge", iterations=4, out=out)
    given |= dict(batch_size=16, minibatch_size=8, response_len=8, eval_prompts=8, value_warmup=1) | more
    words = [[f"--{name}"] if x is True else [f"--{name}", str(x)] for name, x in given.items()]
    ppo.train(cli.parse(ppo.Config, sum(words, [])))


def test_a_run_says_what_it_was_and_counts_its_seconds_on(folders, monkeypatch):
    given = ["ppo.py", "--out", "out/x", "--kl_coef", "0.3"]
    monkeypatch.setattr(sys, "argv", given)
    run_ppo(folders, monkeypatch, "out/x", kl_coef=0.3)
    found = json.loads((folders["tmp"] / "out/x/config.json").read_text())
    assert found["command"] == " ".join(["python", *given])
    assert found["stage"] == "ppo" and found["device"].startswith("cpu")
    assert found["options"]["kl_coef"] == 0.3 and found["options"].keys() == ppo.Config.__dataclass_fields__.keys()
    assert found["torch"] == torch.__version__ and found["python"] == ".".join(map(str, sys.version_info[:3]))
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert found["commit"] == head and isinstance(found["clean"], bool)
    found["seconds"] = 1000.0
    (folders["tmp"] / "out/x/config.json").write_text(json.dumps(found))
    run_ppo(folders, monkeypatch, "out/x", kl_coef=0.3, save_every=2, resume=True)
    again = json.loads((folders["tmp"] / "out/x/config.json").read_text())
    assert 1000 < again["seconds"] < 1600 and again["options"]["save_every"] == 2


def test_outside_of_a_checkout_a_run_names_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(about, "ROOT", tmp_path)
    assert about.git("rev-parse", "HEAD") is None
    found = about.origin(ppo.Config(), torch.device("cpu"), None)
    assert found["commit"] is None and found["clean"] is None


def test_the_report_is_kept_as_it_is_printed_and_with_all_its_numbers(folders, monkeypatch, capsys):
    run_ppo(folders, monkeypatch, "out/x", lr=0.01, eval_prompts=12, eval_data=str(folders["tmp"] / "prompts.jsonl"))
    folder = folders["tmp"] / "out/x"
    printed = capsys.readouterr().out
    found = json.loads((folder / "report.json").read_text())
    assert report(found) in printed
    assert len(found["answers"]) == 12 and list(found["table"])[:3] == ["judge.py:judge", "score", "final score"]
    shares = {(ENDED, "before"), (ENDED, "after")}
    for name, row in found["table"].items():
        before, after = (np.array([answer[side][name] for answer in found["answers"]]) for side in ("before", "after"))
        for side, x in (("before", before), ("after", after), ("change", after - before)):
            assert row[side] == pytest.approx(
                share(x.mean(), 12) if (name, side) in shares else [x.mean(), x.std(ddof=1) / 12**0.5]
            )
            assert cell(row[side], 12) in printed
    won = [(a["after"]["judge.py:judge"] - a["before"]["judge.py:judge"]) for a in found["answers"]]
    assert found["win_rate"][0] == pytest.approx(np.mean(np.sign(won) / 2 + 0.5))


# --- the page as a file -----------------------------------------------------------------------------------------------


def test_nothing_of_a_run_can_leave_its_script_element(folders, monkeypatch):
    folder = hostile_run(folders, monkeypatch)
    whole = page.page([str(folder)])
    assert whole.count("<script") == whole.count("</script") == 2 and whole.count("</style") == 1
    assert not any(character in whole for character in "\u2028\u2029\u202e\x00")
    found = json.loads(whole.split('id="content">')[1].split("</script>")[0])["runs"][0]
    assert HOSTILE in found["samples"][-1]["text"] and found["rollout"]["answers"][0]["prompt"] == HOSTILE


def test_a_folder_of_no_run_and_a_damaged_file_are_refused_in_a_sentence(folders, monkeypatch, tmp_path):
    with pytest.raises(InputError, match="nowhere: no step in a metrics.jsonl there; name the folder of a run"):
        page.page(["nowhere"])
    write(tmp_path / "metrics.jsonl", [{"step": 0, "loss/train": 1.0}])
    for content, said in (("{", "Expecting property"), ("[]", r"a list\)"), ('{"a": 1e999}', "not finite")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=said):
            page.page([str(tmp_path)])
    (tmp_path / "config.json").write_text('{"options": {"x": NaN}}')
    assert '"x": null' in page.page([str(tmp_path)])


def hostile_run(folders, monkeypatch, out="out/hostile"):
    """A run of stage 3 with a hostile text in every place that holds text."""
    run_ppo(folders, monkeypatch, out)
    folder = folders["tmp"] / out
    with open(folder / "samples.txt", "a") as file:
        file.write(f"step 4  {HOSTILE}\n")
    for name, change in {
        "config.json": lambda x: x["options"].update(data=HOSTILE) or x.update(command=HOSTILE),
        "rollout.json": lambda x: (
            x["answers"][0].update(prompt=HOSTILE, score=99.0) or x["answers"][0]["tokens"].__setitem__(0, HOSTILE)
        ),
        "report.json": lambda x: (
            x["answers"][0].update(prompt=HOSTILE)
            or x["answers"][0]["after"].update(text=HOSTILE)
            or x["table"].update({HOSTILE: x["table"]["score"]})
        ),
    }.items():
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_the_command_writes_a_page_and_what_never_changes_is_not_drawn(monkeypatch, tmp_path, capsys):
    lines = [{"step": i, "loss/train": 2.0 - 0.1 * i, "lr": 0.1, "loss/held_out": 1.0 * i} for i in range(1500)]
    lines[777]["loss/train"] = 34.0
    write(tmp_path / "metrics.jsonl", lines)
    (tmp_path / "report.json").write_text(json.dumps({"answers": [{"prompt": str(i)} for i in range(99)]}))
    monkeypatch.setattr(sys, "argv", ["tools.page", str(tmp_path)])
    page.main()
    whole = (tmp_path / "run.html").read_text()
    assert f"{tmp_path}/run.html: open it in a browser" in capsys.readouterr().out
    found = json.loads(whole.split('id="content">')[1].split("</script>")[0])["runs"][0]
    assert [answer["prompt"] for answer in found["report"]["answers"]] == [str(i) for i in range(40)]
    loss, *others = found["panels"]
    assert [(each["label"], each["kind"]) for each in loss["series"]] == [("training", "line"), ("held out", "dots")]
    points, smooth = loss["series"][0]["points"], dict(loss["series"][0]["smooth"])
    assert 500 < len(points) <= 600 and points[0] == [1, 2.0] and points[-1][0] == 1500
    assert [778, 34.0] in points  # a peak of one step is not thinned out
    near = [line["loss/train"] for line in lines[650:751]]  # a thirtieth of 1,500 to either side of 700
    assert smooth.get(701, np.mean(near)) == pytest.approx(np.mean(near)) and len(smooth) == 600
    assert len(others) > 9 and all(series["points"] == [] for each in others for series in each["series"])
    monkeypatch.setattr(sys, "argv", ["tools.page"])
    with pytest.raises(InputError, match="name a run folder"):
        page.main()


def test_a_panel_that_varies_keeps_what_was_measured_once_and_rates_are_not_smoothed():
    lines = [{"step": i, "accuracy": 0.1 * i, "lr": 0.1 * i} for i in range(9)]
    lines[-1] |= {"eval/accuracy": 0.8, "eval/accuracy_ceiling": 0.9, "eval/loss": 0.4}
    found = {panel["title"]: panel["series"] for panel in page.panels(lines)}
    assert [each["points"] for each in found["accuracy"][1:]] == [[(9, 0.8)], [(9, 0.9)]]
    assert found["loss"] == [] and "smooth" not in found["learning rate"][0]


def test_a_watched_page_needs_the_token_and_tells_what_has_changed(tmp_path):
    write(tmp_path / "metrics.jsonl", [{"step": 0, "loss/train": 1.0}])
    with page.Server([str(tmp_path)], 0) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()

        def get(path):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=9)
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()

        there = f"/{server.token}/"
        assert get("/")[0] == get("/x/runs")[0] == get(f"{there}config.json")[0] == 404
        assert get(there)[0] == 200 and "connect-src 'self'" in get(there)[1]
        status, content = get(f"{there}runs?")
        version = json.loads(content)["version"]
        assert status == 200 and get(f"{there}runs?{version}")[0] == 204
        write(tmp_path / "metrics.jsonl", [{"step": i, "loss/train": 1.0} for i in range(3)])
        assert json.loads(get(f"{there}runs?{version}")[1])["runs"][0]["steps"] == 3
        (tmp_path / "config.json").write_text("{")
        assert get(there)[0] == 503 and "config.json: cannot be read" in get(there)[1]
        with pytest.raises(InputError, match=f"--port {server.server_port}: .*--port 0 for any free one"):
            page.Server([str(tmp_path)], server.server_port)
        server.shutdown()


# --- the page in a browser --------------------------------------------------------------------------------------------


@pytest.fixture
def browser_page():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
        own = ("file:", "http://127.0.0.1:")
        page.on("request", lambda request: request.url.startswith(own) or page.problems.append(request.url))
        yield page
        browser.close()


def show(browser_page, *folders):
    target = folders[0] / "run.html"
    target.write_text(page.page([str(folder) for folder in folders]))
    browser_page.goto(f"file://{target}")


def heads(browser_page, name):
    """A number of each answer that is shown, from its heading."""
    facts = [each.locator("> span").all_text_contents() for each in browser_page.locator(".answer header").all()]
    return [float(dict(fact.rsplit(" ", 1) for fact in each)[name].replace("−", "-")) for each in facts]


def press(browser_page, group, label):
    buttons = browser_page.locator("#tools .choice").nth(["colour", "sort"].index(group)).get_by_role("button")
    buttons.filter(has_text=re.compile(rf"^{label}( [↓↑])?$")).click()


@pytest.mark.slow
@needs_chromium
def test_answers_are_sorted_and_tokens_coloured_by_what_is_chosen(folders, monkeypatch, browser_page):
    run_ppo(folders, monkeypatch, "out/ppo", lr=0.01)
    folder = folders["tmp"] / "out/ppo"
    answers = json.loads((folder / "rollout.json").read_text())["answers"]
    for answer in answers:
        answer["kl"] = [a - b for a, b in zip(answer["logp"], answer["ref_logp"])]
    show(browser_page, folder)
    assert heads(browser_page, "score") == pytest.approx(
        sorted([a["score"] for a in answers], reverse=True)[:12], abs=0.06
    )
    browser_page.get_by_role("button", name="show more").click()
    columns = {"KL": [sum(a["kl"]) for a in answers], "tokens": [len(a["tokens"]) for a in answers]}
    for name, values in columns.items():
        press(browser_page, "sort", name.replace("tokens", "length"))
        assert heads(browser_page, name) == pytest.approx(sorted(values, reverse=True), abs=0.06)
        press(browser_page, "sort", name.replace("tokens", "length"))  # again: the other way round
        assert heads(browser_page, name) == pytest.approx(sorted(values), abs=0.06)
    press(browser_page, "sort", "as sampled")
    for label, quantity, warm in (("advantage", "advantages", -1), ("KL", "kl", 1), ("reward", "rewards", -1)):
        press(browser_page, "colour", label)
        spans = browser_page.locator(".tokens").first.locator("span")
        painted = spans.evaluate_all("all => all.map(span => span.style.background)")
        values = answers[0][quantity]
        assert len(painted) == len(values) and any("--hot" in each or "--cold" in each for each in painted)
        for x, each in zip(values, painted):
            assert "--hot" not in each or x * warm > 0
            assert "--cold" not in each or x * warm < 0
    assert not browser_page.problems


@pytest.mark.slow
@needs_chromium
def test_a_token_tells_its_numbers_and_a_table_their_sums(folders, monkeypatch, browser_page):
    run_ppo(folders, monkeypatch, "out/ppo", lr=0.01)
    answers = json.loads((folders["tmp"] / "out/ppo/rollout.json").read_text())["answers"]
    show(browser_page, folders["tmp"] / "out/ppo")
    press(browser_page, "sort", "as sampled")
    card = browser_page.locator(".answer").first
    card.locator(".tokens span").nth(1).click()
    readout = browser_page.locator("#readout")
    assert f"token 2 of {len(answers[0]['tokens'])}" in readout.text_content()
    browser_page.keyboard.press("ArrowRight")
    shown = dict(zip(readout.locator("dt").all_text_contents(), readout.locator("dd").all_text_contents()))
    for label, name in (("log π", "logp"), ("log π₀", "ref_logp"), ("value", "values"), ("ratio", "ratio")):
        assert float(shown[label].replace("−", "-")) == pytest.approx(answers[0][name][2], abs=0.006)
    assert {"likeliest under π, updated", "likeliest under π₀"} <= shown.keys()
    assert len(re.findall(r"[01]\.\d{3}", shown["likeliest under π₀"])) == 5
    card.get_by_role("button", name="table").click()
    names = browser_page.locator(".answer").first.locator("thead th").all_text_contents()[1:]
    assert {"log π", "log π₀", "KL", "reward", "value", "advantage", "return", "ratio"} <= set(names)
    sums = dict(zip(names, browser_page.locator(".answer").first.locator("tfoot td").all_text_contents()[1:]))
    for label, name in (("log π", "logp"), ("reward", "rewards"), ("advantage", "advantages")):
        assert float(sums[label].replace("−", "-")) == pytest.approx(sum(answers[0][name]), rel=0.01, abs=0.006)
    assert not browser_page.problems


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_it_fits_a_wide_and_a_narrow_window(folders, monkeypatch, browser_page, width, scheme):
    folder = hostile_run(folders, monkeypatch)
    browser_page.set_viewport_size({"width": width, "height": 844})
    browser_page.emulate_media(color_scheme=scheme)
    show(browser_page, folder)
    browser_page.locator(".answer").first.get_by_role("button", name="table").click()
    assert browser_page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    sizes = browser_page.locator("#curves svg").evaluate_all(
        "all => all.map(s => parseFloat(getComputedStyle(s).fontSize) * s.clientWidth / s.viewBox.baseVal.width)"
    )
    assert min(sizes) >= 11 and max(sizes) < 16  # pixels
    cards = [card.bounding_box() for card in browser_page.locator("#curves .card").all()[:2]]
    assert (cards[0]["y"] == cards[1]["y"]) == (width > 700)  # side by side where there is room
    for control in browser_page.locator("button:visible, a:visible, summary:visible").all():
        assert control.evaluate("b => (b.getAttribute('aria-label') || b.textContent).trim()")
    background = lambda: browser_page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    before = background()
    assert before == {"light": "rgb(251, 250, 247)", "dark": "rgb(22, 23, 26)"}[scheme]
    browser_page.get_by_role("button", name="light or dark").click()
    assert background() != before and not browser_page.problems


@pytest.mark.slow
@needs_chromium
def test_a_hostile_text_is_shown_and_runs_nothing(folders, monkeypatch, browser_page):
    show(browser_page, hostile_run(folders, monkeypatch))
    assert browser_page.title().endswith("out/hostile")
    assert browser_page.locator("#main script, #main img, #main style").count() == 0
    assert "<script>document.title = 'owned'</script>" in browser_page.locator(".answer .text").first.text_content()
    assert "⟨U+202E⟩" in browser_page.locator("#samples").text_content()  # it would turn the line round
    for section in ("tokens", "report", "samples", "options"):
        assert "<img src=x" in browser_page.locator(f"#{section}").text_content()
    code = "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}))"
    browser_page.evaluate(code)  # even a script that found its way in is not run
    assert browser_page.title().endswith("out/hostile")
    assert [each for each in browser_page.problems if "Content Security Policy" not in each] == []


@pytest.mark.slow
@needs_chromium
def test_two_runs_stand_side_by_side_and_what_differs_is_marked(folders, monkeypatch, browser_page):
    run_ppo(folders, monkeypatch, "out/a", kl_coef=0.3)
    run_ppo(folders, monkeypatch, "out/b", kl_coef=0.0, iterations=6, seed=1)
    a, b = (folders["tmp"] / "out" / name for name in "ab")
    show(browser_page, a, b)
    panel = browser_page.locator("#curves .card").filter(has_text="judge, never trained on").locator("svg")
    drawn = panel.locator("path").evaluate_all("all => all.map(path => path.getAttribute('stroke'))")
    assert {"var(--c0)", "var(--c1)"} == set(drawn)
    marked = browser_page.locator(".differs thead th").all_text_contents()
    for place in ("#head", ".differs"):  # a run is a row, so that a narrow window shows them all
        rows = browser_page.locator(f"{place} tbody tr")
        assert [row.locator("td").first.text_content() for row in rows.all()] == [str(a), str(b)]
    assert browser_page.locator("#legend").text_content() == f"{a}{b}"
    assert {"--kl_coef", "--iterations", "--out"} <= set(marked) and "--lr" not in marked
    texts = [json.loads((x / "report.json").read_text())["answers"][0]["after"]["text"] for x in (a, b)]
    shown = browser_page.locator("#pairs > div").first.locator(".card .text").all_text_contents()
    assert len(shown) == 3 and texts[0] != texts[1]
    plain = lambda text: re.sub(r"[^a-z.!?]", "", text)  # noqa: E731
    assert [plain(text) for text in shown[1:]] == [plain(text) for text in texts]
    assert "answers of iteration 4" in browser_page.locator("#tokens").text_content()
    browser_page.locator("#tokens .choice").first.get_by_role("button", name="out/b").click()
    assert "answers of iteration 6" in browser_page.locator("#tokens").text_content()
    assert not browser_page.problems


@pytest.mark.slow
@needs_chromium
def test_runs_that_differ_in_their_seed_alone_are_a_band_and_their_mean(tmp_path, browser_page):
    losses = {"a": (0, 1, [4, 3, 1]), "b": (1, 1, [2, 3, 3]), "c": (2, 1, [3, 3, 2]), "other": (0, 2, [5, 5, 4])}
    for name, (seed, lr, loss) in losses.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "metrics.jsonl", [{"step": i, "loss/train": x} for i, x in enumerate(loss)])
        options = {"seed": seed, "out": f"out/{name}", "lr": lr}
        (tmp_path / name / "config.json").write_text(json.dumps({"stage": "sft", "options": options}))
    show(browser_page, *(tmp_path / name for name in losses))
    svg, legend = browser_page.locator("#curves svg").first, browser_page.locator("#curves .legend").first
    assert svg.locator(".band").count() == 1 and "3 seeds" in browser_page.locator("#legend .run").first.text_content()
    strokes = svg.locator("path:not(.band)").evaluate_all("all => all.map(path => path.getAttribute('stroke'))")
    assert strokes.count("var(--c0)") == 1 and "var(--c2)" not in strokes
    corners = re.findall(r"[ML]([\d.]+) ([\d.]+)", svg.locator(".band").get_attribute("d"))
    heights = [float(y) for _, y in corners]  # the lowest of each step, then back the highest
    scale = (heights[0] - heights[5]) / 2  # of 2 and 4 at the first step
    assert [(heights[0] - y) / scale + 2 for y in heights] == pytest.approx([2, 3, 1, 3, 3, 4], abs=0.01)
    svg.hover(position={"x": 60, "y": 60})
    assert legend.locator("> span").all_text_contents() == ["step 1", "3", "5"]  # the mean of the three
    assert not browser_page.problems


@pytest.mark.slow
@needs_chromium
def test_runs_of_the_other_stages_have_a_page_too(folders, monkeypatch, browser_page):
    monkeypatch.chdir(folders["tmp"])
    sft.train(sft.Config(data="pairs.jsonl", init="sft", out="out/sft"))
    reward.train(reward.Config(data="comparisons.jsonl", init="sft", out="out/reward", response_len=8, lr=1e-4, seed=1))
    for name, title in (("sft", "loss"), ("reward", "accuracy")):
        show(browser_page, folders["tmp"] / "out" / name)
        assert "step" in browser_page.locator("#curves svg").first.text_content()
        assert title in browser_page.locator("#curves h3").all_text_contents()
        assert "--lr" in browser_page.locator("#options").text_content()
    accuracy = browser_page.locator("#curves .card").filter(has_text="accuracy")
    assert accuracy.locator("circle").count() == 1  # measured once, at the end
    assert "held-out accuracy" in browser_page.locator("#head").text_content() and not browser_page.problems


def run_reward(folders, monkeypatch):
    monkeypatch.chdir(folders["tmp"])
    reward.train(reward.Config(data="comparisons.jsonl", init="sft", out="out/reward", response_len=8, lr=1e-4, seed=1))
    return folders["tmp"] / "out/reward"


def test_a_reward_model_keeps_held_out_pairs_with_the_score_of_every_prefix(folders, monkeypatch):
    folder = run_reward(folders, monkeypatch)
    pairs = json.loads((folder / "report.json").read_text())["pairs"]
    model, encoding = nets.load_scalar(folder)
    score = lambda ids: model.scores(torch.tensor([ids]), torch.tensor([len(ids)])).item()  # noqa: E731
    assert len(pairs) == len({pair["prompt"] for pair in pairs}) == 8
    for pair in pairs:
        for side, text in (("chosen", " yes."), ("rejected", " no.")):
            prompt, answer = encoding.encode_ordinary(pair["prompt"]), encoding.encode_ordinary(text)
            ids = prompt + answer + [encoding.eot_token]
            expected = [score(ids[:n]) for n in range(len(prompt), len(ids) + 1)]  # each prefix by itself
            assert pair[side]["prefix"] == pytest.approx(expected, abs=1e-4)
            assert pair[side]["score"] == pytest.approx(expected[-1], abs=1e-4)
            assert "".join(pair[side]["tokens"][:-1]) == text and pair[side]["tokens"][-1] == {
                "special": "<|endoftext|>"
            }


@pytest.mark.slow
@needs_chromium
def test_the_page_of_a_reward_model_shows_calibration_and_where_its_score_rises(folders, monkeypatch, browser_page):
    folder = run_reward(folders, monkeypatch)
    found = json.loads((folder / "report.json").read_text())
    found["calibration"] = [[0.5, 0.6, 40, 0.55, 0.5, 0.4, 0.6], [0.9, 1.0, 9, 0.95, 1.0]]  # one of few prompts
    found["pairs"][0] |= {"prompt": HOSTILE}
    (folder / "report.json").write_text(json.dumps(found))
    show(browser_page, folder)
    chart = browser_page.locator("#report .card").filter(has_text="predicted and observed win rate")
    assert chart.locator("circle").count() == 2 and chart.locator("path").count() == 2  # diagonal, an interval
    sides = [pair[side] for pair in found["pairs"] for side in ("chosen", "rejected")]
    scores = [side["score"] for side in sides]
    assert heads(browser_page, "score") == pytest.approx(scores, abs=0.06)
    cards = browser_page.locator(".answer")
    for card, side in zip(cards.all(), sides, strict=True):
        painted = card.locator(".tokens span").evaluate_all("all => all.map(span => span.style.background)")
        rises = np.diff(side["prefix"])
        assert len(painted) == len(rises)
        for x, each in zip(rises, painted):
            assert "--hot" not in each or x < 0
            assert "--cold" not in each or x > 0
    assert cards.locator(".tokens span[style*='--hot'], .tokens span[style*='--cold']").count() > 10
    cards.first.locator(".tokens span").nth(1).click()
    readout = browser_page.locator("#readout")
    shown = dict(zip(readout.locator("dt").all_text_contents(), readout.locator("dd").all_text_contents()))
    assert list(shown) == ["rise", "score so far"]
    assert float(shown["score so far"].replace("−", "-")) == pytest.approx(sides[0]["prefix"][2], abs=0.006)
    cards.first.get_by_role("button", name="table").click()
    last = cards.first.locator("tfoot td").all_text_contents()
    rise = sides[0]["prefix"][-1] - sides[0]["prefix"][0]
    assert float(last[1].replace("−", "-")) == pytest.approx(rise, abs=0.006)
    assert HOSTILE[:20] in browser_page.locator("#tokens").text_content()
    assert browser_page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser_page.title().endswith("out/reward") and not browser_page.problems


@pytest.mark.slow
@needs_chromium
def test_a_ratio_of_rounding_is_no_picture_and_an_error_gives_the_digits(folders, monkeypatch, browser_page):
    run_ppo(folders, monkeypatch, "out/ppo", lr=1e-7, eval_prompts=12, eval_data=str(folders["tmp"] / "prompts.jsonl"))
    folder = folders["tmp"] / "out/ppo"
    lines = runs.read_metrics(folder)
    write(folder / "metrics.jsonl", [line | {"policy/ratio": 1 + 1e-5 * line["step"]} for line in lines])
    found = json.loads((folder / "report.json").read_text())
    found["table"]["score"] = {"before": [1.2, 0.045], "after": [1.31, 0.0058], "change": [0.11, 0.05]}
    (folder / "report.json").write_text(json.dumps(found))
    show(browser_page, folder)
    ratio = browser_page.locator("#curves .card").filter(has_text="ratio of new to old")
    assert ratio.locator("svg text").all_text_contents()[:3] == ["0.95", "1", "1.05"]
    assert "ratio" not in browser_page.locator("#tools .choice").first.text_content()
    cells = browser_page.locator("#report tr").filter(has_text="score").first.locator("td").all_text_contents()
    assert cells == ["score", "1.200 ± 0.045", "1.310 ± 0.006", "+0.110 ± 0.050"]
    judged = [answer["judge"] for answer in json.loads((folder / "rollout.json").read_text())["answers"]]
    press(browser_page, "sort", "judge")
    assert heads(browser_page, "judge") == sorted(judged, reverse=True)[:12] and len(set(judged)) > 2
    browser_page.locator("#curves h3 button").first.focus()  # by keyboard: a chart as wide as the window, and back
    wide = lambda: browser_page.locator("#curves .card").first.bounding_box()["width"] > 1000  # noqa: E731
    assert not wide()
    browser_page.keyboard.press("Enter")
    assert wide() and browser_page.locator("#curves h3 button").first.evaluate("b => b === document.activeElement")
    browser_page.locator("#curves svg").first.click()
    assert not wide()
    for chosen in (browser_page.locator("#tools button").nth(1), browser_page.locator(".bars tbody tr").first):
        chosen.focus()
        browser_page.keyboard.press("Enter")  # draws the section anew
        assert chosen.evaluate("element => element === document.activeElement")
    assert browser_page.locator(".bars tr[aria-current]").count() == 1
    browser_page.locator(".tokens").first.focus()
    browser_page.keyboard.press("ArrowRight")
    assert "token 1 of" in browser_page.locator("#readout").text_content() and not browser_page.problems


@pytest.mark.slow
@needs_chromium
def test_a_page_that_is_watched_follows_the_run_and_stays_where_one_was(folders, monkeypatch, browser_page):
    run_ppo(folders, monkeypatch, "out/ppo", lr=0.01)
    done, folder = folders["tmp"] / "out/ppo", folders["tmp"] / "run"
    folder.mkdir()
    lines = [{"step": i, "loss/train": 2.0 - 0.1 * i} for i in range(9)]
    server = page.Server([str(folder)], 0)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    live = lambda text: browser_page.locator("#live", has_text=text).wait_for(timeout=9000)  # noqa: E731
    try:
        browser_page.goto(server.address)
        live("no step yet")
        for name in ("rollout.json", "report.json"):
            (folder / name).write_bytes((done / name).read_bytes())
        write(folder / "metrics.jsonl", lines[:4])
        began = (folder / "metrics.jsonl").stat().st_mtime - 40
        about = {"steps": 10, "started": began, "first_step": 0, "options": {}, "seconds": 1.0, "device": "cpu"}
        (folder / "config.json").write_text(json.dumps(about | {"command": "x"}))
        live("4 of 10, 1:00 left")  # 40 seconds for 4 steps
        browser_page.locator(".tokens").nth(2).locator("span").nth(1).click()
        browser_page.locator("details").last.locator("summary").click()
        was_open = browser_page.locator("details").last.get_attribute("open")
        browser_page.locator("#curves svg").first.hover()
        at = browser_page.locator("#curves .legend").first.text_content()
        assert "step" in at
        write(folder / "metrics.jsonl", lines)
        live("9 of 10")
        browser_page.wait_for_timeout(100)
        assert browser_page.locator("#curves .legend").first.text_content() == at
        assert browser_page.locator(".tokens").nth(2).locator("span").nth(1).get_attribute("class").endswith("at")
        assert browser_page.locator("details").last.get_attribute("open") == was_open
        browser_page.goto(server.address.removesuffix("/"))
        browser_page.locator("#head", has_text="steps9").wait_for(timeout=9000)
        (folder / "config.json").write_text("{")
        live("cannot be read as a JSON object")
    finally:
        server.shutdown()
        server.server_close()
    assert all("503" in problem for problem in browser_page.problems)
    live("no answer since")

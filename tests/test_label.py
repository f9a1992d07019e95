"""tools/label: a sitting with one person and with several, the server under attack, names."""

import calendar
import concurrent.futures
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest

import data
from common import cli
from data import InputError
from tests.conftest import ROOT, address_of, locked, write
from tools import label
from tools.label import sitting as rooms
from tools.label.report import summarise

PROMPTS = [f"question {i}" for i in range(30)]
NASTY = '<script>document.title = "owned"</script><img src=x onerror=alert(1)> & "quotes" \x1b[2J'


def make(prompt, n=2):
    answers = [(f"{NASTY} answer {i} to {prompt}", i != 0) for i in range(n)]
    return label.Question(prompt, answers, ["out/sft", "out/ppo"] * (n // 2) if n > 1 else ["out/sft"])


@pytest.fixture
def sit(tmp_path):
    def start(prompts=PROMPTS, make=make, people=1, seed=0):
        return label.Sitting(prompts, make, tmp_path / "answers.jsonl", people, seed)

    start.out = tmp_path / "answers.jsonl"
    return start


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prefer(sitting, who, text):
    """Let `who` prefer the answer that holds `text`; the question."""
    question = sitting.next(who)
    places = [text in question.answers[i][0] for i in sitting.order(question, who)]
    sitting.answer(who, question.number, [places.index(True), places.index(False)])
    return question


def test_every_answer_is_in_the_file_at_once_as_a_row_that_reward_py_reads(sit, encoding):
    sitting = sit()
    prefer(sitting, "ann", "answer 1")
    (row,) = rows(sit.out)
    assert row["prompt"] == "question 0" and "answer 1" in row["chosen"] and "answer 0" in row["rejected"]
    assert (row["chosen_ended"], row["rejected_ended"], row["checkpoint"]) == (True, False, ["out/ppo", "out/sft"])
    assert row["annotator"] == "ann" and row["seed"] == 0 and row["seconds"] >= 0 and row["position"] in (0, 1)
    assert abs(time.time() - calendar.timegm(time.strptime(row["time"], "%Y-%m-%dT%H:%M:%SZ"))) < 60
    for verdict in ("tie", "bad", "skip"):
        sitting.answer("ann", sitting.next("ann").number, verdict)
    prefer(sitting, "ann", "answer 0")
    assert [row.get("verdict") for row in rows(sit.out)] == [None, "tie", "bad", "skip", None]
    groups = data.comparisons(sit.out, encoding, encoding.eot_token)
    assert len(groups) == 2 and [encoding.decode(g.rows[0].tokens).find("answer 1") > 0 for g in groups] == [
        True,
        False,
    ]


def test_more_than_two_are_ranked_best_first(sit, encoding):
    sitting = sit(make=lambda prompt: make(prompt, 4))
    question = sitting.next("ann")
    order = sitting.order(question, "ann")
    sitting.answer("ann", question.number, [2, 0, 3, 1])
    (row,) = rows(sit.out)
    assert row["ranked"] == [question.answers[order[place]][0] for place in (2, 0, 3, 1)]
    (group,) = data.comparisons(sit.out, encoding, encoding.eot_token)
    assert group.pairs == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_the_places_are_random_and_a_reload_does_not_change_them(sit):
    sitting = sit()
    assert sitting.next("ann") is sitting.next("ann")
    orders = [tuple(sitting.order(make(prompt), who)) for prompt in PROMPTS for who in ("ann", "bob", "cy")]
    assert 30 < orders.count((0, 1)) < 60 and orders[0] == tuple(sitting.order(make(PROMPTS[0]), "ann"))
    number = sitting.next("ann").number
    with pytest.raises(ValueError, match="no longer open"):
        sitting.answer("ann", number + 1, "tie")
    for nonsense in ("better", [0], [0, 0], [0, 2], [True, False], None, {}, ["0", "1"]):
        with pytest.raises(ValueError, match="a verdict is"):
            sitting.answer("ann", number, nonsense)
    for nonsense in (None, ["text"], "x" * 2001, "\ud800"):
        with pytest.raises(ValueError, match="a comment has|surrogates not allowed"):
            sitting.answer("ann", number, "tie", nonsense)
    for nonsense in (None, 4, -1, True, "very", 1.0):
        with pytest.raises(ValueError, match="how sure"):
            sitting.answer("ann", number, "tie", "", nonsense)
    assert not sit.out.exists()


def test_a_comment_and_how_sure_one_is_stand_in_the_row_and_readers_go_on_without_them(sit, encoding):
    sitting = sit()
    question = sitting.next("ann")
    sitting.answer("ann", question.number, [1, 0], 'too "long"\u2028 \U0001f600', 3)
    sitting.answer("ann", sitting.next("ann").number, "bad")
    first, second = label.read_answers(sit.out)
    assert (first["comment"], first["sure"]) == ('too "long"\u2028 \U0001f600', 3) and not {"comment", "sure"} & set(
        second
    )
    assert second["verdict"] == "bad" and len(second["responses"]) == len(second["responses_ended"]) == 2
    assert len(data.comparisons(sit.out, encoding, encoding.eot_token)) == 1
    assert "how sure: 1 very sure, 0 fairly sure, 0 not sure" in label.report(label.read_answers(sit.out))


def test_a_file_of_an_earlier_version_is_read_continued_and_changed(sit):
    """Rows as they were written before ties had their answers' ends, and before "bad", "comment" and "sure"."""
    about = {"annotator": "ann", "time": "2026-01-01T00:00:00Z", "seconds": 2.5, "seed": 0, "checkpoint": ["m", "m"]}
    pair = {"prompt": "question 0", "chosen": "b", "rejected": "a", "chosen_ended": True, "rejected_ended": False}
    old = [pair | {"position": 1} | about, {"prompt": "question 1", "verdict": "tie", "responses": ["a", "b"]} | about]
    write(sit.out, old)
    sitting = sit()
    assert sitting.next("ann").prompt == "question 2" and label.read_answers(sit.out) == old
    assert label.report(old).startswith("annotator")
    assert [sitting.said(row) for row in old] in ([[0, 1], "tie"], [[1, 0], "tie"])
    sitting.revise("ann", 1, "skip")
    assert rows(sit.out)[1]["verdict"] == "skip" and rows(sit.out)[0] == old[0]


def test_a_sitting_that_was_killed_goes_on_where_it_stopped(sit):
    first = sit()
    done = [prefer(first, "ann", "answer 1").prompt for _ in range(5)]
    with open(sit.out, "a") as file:
        file.write('{"prompt": "question 5", "chos')  # the kill came here
    again = sit()
    assert len(rows(sit.out)) == 5 and again.progress("ann") | {"seconds_left": 0} == {
        "done": 5,
        "left": 25,
        "seconds_left": 0,
    }
    while again.next("ann"):
        done.append(prefer(again, "ann", "answer 0").prompt)
    assert sorted(done) == sorted(PROMPTS) and len(rows(sit.out)) == 30


def test_any_earlier_answer_can_be_changed_in_its_place_and_after_a_restart(sit):
    sitting = sit()
    for _ in range(3):
        prefer(sitting, "ann", "answer 1")
    prefer(sitting, "bob", "answer 1")
    before, open_question = rows(sit.out), sitting.next("ann")
    sitting.revise("ann", 0, [0, 1], "on second thoughts", 1)
    sitting.stop()
    sitting = sit()
    question = label.question_of(before[2])
    places = ["answer 0" in question.answers[i].text for i in sitting.order(question, "ann")]
    sitting.revise("ann", 2, [places.index(True), places.index(False)])
    after = rows(sit.out)
    assert after[1] == before[1] and after[3] == before[3] and len(after) == 4
    assert (after[0]["comment"], after[0]["sure"], after[0]["position"]) == ("on second thoughts", 1, 0)
    assert "answer 0" in after[2]["chosen"] and "answer 1" in after[2]["rejected"]
    for column in ("time", "seconds", "prompt", "annotator"):
        assert after[2][column] == before[2][column]
    assert (after[2]["chosen_ended"], after[2]["checkpoint"]) == (False, ["out/sft", "out/ppo"]) and after[2]["revised"]
    assert sitting.next("ann").prompt == open_question.prompt
    for nonsense in (3, -1, True, None, "0"):
        with pytest.raises(ValueError, match="no such earlier answer"):
            sitting.revise("ann", nonsense, "tie")
    with pytest.raises(ValueError, match="no such earlier answer"):
        sitting.revise("cy", 0, "tie")
    assert rows(sit.out) == after


@pytest.mark.parametrize("n, verdict", [(2, [1, 0]), (2, "tie"), (4, [2, 0, 3, 1]), (4, "bad")])
def test_an_earlier_answer_is_shown_as_it_was_asked(sit, n, verdict):
    """The same answers in the same places, with the same ends, and what was said of them."""
    sitting = sit(make=lambda prompt: make(prompt, n))
    question = sitting.next("ann")
    shown = [question.answers[i] for i in sitting.order(question, "ann")]
    sitting.answer("ann", question.number, verdict)
    (row,) = sitting.earlier("ann")
    again = label.question_of(row)
    assert [again.answers[i] for i in sitting.order(again, "ann")] == shown and sitting.said(row) == verdict
    sitting.revise("ann", 0, verdict)
    (same,) = sitting.earlier("ann")
    assert {name: value for name, value in same.items() if name != "revised"} == row
    assert again.number == question.number != make("another", n).number


def test_an_answer_to_a_question_that_was_shown_before_a_restart_counts(sit):
    sitting = sit(people=1)
    sitting.next("ann")
    shown = sitting.next("bob")
    sitting.stop()
    sitting = sit()
    sitting.next("ann")
    sitting.answer("bob", shown.number, "tie")
    assert [row["prompt"] for row in rows(sit.out)] == [shown.prompt] and sitting.next("bob").prompt != shown.prompt
    with pytest.raises(ValueError, match="no longer open"):  # and only once
        sitting.answer("bob", shown.number, "tie")
    with pytest.raises(ValueError, match="no longer open"):  # nor a question that another has open
        sitting.answer("cy", sitting.next("ann").number, "tie")


def test_several_people_get_different_questions_and_with_two_for_each_question_the_same(sit):
    sitting = sit()
    people = ["ann", "bob", "cy"]
    assert len({sitting.next(who).prompt for who in people}) == 3
    while any(sitting.next(who) and prefer(sitting, who, "answer 1") for who in people):
        pass
    assert sorted(row["prompt"] for row in rows(sit.out)) == sorted(PROMPTS)
    sit.out.unlink()
    sitting = sit(people=2)
    while any([sitting.next(who) and prefer(sitting, who, "answer 1") for who in people]):
        pass
    asked = [(row["prompt"], row["annotator"]) for row in rows(sit.out)]
    assert len(set(asked)) == len(asked) == 60 and {prompt for prompt, _ in asked} == set(PROMPTS)


def test_nobody_waits_for_the_model_and_only_so_many_are_made_ahead(sit):
    made = []
    sitting = sit(make=lambda prompt: made.append(prompt) or make(prompt))
    sitting.next("ann")
    time.sleep(0.2)
    assert rooms.AHEAD < len(made) <= rooms.AHEAD + 2
    sitting = sit(make=lambda prompt: None if prompt == "question 0" else make(prompt), prompts=PROMPTS[:3])
    assert sitting.next("ann").prompt == "question 1" and sitting.progress("ann")["left"] == 2


def test_the_report_counts_positions_checkpoints_and_agreement(sit):
    sitting = sit(people=2)
    for i in range(10):
        for who in ("ann", "bob"):
            prefer(sitting, who, "answer 1" if who == "ann" or i < 7 else "answer 0")
    sitting.answer("ann", sitting.next("ann").number, "tie")
    sitting.answer("ann", sitting.next("ann").number, "bad")
    said = label.report(rows(sit.out))
    first = sum(row.get("position") == 0 for row in rows(sit.out))
    low, high = wilson(first / 20, 20)
    assert f"the first shown was preferred in {first / 20:.3f} ({low:.3f} to {high:.3f}) of 20" in said
    assert "agreement: the same in 7 of 10 pairs of answers, alpha " in said
    p = (7 + 3 * 0.5 + 2 * 0.5) / 12  # both say ppo, the two disagree, a tie and both bad
    low, high = wilson(p, 12)
    assert f"out/ppo against out/sft: {p:.3f} ({low:.3f} to {high:.3f}) (prompts: 12" in said
    assert "ann                            10      1        1      0" in said
    call("--out", sit.out, "--report", "--json", sit.out.with_name("report.json"))
    found = json.loads(sit.out.with_name("report.json").read_text())
    (models,) = found["models"]
    assert models["win_rate"] == pytest.approx([p, low, high]) and models["prompts"] == 12
    counts = {"preferred": 10, "tie": 1, "bad": 1, "skip": 0}
    assert found["annotators"]["ann"].items() >= counts.items() and found["agreement"][0]["same"] == 7


def wilson(p, n):
    """The two shares from which p of n is 1.96 standard errors away."""
    return sorted(np.roots([1 + 1.96**2 / n, -2 * p - 1.96**2 / n, p**2]))


def test_of_four_ranked_responses_each_pair_of_two_models_counts(sit):
    sitting = sit(make=lambda prompt: make(prompt, 4), prompts=PROMPTS[:1])  # sft, ppo, sft, ppo
    question = sitting.next("ann")
    places = sitting.order(question, "ann")
    sitting.answer("ann", question.number, [places.index(i) for i in (1, 0, 2, 3)])
    (models,) = summarise(rows(sit.out))["models"]
    assert models["win_rate"][0] == 2 / 4  # the first ppo beats both, the second none


def test_a_sampler_that_fails_is_said_and_not_taken_for_the_end(sit):
    def fail_on_the_third(prompt):
        if prompt == "question 2":
            raise RuntimeError("out of memory")
        return make(prompt)

    sitting = sit(make=fail_on_the_third)
    prefer(sitting, "ann", "answer 1"), prefer(sitting, "ann", "answer 1")
    with pytest.raises(RuntimeError, match="out of memory"):
        sitting.next("ann")
    assert sitting.progress("ann")["left"] == 28


def test_a_question_that_somebody_left_open_goes_to_another_in_the_end(sit, monkeypatch):
    sitting = sit(prompts=PROMPTS[:2])
    left = sitting.next("ann")
    prefer(sitting, "bob", "answer 1")
    assert sitting.next("bob") is None  # ann may still be reading
    monkeypatch.setattr(rooms, "ABANDONED", 0)
    time.sleep(0.01)
    assert prefer(sitting, "bob", "answer 1") is left
    with pytest.raises(ValueError, match="no longer open"):
        sitting.answer("ann", left.number, "tie")
    assert len(rows(sit.out)) == 2


def test_an_answer_that_cannot_be_written_leaves_the_file_as_it_was(sit, monkeypatch):
    sitting = sit()
    prefer(sitting, "ann", "answer 1")
    before, question = sit.out.read_bytes(), sitting.next("ann")

    def full(_):
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="cannot be written .no space"):
            sitting.answer("ann", question.number, "tie")
    assert sit.out.read_bytes() == before and sitting.progress("ann")["done"] == 1
    sitting.answer("ann", question.number, "tie")
    assert len(rows(sit.out)) == 2


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(sit):
    """Serve a sitting; stop all servers in the end."""
    servers = []

    def start(host="127.0.0.1", **more):
        servers.append(label.Server(sit(), host, 0, **more))
        threading.Thread(target=servers[-1].serve_forever, args=[0.01], daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def served(serve):
    return serve()


def request(server, method="POST", path=None, body=None, **headers):
    """(status, headers, body) of one request; a header of None is left out."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    path = f"/{server.token}/next" if path is None else path
    body = json.dumps({"annotator": "ann"} | body).encode() if isinstance(body, dict) else body
    given = {"Content-Length": None if body is None else str(len(body))}
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in (given | {name.replace("_", "-"): value for name, value in headers.items()}).items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    reply = connection.getresponse()
    return reply.status, dict(reply.getheaders()), reply.read()


def test_the_page_and_its_requests_work(served, sit):
    status, headers, page = request(served, "GET", f"/{served.token}/?from=mail")
    assert status == 200 and b"default-src 'none'" in page and b"POLICY" not in page
    assert (headers["Referrer-Policy"], headers["X-Frame-Options"]) == ("no-referrer", "DENY")
    asked = json.loads(request(served, body={})[2])
    assert (
        asked["prompt"] == [{"role": "", "content": "question 0"}]
        and len(asked["responses"]) == 2
        and "checkpoint" not in json.dumps(asked)
    )
    said = {"number": asked["number"], "verdict": [1, 0]}
    status, headers, body = request(served, path=f"/{served.token}/answer", body=said)
    assert status == 200 and json.loads(body)["prompt"][0]["content"] == "question 1"
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert rows(sit.out)[0]["chosen"] == asked["responses"][1]
    earlier = f"/{served.token}/earlier"
    listed = {"earlier": [{"prompt": "question 0", "said": [1, 0]}]}
    assert json.loads(request(served, path=earlier, body={})[2]) == listed
    again = json.loads(request(served, path=earlier, body={"index": 0})[2])
    assert again["responses"] == asked["responses"]
    assert (again["said"], again["comment"], again["sure"]) == ([1, 0], "", 0)
    change = {"index": 0, "verdict": "bad", "comment": "none", "sure": 2}
    body = json.loads(request(served, path=f"/{served.token}/revise", body=change)[2])
    assert body["prompt"][0]["content"] == "question 1" and body["done"] == 1 and rows(sit.out)[0]["verdict"] == "bad"


def test_a_request_without_the_token_or_with_nonsense_is_refused(served, sit):
    token, there = served.token, f"/{served.token}/"
    status = lambda *given, **more: request(served, *given, **more)[0]  # noqa: E731
    for path in ("/", "/wrong/", f"/{token[:-1]}/", f"/{token}x/", "/favicon.ico", "//", "/%00/", "/wrong/next", "*"):
        assert status("GET", path) == status("POST", path, body={}) == 404
    for action in (
        "label.py",
        "../page.html",
        "%2e%2e/%2e%2e/etc/passwd",
        "../../etc/passwd",
        "answer/../next",
        "next/",
    ):
        assert status("GET", there + action) == status("POST", there + action, body={}) == 404
    assert b"open the whole address that the terminal shows" in request(served, "GET", "/")[2]
    assert status(body={}, Content_Length=None) == status(body={}, Content_Length="-5") == 400
    assert status(body=b"x" * 10, Content_Length=str(10**12)) == 400
    assert status(body=b"x" * 10, Content_Length="9" * 5000) == 400
    for body in (b"", b"[]", b"{", b'"text"', b"\xff\xfe", b"[" * 9999, b"null"):
        assert status(body=body) == 400
    for body in ({"annotator": ""}, {"annotator": "x" * 41}, {"annotator": ["ann"]}, {"annotator": None}):
        assert status(body=body) == 400
    for body in ({"index": 0}, {"index": -1}, {"index": True}, {"index": "0"}, {"index": [0]}):
        assert status(path=there + "earlier", body=body) == 400
        assert status(path=there + "revise", body=body | {"verdict": "tie"}) == 400
    half = {"annotator": "\ud800", "number": label.Question("question 0", make("question 0").answers, []).number}
    half["verdict"] = "tie"
    for body in ({}, {"number": 0}, {"number": "../x", "verdict": "tie"}, {"number": 3, "verdict": [0, 1]}, half):
        assert status(path=there + "answer", body=body) == 400
    assert status("DELETE", there) == status("OPTIONS", there) == 501
    assert not sit.out.exists() and status(body={}) == 200


def test_a_hundred_requests_at_once_are_all_answered_and_no_answer_is_lost(served, sit):
    served.sitting.stop()
    served.sitting = sit([f"prompt {i}?" for i in range(60)])  # a person who has answered may open a second question

    def one(i):
        who = {"annotator": f"person {i % 20}"}
        if i >= 20:
            return request(served, body=who)[0]
        answer = who | {"number": json.loads(request(served, body=who)[2])["number"], "verdict": "tie"}
        return request(served, path=f"/{served.token}/answer", body=answer)[0]

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        assert set(pool.map(one, range(100))) == {200}
    answered = [row["prompt"] for row in rows(sit.out)]
    assert len(answered) == len(set(answered)) == 20


def test_a_silent_client_does_not_keep_others_waiting(served):
    with socket.create_connection(("127.0.0.1", served.server_port)) as silent:
        silent.sendall(b"POST /")
        assert request(served, body={})[0] == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "127.1", "::1", "::"])
def test_the_printed_address_opens_the_page(serve, host):
    try:
        address = serve(host).address
    except InputError:
        pytest.skip("this machine has no such address")
    for name in (address, address.removesuffix("/")):
        assert b"Which is better?" in urllib.request.urlopen(name, timeout=20).read(), name


def test_the_address_outlives_a_restart_and_only_its_owner_can_read_the_token(serve, tmp_path):
    token, path = serve().token, tmp_path / "answers.jsonl.token"
    assert len(token) == 22 and path.stat().st_mode & 0o777 == 0o600
    assert serve().token == token
    for broken in ("", "short", "../" * 8, "\xff" * 22):
        path.write_text(broken)
        path.chmod(0o644)
        assert serve().token not in (token, broken) and path.stat().st_mode & 0o777 == 0o600


def test_instructions_stand_in_the_page_as_text(serve):
    page = serve(instructions=f"POLICY {NASTY} INSTRUCTIONS").page
    assert page.count("<script") == 1 and "&lt;script&gt;document.title = &quot;owned&quot;&lt;/script&gt;" in page
    assert page.count("POLICY") == 1 and page.count("INSTRUCTIONS") == 1


# --- the command ------------------------------------------------------------------------------------------------------


def call(*options):
    label.label(cli.parse(label.Config, [str(option) for option in options]))


def given(folders, *more):
    tmp = folders["tmp"]
    shape = "--response_len", 8, "--n_prompts", 9, "--port", 0
    return "--init", folders["sft"], "--prompts", tmp / "prompts.jsonl", "--out", tmp / "a.jsonl", *shape, *more


def people_say(monkeypatch, who, verdicts):
    """Let `who` answer with these verdicts in place of the page, as long as there are both; then Ctrl-C."""

    def serve(server):
        while verdicts and server.sitting.next(who):
            server.sitting.answer(who, server.sitting.next(who).number, verdicts.pop(0))
        raise KeyboardInterrupt

    monkeypatch.setattr(label.Server, "serve_forever", serve)


def test_samples_depend_on_seed_and_prompt_alone_and_two_models_answer_in_turn(folders):
    both = f"{folders['sft']},{folders['sft']}/model.pt"
    shape = ["--init", both, "--samples", 4]
    prompts, first = label.prepare(cli.parse(label.Config, [str(x) for x in given(folders, *shape)]))
    _, second = label.prepare(cli.parse(label.Config, [str(x) for x in given(folders, *shape)]))
    questions = [first(prompt) for prompt in prompts[:6]]
    assert [q.answers for q in questions] == [second(prompt).answers for prompt in reversed(prompts[:6])][::-1]
    assert all(sorted(q.checkpoints) == sorted(both.split(",") * 2) for q in questions)


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go"}]
HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\nAssistant:"


def test_answers_that_exist_are_asked_as_they_are_without_a_model(tmp_path, monkeypatch, encoding):
    """Logs, an API's outputs, old pairs of each shape. Two rows of one prompt are two questions."""
    logs = [
        {"prompt": "p", "responses": ["a", "b"], "models": ["big", "small"]},
        {"prompt": "p", "responses": ["a", "c"]},
    ]
    logs += [{"messages": TALK, "responses": ["a", "b", "c"]}, {"prompt": TALK, "chosen": "a", "rejected": "b"}]
    said = [[{"role": "assistant", "content": text}] for text in "ab"]
    logs += [{"chosen": TALK[:1] + said[0], "rejected": TALK[:1] + said[1], "models": ["m1", "m2"]}]
    logs += [{"chosen": f"{HH} good", "rejected": f"{HH} bad"}, {"prompt": "q", "chosen": "a", "rejected": "a"}]
    options = ["--prompts", write(tmp_path / "logs.jsonl", logs), "--out", tmp_path / "a.jsonl", "--port", 0]
    monkeypatch.setattr(label.nets, "load_gpt", lambda *_: pytest.fail("a model was loaded"))
    people_say(monkeypatch, "ann", [[0, 1], "tie"])
    call(*options)
    people_say(monkeypatch, "ann", [[0, 1, 2], *[[1, 0]] * 9])
    call(*options)
    made = rows(tmp_path / "a.jsonl")
    assert [row["prompt"] for row in made] == ["p", "p", TALK, TALK, TALK[:1], HH]
    assert sorted(made[0]["checkpoint"]) == ["big", "small"] and made[1]["verdict"] == "tie"
    assert [made[0]["chosen"], made[0]["checkpoint"][0]] in (["a", "big"], ["b", "small"])
    assert sorted(made[2]["ranked"]) == ["a", "b", "c"] and sorted(made[2]["checkpoint"])[0] == "response 1"
    assert [made[3]["chosen"], made[3]["checkpoint"][0]] in (["a", "chosen"], ["b", "rejected"])
    assert sorted(made[4]["checkpoint"]) == ["m1", "m2"] and {made[5]["chosen"], made[5]["rejected"]} == {
        " good",
        " bad",
    }
    assert len(data.comparisons(tmp_path / "a.jsonl", encoding, encoding.eot_token)) == 5
    people_say(monkeypatch, "bob", [[1, 0], [1, 0], [0, 1, 2], *[[1, 0]] * 9])
    second_opinion = tmp_path / "second.jsonl"  # on what people said, ties too
    call("--prompts", tmp_path / "a.jsonl", "--out", second_opinion, "--port", 0)
    second = rows(second_opinion)
    assert [label.question_of(row).number for row in second] == [label.question_of(row).number for row in made]
    report = label.report(made + second)
    assert "of 6 pairs of answers" in report and "big against small" in report


@pytest.mark.parametrize("row, named", [
    ({"prompt": "p", "responses": ["a"]}, 'row 1: "responses", or "chosen" and "rejected", are not two or more texts'),
    ({"prompt": "p", "responses": ["a", 3]}, "row 1: .*are not two or more texts"),
    ({"prompt": "p", "chosen": "a"}, "row 1: .*are not two or more texts"),
    ({"prompt": "p", "responses": ["a", "b"], "models": ["m"]}, 'row 1: "models", or "checkpoint", does not name'),
    ({"prompt": "p", "responses": ["a", "b"], "responses_ended": [True]}, 'row 1: a column "…_ended"'),
    ({"responses": ["a", "b"]}, "row 1: a comparison has"),
    ({"messages": [], "responses": ["a", "b"]}, "row 1: a conversation is a list"),
    ({"prompt": TALK, "chosen": [{"role": "assistant", "content": "a", "tool_calls": [{}]}], "rejected": "b"}, "row 1"),
    ({"prompt": "p", "responses": ["a", "a"]}, "no row holds two different responses"),
])  # fmt: skip
def test_a_row_whose_answers_cannot_be_asked_is_named_in_one_sentence(tmp_path, row, named):
    out = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match=named):
        call("--prompts", write(tmp_path / "logs.jsonl", [row]), "--out", out)
    assert not out.exists()
    with pytest.raises(InputError, match="--init, --samples: no model answers"):
        call("--prompts", tmp_path / "logs.jsonl", "--out", out, "--init", "out/mine")


def test_what_a_conversation_holds_is_shown_and_its_tools_and_calls_too():
    call = {"function": {"name": "look", "arguments": "{}"}}
    messages = [
        *TALK,
        {"role": "assistant", "content": "Wait.", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
    ]
    row = {"prompt": messages, "tools": [{"name": "look"}], "responses": ["a", "b"], "checkpoint": ["m", "m"]}
    question = label.question_of(row)
    shown = [(turn["role"], turn["content"]) for turn in label.turns_of(question)]
    said = [(each["role"], each["content"]) for each in TALK]
    assert shown == [
        ("tools", '[{"name": "look"}]'),
        *said,
        ("assistant", f"Wait.\n[{json.dumps(call)}]"),
        ("tool", "42"),
    ]
    question.prompt = HH
    assert [(turn["role"], turn["content"]) for turn in label.turns_of(question)][-3:] == said
    question.prompt = "A play.\n\nHuman: I speak."
    assert label.turns_of(question) == [{"role": "", "content": question.prompt}]


@pytest.mark.parametrize("options, named", [
    (["--samples", 1], "--samples 1"), (["--prompts", ""], "--prompts"), (["--init", "nowhere"], "--init nowhere"),
    (["--response_len", 48], "longer than 48 tokens"), (["--out", "nothing.jsonl", "--report"], "nothing.jsonl"),
    (["--init", "sft,sft"], "name each model once"), (["--host", "no.invalid"], "no.invalid, --port 0"),
])  # fmt: skip
def test_bad_options_are_named(folders, options, named):
    with pytest.raises(InputError, match=named):
        call(*given(folders, *options))


def test_instructions_that_are_missing_are_named(folders):
    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        call(*given(folders, "--instructions", "nothing.txt"))


def test_two_servers_do_not_write_to_one_file_and_a_broken_file_is_left_alone(folders):
    out = folders["tmp"] / "a.jsonl"
    with locked(out), pytest.raises(InputError, match="--out .*a.jsonl: another run writes to it"):
        call(*given(folders))
    write(out, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    before = out.read_bytes()
    with pytest.raises(InputError, match='a.jsonl:1: no column "annotator"'):
        call(*given(folders))
    assert out.read_bytes() == before


def test_a_file_of_pairs_does_not_become_one_of_rankings(folders, monkeypatch):
    people_say(monkeypatch, "ann", [[0, 1]])
    call(*given(folders))
    with pytest.raises(InputError, match="--samples 3: .* another number"):
        call(*given(folders, "--samples", 3))


@pytest.mark.slow
def test_the_command_serves_its_address_and_ends_well_when_stopped(folders):
    """Stopped while the model may still be answering: exit code 0, what was answered kept, no abort."""
    command = [sys.executable, "-m", "tools.label", *map(str, given(folders, "--port", 0))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )  # fmt: skip
    page = urllib.request.urlopen(address_of(process), timeout=20).read()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert b"Which is better?" in page and process.returncode == 0 and "holds 0 answers" in out and not error, error

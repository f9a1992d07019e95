"""The labelling page in a real browser: a whole sitting by keyboard, in a headless Chromium."""

import json
import shutil
import threading

import pytest

from data import label

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.slow
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
NASTY = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"


def make(prompt, n=2):
    answers = [
        (f"{NASTY} answer {i} to {prompt}\n\nin two paragraphs, the second one of some length", i != 0)
        for i in range(n)
    ]
    return label.Question(prompt, answers, ["out/sft"] * n)


@pytest.fixture
def sitting(tmp_path, request):
    n = getattr(request, "param", 2)
    prompts = [f"<b>question</b> {i}" for i in range(20)]
    sitting = label.Sitting(prompts, lambda prompt: make(prompt, n), tmp_path / "answers.jsonl", 1, 0)
    server = label.Server(sitting, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sitting.address = server.address
    yield sitting
    server.shutdown()
    server.server_close()


@pytest.fixture
def page():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
        page.on("dialog", lambda dialog: page.problems.append(dialog.message))
        yield page
        browser.close()


def begin(page, address, name="ann"):
    page.goto(address)
    page.keyboard.type(name)  # the field has the focus
    page.keyboard.press("Enter")
    wait(page, "done")


def press(page, key, wait_for):
    page.keyboard.press(key)
    wait(page, wait_for)


def wait(page, text):
    page.wait_for_function("text => document.getElementById('status').textContent.includes(text)", arg=text)
    page.wait_for_timeout(320)  # a second key within 300 ms would be taken for a slip


def rows(sitting):
    return [json.loads(line) for line in sitting.out.read_text().splitlines()]


@needs_chromium
def test_twenty_pairs_by_keyboard_with_undo_and_reload(sitting, page):
    begin(page, sitting.address)
    assert page.locator("#prompt").text_content() == "<b>question</b> 0" and page.locator("#prompt b").count() == 0
    keys = ["1", "2", "ArrowLeft", "ArrowRight", "t", "s"]
    chosen, texts = [], []
    for i in range(20):
        if i == 7:
            page.reload()
            wait(page, "7 done, 13 to go")  # the name is remembered, and the question is the same
            assert page.locator("#prompt").text_content() == "<b>question</b> 7"
        if i == 12:
            press(page, "u", "Taken back. 11 done")
            chosen.pop()
            press(page, "2", "12 done")
            chosen.append(texts[1])
        texts = page.locator(".answer .text").all_text_contents()
        press(page, keys[i % 6], f"{i + 1} done")
        chosen.append(texts[i % 6 % 2] if i % 6 < 4 else None)
    assert page.locator("#end").is_visible() and not page.locator("#question").is_visible()
    assert [row.get("chosen") for row in rows(sitting)] == chosen and len(chosen) == 20
    assert [row.get("verdict") for row in rows(sitting)].count("tie") == 3
    press(page, "u", "Taken back. 19 done")
    press(page, "s", "20 done")
    assert page.title() == "Which is better?" and not page.problems


@needs_chromium
@pytest.mark.parametrize("sitting", [4], indirect=True)
def test_four_are_ranked_by_their_numbers_or_by_tab_and_enter(sitting, page):
    begin(page, sitting.address)
    texts = page.locator(".answer .text").all_text_contents()
    for key in ("3", "4", "Backspace", "1"):
        page.keyboard.press(key)
    assert page.locator(".answer[aria-pressed=true]").count() == 2
    press(page, "4", "1 done")
    assert rows(sitting)[0]["ranked"] == [texts[i] for i in (2, 0, 3, 1)]
    texts = page.locator(".answer .text").all_text_contents()
    for _ in range(3):  # from the heading the first response is next
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
    wait(page, "2 done")
    assert rows(sitting)[1]["ranked"] == texts and not page.problems


@needs_chromium
@pytest.mark.parametrize("width, scheme", [(1300, "light"), (360, "dark")])
def test_it_fits_a_wide_and_a_narrow_window_and_every_control_has_a_name(sitting, page, width, scheme, tmp_path):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    begin(page, sitting.address)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = [box.bounding_box() for box in page.locator(".answer").all()]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 700)  # side by side where there is room
    for button in page.locator("button:visible, input:visible, progress").all():
        assert button.evaluate("b => (b.getAttribute('aria-label') || b.textContent).trim()")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
    assert dark == (scheme == "dark")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 5000


@needs_chromium
def test_a_second_click_in_haste_does_not_answer_the_next_question(sitting, page):
    begin(page, sitting.address)
    page.locator(".answer").first.dblclick()
    wait(page, "1 done")
    page.keyboard.press("1")
    page.keyboard.press("1")
    wait(page, "2 done")
    assert len(rows(sitting)) == 2


@needs_chromium
@pytest.mark.parametrize("sitting", [3], indirect=True)
def test_after_a_failed_request_a_ranking_begins_again(sitting, page):
    begin(page, sitting.address)
    page.route("**/answer", lambda route: route.abort())
    page.keyboard.press("3")
    page.keyboard.press("1")
    page.wait_for_selector("#trouble:not(:empty)")
    page.unroute("**/answer")
    assert page.locator(".answer[aria-pressed=true]").count() == 0
    page.keyboard.press("3")
    page.keyboard.press("2")
    wait(page, "1 done")
    texts = [text for text in rows(sitting)[0]["ranked"]]
    order = sitting.order(make("<b>question</b> 0", 3), "ann")
    assert [f"answer {order[place]} " in text for place, text in zip((2, 1, 0), texts)] == [True] * 3


@needs_chromium
def test_a_server_that_went_away_is_said_and_nothing_counts_as_saved(sitting, page):
    begin(page, sitting.address)
    page.route("**/answer", lambda route: route.abort())
    page.keyboard.press("1")
    page.wait_for_selector("#trouble:not(:empty)")
    assert "Reload" in page.locator("#trouble").text_content() and not sitting.out.exists()

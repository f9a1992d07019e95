"""The labelling page in a real browser: whole sittings by key, mouse and finger, in a headless Chromium."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from common.runs import read_metrics
from data import InputError
from tests.conftest import CHROMIUM, ROOT, address_of, needs_chromium, run
from tools import label

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright drives the browser")
pytestmark = [pytest.mark.slow, needs_chromium]
NASTY = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
NASTY += "' onmouseover='document.title=1' \u2028\u2029 <!-- ]]> ${document.title=1} {{1}} POLICY INSTRUCTIONS"
SENTENCE = "The committee agreed on three points after a long debate about the budget of the coming year. "
WORDS_800 = "\n\n".join([SENTENCE * 10] * 5)
SIZES = [(1440, 900), (768, 1024), (390, 844)]


def make(prompt, n=2):
    answers = [
        (f"Answer {i} to {prompt}\n\nin two paragraphs, the second one of some length", i != 0) for i in range(n)
    ]
    return label.Question(prompt, answers, ["out/sft"] * n)


@pytest.fixture
def serve(tmp_path):
    """Serve a sitting whose question to a prompt is `make(prompt)`; stop all of them in the end."""
    servers = []

    def start(make=make, prompts=tuple(f"<b>question</b> {i}" for i in range(20)), port=0, **more):
        sitting = label.Sitting(list(prompts), make, tmp_path / "answers.jsonl", 1, 0)
        servers.append(label.Server(sitting, "127.0.0.1", port, **more))
        threading.Thread(target=servers[-1].serve_forever, args=[0.01], daemon=True).start()
        sitting.server, sitting.address = servers[-1], servers[-1].address
        return sitting

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium):
    yield chromium
    for context in chromium.contexts:
        context.close()


def opened(browser, width=1440, height=900, touch=False, **more):
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=touch, is_mobile=touch, **more)
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    page.on("dialog", lambda dialog: page.problems.append(dialog.message))
    return page


@pytest.fixture
def page(browser):
    return opened(browser)


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
    return [json.loads(line) for line in sitting.out.read_text().splitlines()] if sitting.out.exists() else []


def texts(page):
    return page.locator("article .text").all_text_contents()


def test_twenty_pairs_by_keyboard_with_a_change_and_a_reload(serve, page):
    sitting = serve()
    begin(page, sitting.address)
    assert page.locator("#prompt").text_content() == "<b>question</b> 0" and page.locator("#prompt b").count() == 0
    keys = ["1", "2", "ArrowLeft", "ArrowRight", "t", "s", "b"]
    said = []
    for i in range(20):
        if i == 9:
            page.reload()
            wait(page, "9 done, 11 to go")  # the name is remembered, and the question is the same
            assert page.locator("#prompt").text_content() == "<b>question</b> 9"
        if i == 12:
            page.keyboard.press("u")
            page.wait_for_selector("#earlier[open]")
            page.keyboard.press("Enter")  # the last answer is the first in the list
            wait(page, "Your answer 12 of 12")
            said[11] = texts(page)[1]
            press(page, "2", "Changed. 12 done")
            assert page.locator("#prompt").text_content() == "<b>question</b> 12"
        shown = texts(page)
        press(page, keys[i % 7], f"{i + 1} done")
        said.append([*shown, *shown, "tie", "skip", "bad"][i % 7])
    assert page.locator("#end").is_visible() and not page.locator("#question, #bar").first.is_visible()
    assert [row.get("verdict") or row["chosen"] for row in rows(sitting)] == said and len(said) == 20
    assert page.title() == "Which is better?" and not page.problems


def test_selecting_or_clicking_text_of_an_answer_is_no_vote(serve, page):
    sitting = serve()
    begin(page, sitting.address)
    box = page.locator("article .text").first.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 60, steps=5)
    page.mouse.up()
    assert "Answer" in page.evaluate("String(getSelection())")
    page.locator("article").first.dblclick()
    page.locator(".place").nth(1).click()
    page.wait_for_timeout(400)
    assert rows(sitting) == [] and page.locator("#prompt").text_content() == "<b>question</b> 0"
    page.get_by_role("button", name="2 is better").click()
    wait(page, "1 done")
    assert len(rows(sitting)) == 1


def test_four_are_ranked_by_their_numbers_or_by_tab_and_enter(serve, page):
    sitting = serve(lambda prompt: make(prompt, 4))
    begin(page, sitting.address)
    shown = texts(page)
    for key in ("3", "4", "Backspace", "1"):
        page.keyboard.press(key)
    assert page.locator("article.picked").count() == page.locator("#choices [aria-pressed=true]").count() == 2
    assert page.locator(".place").all_text_contents()[2] == "Response 3 — number 1"
    press(page, "4", "1 done")
    assert rows(sitting)[0]["ranked"] == [shown[i] for i in (2, 0, 3, 1)]
    shown = texts(page)
    for name in ("1", "2", "3"):
        while page.evaluate("document.activeElement.textContent.trim()") != name:
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
    wait(page, "2 done")
    assert rows(sitting)[1]["ranked"] == shown and not page.problems


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("width, height", SIZES)
def test_choices_prompt_and_heads_stay_in_view_beside_answers_of_800_words(serve, browser, n, width, height, tmp_path):
    answers = [(f"{WORDS_800} {i}", True) for i in range(n)]
    sitting = serve(lambda prompt: label.Question(prompt, answers, ["m"] * n), ["What was agreed? " * 150])
    page = opened(browser, width, height, touch=width < 1000)
    begin(page, sitting.address)
    boxes = [box.bounding_box() for box in page.locator("article").all()]
    assert len({box["x"] for box in boxes}) == (1 if width < 700 else 2)  # two by two where there is room
    end = page.evaluate("document.documentElement.scrollHeight - innerHeight")
    assert end > height
    for place in range(0, end, height // 2):
        page.evaluate("y => scrollTo(0, y)", place)
        controls = page.evaluate(IN_VIEW, "#choices button, #comment, #sure, #prompt")
        assert len(controls) == n + 3 + 3 and None not in controls, place
        heads = {left for left in page.evaluate(IN_VIEW, ".place") if left is not None}
        assert len(heads) == (1 if width < 700 else 2), place
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#whole").click()
    assert page.locator("#prompt").evaluate("e => e.scrollHeight === e.clientHeight")
    page.screenshot(path=tmp_path / "page.png")
    assert not page.problems


IN_VIEW = """selector => [...document.querySelectorAll(selector)].map(e => {
    const box = e.getBoundingClientRect();  // its left edge if its middle is in view with nothing before it, else null
    return e.contains(document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2)) ? box.x : null;
})"""


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_window_and_every_control_has_a_name_and_is_large_enough(serve, browser, width, height, scheme):
    sitting = serve()
    page = opened(browser, width, height, touch=width < 1000, color_scheme=scheme)
    begin(page, sitting.address)
    page.keyboard.press("1")
    wait(page, "1 done")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for control in page.locator("button:visible, input:visible, select:visible, textarea:visible, progress").all():
        assert control.evaluate("e => (e.ariaLabel || e.labels?.[0]?.textContent || e.textContent).trim()")
    for button in page.locator("#bar button, #bar select, #bar textarea").all():
        assert button.bounding_box()["height"] >= 44
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
    assert dark == (scheme == "dark")
    for ink in page.locator(".text, .place, .status, #choices button").all():
        assert ink.evaluate(CONTRAST) >= 4.5  # WCAG 2.2, 1.4.3


CONTRAST = """e => {
    const light = color => color.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
        .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4).reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
    let back = e;
    while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
    const [a, b] = [getComputedStyle(e).color, getComputedStyle(back).backgroundColor].map(light).sort((x, y) => y - x);
    return (a + .05) / (b + .05);
}"""  # noqa: E501


@pytest.mark.parametrize("width, height", SIZES)
def test_each_paragraph_runs_its_own_way_and_code_keeps_its_lines(serve, browser, width, height):
    arabic, chinese = "مرحبا بالعالم.\nOne English line.\nعودة", "人工智能的发展正在改变我们的生活方式。" * 60
    code = f"See:\n```python\nif x:\n\tprint({'1 + ' * 80}1)\n```\nאחרי\n"
    asked = {"اكتب فقرة": (arabic, "short"), "写": (chinese, "不"), "code": (code, "```\nnever closed")}
    sitting = serve(lambda p: label.Question(p, [(text, True) for text in asked[p]], ["m"] * 2), asked)
    page = opened(browser, width, height, touch=width < 1000)
    begin(page, sitting.address)
    for i, (prompt, answers) in enumerate(asked.items()):
        shown = [answer.replace("```python\n", "").replace("```\n", "") for answer in answers]
        assert page.locator("#prompt").text_content() == prompt and sorted(texts(page)) == sorted(shown)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if i == 0:
            assert page.locator("#prompt .text").evaluate(SIDES) == ["right"]
            body = page.locator("article .text", has_text="English")
            assert body.evaluate(SIDES) == ["right", "left", "right"]
        if i == 1:
            body = page.locator("article .text", has_text="人")
            assert body.evaluate("e => e.scrollWidth <= e.clientWidth && e.clientHeight > 100")
        if i == 2:
            lines = page.locator("code").first if "See" in texts(page)[0] else page.locator("code").nth(1)
            assert lines.text_content().startswith("if x:\n\tprint(") and page.locator("code").count() == 2
            assert lines.evaluate("e => { e.scrollLeft = 50; return e.scrollLeft === 50; }")  # a long line is reached
            assert lines.evaluate("e => getComputedStyle(e).direction") == "ltr"
            assert page.locator("article .text", has_text="See").evaluate(SIDES)[-1] == "right"  # after the code
        press(page, "t", f"{i + 1} done")
    assert not page.problems


SIDES = """e => {  // the side at which each line of the text nodes begins
    const sides = [], outer = e.getBoundingClientRect();
    for (const node of e.childNodes) {
        if (node.nodeType !== 3) continue;
        let start = 0;
        for (const line of node.textContent.split("\\n")) {
            const range = document.createRange();
            range.setStart(node, start);
            range.setEnd(node, start + line.length);
            start += line.length + 1;
            const box = range.getBoundingClientRect();
            if (line) sides.push(box.x - outer.x < outer.right - box.right ? "left" : "right");
        }
    }
    return sides;
}"""


def test_without_a_keyboard_there_are_no_hints_and_the_finger_votes(serve, browser):
    sitting = serve()
    page = opened(browser, 390, 844, touch=True)
    begin(page, sitting.address)
    assert page.locator("kbd:visible, .keys:visible").count() == 0
    page.locator("#sure").select_option("not sure")
    page.get_by_role("button", name="Both bad").tap()
    wait(page, "1 done")
    page.get_by_role("button", name="Instructions").tap()
    assert page.locator("#help").is_visible() and page.locator("kbd:visible").count() == 0
    assert (rows(sitting)[0]["verdict"], rows(sitting)[0]["sure"]) == ("bad", 1)


def test_keys_can_be_turned_off_and_stay_off(serve, page):
    sitting = serve()
    begin(page, sitting.address)
    assert page.locator("kbd:visible").count() > 5
    page.get_by_label("keys").uncheck()
    page.reload()
    wait(page, "0 done")
    for key in ("1", "t", "b", "s", "ArrowLeft", "u"):
        page.keyboard.press(key)
    page.wait_for_timeout(300)
    assert rows(sitting) == [] and page.locator("kbd:visible, dialog:visible").count() == 0
    page.get_by_label("keys").check()
    press(page, "t", "1 done")  # the box has the focus, and the key counts all the same


@pytest.mark.parametrize("key, code", [("ف", "KeyT"), ("е", "KeyT"), ("t", "KeyK"), ("T", "KeyT")])
def test_a_letter_is_found_on_keyboards_of_other_scripts(serve, page, key, code):
    sitting = serve()
    begin(page, sitting.address)
    event = {"key": key, "code": code, "bubbles": True}
    page.evaluate("event => document.body.dispatchEvent(new KeyboardEvent('keydown', event))", event)
    wait(page, "1 done")
    assert rows(sitting)[0]["verdict"] == "tie"


def test_instructions_are_shown_first_on_demand_and_again_when_they_change(serve, page):
    sitting = serve(instructions="Prefer the <true> one.\n\nTake breaks.")
    page.goto(sitting.address)
    assert page.locator("#start #read").inner_text() == "Prefer the <true> one.\n\nTake breaks."
    page.keyboard.type("ann")
    page.keyboard.press("Enter")
    wait(page, "0 done")
    assert not page.locator("text=Take breaks").first.is_visible()
    page.keyboard.press("i")
    assert "Take breaks." in page.locator("dialog:visible").inner_text()
    page.keyboard.press("1")  # no vote behind the dialog
    page.keyboard.press("Escape")
    page.reload()
    wait(page, "0 done")
    assert not page.locator("#start").is_visible()
    port = sitting.server.server_port
    sitting.server.shutdown()
    sitting.server.server_close()
    serve(instructions="Other words.", port=port)
    page.reload()
    page.wait_for_selector("#start:visible")
    assert page.locator("#start #read").inner_text() == "Other words." and page.locator("#name").input_value() == "ann"
    page.keyboard.press("Enter")
    wait(page, "0 done")
    assert rows(sitting) == []


def test_comment_and_how_sure_are_kept_through_a_reload_and_saved_with_the_choice(serve, page):
    sitting = serve()
    begin(page, sitting.address)
    page.keyboard.press("h")
    page.keyboard.press("h")
    page.keyboard.press("c")
    page.keyboard.type("stub 1t2b\nsecond line: \u202e שלום")  # no key of these votes
    page.reload()
    wait(page, "0 done")
    assert page.locator("#comment").input_value() == "stub 1t2b\nsecond line: \u202e שלום"
    press(page, "1", "1 done")
    assert page.locator("#comment").input_value() == "" and page.locator("#sure").input_value() == "0"
    page.locator("#comment").fill("mine")
    page.keyboard.press("Escape")
    press(page, "t", "2 done")
    first, second = rows(sitting)
    assert (first["comment"], first["sure"]) == ("stub 1t2b\nsecond line: \u202e שלום", 2)
    assert second["comment"] == "mine" and "sure" not in second
    assert len(label.read_answers(sitting.out)) == 2


@pytest.mark.parametrize("touch", [False, True])
def test_any_earlier_answer_is_seen_again_and_changed_or_left(serve, browser, touch):
    sitting = serve(lambda prompt: make(prompt, 3))
    page = opened(browser, 390 if touch else 1440, 844, touch)
    begin(page, sitting.address)
    assert not page.locator("#back").is_visible()
    for i in range(4):
        page.locator("#comment").fill(f"comment {i}")
        for name in ("3", "1"):
            page.get_by_role("button", name=name, exact=name == "3").first.click()
        wait(page, f"{i + 1} done")
    page.locator("#comment").fill("of the fifth")
    before = rows(sitting)
    page.locator("#back").click()
    page.wait_for_selector("#earlier[open]")
    entries = page.locator("#list button").all_text_contents()
    assert entries == [f"{i}: 3 > 1 > 2<b>question</b> {i - 1}" for i in (4, 3, 2, 1)]
    page.locator("#list button").nth(2).click()
    wait(page, "Your answer 2 of 4 was: 3 > 1 > 2.")
    assert page.locator("#comment").input_value() == "comment 1"
    page.locator("#leave").click()
    wait(page, "4 done")
    assert rows(sitting) == before and page.locator("#comment").input_value() == "of the fifth"
    page.locator("#back").click()
    page.locator("#list button").nth(3).click()
    wait(page, "Your answer 1 of 4")
    page.locator("#comment").fill("now a tie")
    page.get_by_role("button", name="Tie").click()
    wait(page, "Changed. 4 done")
    assert page.locator("#prompt").text_content() == "<b>question</b> 4"
    assert page.locator("#comment").input_value() == "of the fifth"
    after = rows(sitting)
    assert after[1:] == before[1:] and (after[0]["verdict"], after[0]["comment"]) == ("tie", "now a tie")
    assert not page.problems


def test_a_second_click_in_haste_does_not_answer_the_next_question(serve, page):
    sitting = serve()
    begin(page, sitting.address)
    page.get_by_role("button", name="1 is better").dblclick()
    wait(page, "1 done")
    page.keyboard.press("1")
    page.keyboard.press("1")
    wait(page, "2 done")
    assert len(rows(sitting)) == 2


@pytest.mark.parametrize("n, keys", [(2, "2"), (3, "31")])
def test_after_a_failed_request_the_choice_is_there_to_be_sent_again(serve, page, n, keys):
    answers = [(f"{WORDS_800} {i}", True) for i in range(n)]
    sitting = serve(lambda prompt: label.Question(prompt, answers, ["m"] * n))
    page.route("**/answer", lambda route: route.abort())  # before the page opens: a route takes effect some ms later
    begin(page, sitting.address)
    shown = texts(page)
    page.locator("#comment").fill("why")
    page.keyboard.press("Escape")
    for key in keys:
        page.keyboard.press(key)
    page.wait_for_selector("#trouble:visible")
    assert "not saved yet" in page.locator("#trouble").inner_text() and rows(sitting) == []
    assert None not in page.evaluate(IN_VIEW, "#trouble, #choices button")
    page.unroute("**/answer")
    page.get_by_role("button", name="Try again").click()
    wait(page, "Saved. 1 done")
    (row,) = rows(sitting)
    assert row.get("chosen", row.get("ranked", [""])[0]) == shown[int(keys[0]) - 1] and row["comment"] == "why"
    assert not page.locator("#trouble").is_visible()


def test_a_list_of_earlier_answers_that_failed_is_asked_for_again(serve, page):
    sitting = serve()
    page.route("**/earlier", lambda route: route.abort())
    begin(page, sitting.address)
    press(page, "1", "1 done")
    page.keyboard.press("u")
    page.wait_for_selector("#trouble:visible")
    page.unroute("**/earlier")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("#earlier[open]")
    assert page.locator("#list button").count() == 1


def test_an_answer_that_was_given_in_another_tab_is_said_and_the_page_goes_on(serve, browser):
    sitting = serve()
    context = opened(browser).context
    one, two = context.pages[0], context.new_page()
    begin(one, sitting.address)
    two.goto(sitting.address)
    wait(two, "0 done")
    press(one, "1", "1 done")
    two.keyboard.press("2")
    two.wait_for_selector("#trouble:visible")
    assert "this question is no longer open" in two.locator("#trouble").inner_text()
    two.get_by_role("button", name="Go on").click()
    wait(two, "1 done, 19 to go")
    assert len(rows(sitting)) == 1 and two.locator("#prompt").text_content() == "<b>question</b> 1"


def test_hostile_texts_stay_texts(serve, page):
    asked = [NASTY, "plain"]
    sitting = serve(
        lambda p: label.Question(p, [(f"{NASTY}{i}", False) for i in range(2)], ["m"] * 2), asked, instructions=NASTY
    )
    page.goto(sitting.address)
    assert page.locator("#read").text_content() == NASTY
    name = "<img src=x onerror=alert(1)>"
    page.locator("#name").fill(name)
    page.keyboard.press("Enter")
    wait(page, "0 done")
    assert page.locator("#prompt").text_content() == NASTY and sorted(texts(page)) == [f"{NASTY}0", f"{NASTY}1"]
    page.locator("#comment").fill(NASTY)
    page.get_by_role("button", name="Tie").click()
    wait(page, "1 done")
    page.locator("#back").click()
    assert page.locator("#list .text").text_content() == NASTY
    page.locator("#list button").click()
    wait(page, "Your answer 1 of 1")
    assert page.locator("#comment").input_value() == NASTY and name in page.locator("#who").text_content()
    page.locator("#ask-help").click()
    assert page.locator("#instructions").text_content() == NASTY
    assert page.title() == "Which is better?" and page.locator("script").count() == 1 and not page.problems
    assert page.locator("img, [onerror], [onmouseover]").count() == 0
    assert rows(sitting)[0]["comment"] == NASTY and len(label.read_answers(sitting.out)) == 1


MARKDOWN = """## Plan
A **bold *and* leaning** word, `a * b * c`, ``x``, and _so_ on: 2 * 3 * 4, a*b*c, snake_case_name, *args, **kwargs.

2. second, **first**
   - nested
* ```one line```

```html
<b onclick="x">**not bold**</b>
```
| a | b |
|---|---|

\\<img src=x onerror="document.title='owned'"> [link](javascript:document.title='owned') &lt;"""
NODES = """e => [...e.querySelectorAll("*")].map(x => `${x.tagName.toLowerCase()} ${x.textContent}`)"""


def test_markdown_is_shown_as_nodes_and_everything_else_as_it_is(serve, page):
    answers = [(MARKDOWN, True), (f" {NASTY} **{NASTY}** `{NASTY}`\n- {NASTY}\n```{NASTY}\n{NASTY}", True)]
    sitting = serve(lambda p: label.Question(p, answers, ["m"] * 2), ["**q**"])
    begin(page, sitting.address)
    assert page.locator("#prompt strong").text_content() == "q"
    body = page.locator("article .text", has_text="Plan")
    nodes = body.evaluate(NODES)
    assert nodes == ["strong Plan", "strong bold and leaning", "em and", "code a * b * c", "code x", "em so"] + [
        "div second, first", "strong first", "div nested", "div one line", "code one line",
        'code <b onclick="x">**not bold**</b>\n', "code | a | b |\n|---|---|\n",
    ]  # fmt: skip
    signs = body.locator(".item").evaluate_all("all => all.map(e => getComputedStyle(e).listStyleType)")
    assert signs == ['"2. "', '"• "', '"• "']
    assert "2 * 3 * 4, a*b*c, snake_case_name, *args, **kwargs." in body.text_content()
    assert body.text_content().endswith(MARKDOWN[-84:])
    hostile = page.locator("article .text", has_text="onmouseover")
    assert hostile.evaluate("e => e.textContent[0]") == "<"  # the space before an answer is no indent
    assert {node.partition(" ")[0] for node in hostile.evaluate(NODES)} <= {"strong", "code", "em", "div"}
    assert page.locator("article").locator("img, a, b, script, [onclick], [onerror], [onmouseover]").count() == 0
    press(page, "t", "1 done")
    assert page.title() == "Which is better?" and not page.problems


@pytest.mark.parametrize("kind", ["messages", "dialogue"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_conversation_is_a_bubble_a_turn_with_its_role(serve, browser, width, scheme, kind):
    """Also: hostile text in a turn is text, the last turn is in view, and each contrast is WCAG's."""
    turns = [("user", f"{NASTY} " * 9), ("assistant", "**Yes**?\n- one\n- two\n" * 9), ("user", "مرحبا")]
    prompt = "".join(f"\n\n{({'user': 'Human'}).get(role, 'Assistant')}: {said}" for role, said in turns)
    prompt += "\n\nAssistant:"
    if kind == "messages":
        prompt = [{"role": role, "content": said} for role, said in turns]
    sitting = serve(lambda key: label.Question(prompt, make("q").answers, ["m"] * 2), ["q"])
    page = opened(browser, width, 844, touch=width < 1000, color_scheme=scheme)
    begin(page, sitting.address)
    bubbles = page.locator("#prompt > .text")
    assert bubbles.evaluate_all("all => all.map(e => e.dataset.role)") == ["user", "assistant", "user"]
    shown = [each.strip() for each in bubbles.all_text_contents()]
    assert shown == [turns[0][1].strip(), ("Yes?\n" + "one" + "two") * 9, turns[2][1]]
    named = bubbles.evaluate_all("all => all.map(e => getComputedStyle(e, '::before').content)")
    assert named == ['"user"', '"assistant"', '"user"']
    left, right = [bubbles.nth(i).bounding_box() for i in (1, 2)]
    assert left["x"] < right["x"] and bubbles.nth(2).evaluate("e => getComputedStyle(e).direction") == "rtl"
    assert page.evaluate(IN_VIEW, "#prompt > .text:last-child")[0] is not None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for ink in bubbles.all() + page.locator("code, .item").all():
        assert ink.evaluate(CONTRAST) >= 4.5
    page.get_by_role("button", name="Tie").click()
    wait(page, "1 done")
    assert rows(sitting)[0]["prompt"] == prompt and len(label.read_answers(sitting.out)) == 1
    page.locator("#back").click()
    assert page.locator("#list .text").text_content() == "مرحبا"
    assert page.title() == "Which is better?" and not page.problems


def test_the_words_in_which_two_answers_differ_can_be_marked(serve, page):
    answers = [("The **red** fox ran, and ran home. 我们去", True), ("The fox ran, then *walked* home. 我们来", True)]
    sitting = serve(lambda p: label.Question(p, answers, ["m"] * 2), ["q", "r"])
    begin(page, sitting.address)
    marked = """() => [...CSS.highlights.get("differs") ?? []].map(
        range => range.startContainer.data.slice(range.startOffset, range.endOffset))"""
    assert page.evaluate(marked) == []
    page.keyboard.press("d")
    found = page.evaluate(marked)
    assert sorted(found) == sorted(["red", "and", "ran", "then", "walked", "去", "来"])
    press(page, "1", "1 done")
    assert sorted(page.evaluate(marked)) == sorted(found)  # of the next question too
    page.reload()
    wait(page, "1 done")
    assert len(page.evaluate(marked)) == len(found)
    page.get_by_label("differences").uncheck()
    assert page.evaluate(marked) == [] and not page.problems


def test_an_earlier_choice_is_marked_and_small_keys_work(serve, page):
    sitting = serve()
    begin(page, sitting.address)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "none"  # of the title
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    page.keyboard.type("why")
    page.keyboard.press("Control+Enter")
    press(page, "2", "1 done")
    press(page, "b", "2 done")
    pressed = page.locator("#choices [aria-pressed=true]")
    assert pressed.count() == 0 and rows(sitting)[0]["comment"] == "why"
    for index, said, button in ((1, "none is good", "Both bad B"), (0, "2 is better", "2 is better 2")):
        page.keyboard.press("u")
        page.locator("#list button").nth(1 - index).click()
        wait(page, f"Your answer {index + 1} of 2 was: {said}.")
        assert pressed.all_text_contents() == [button]


def test_a_server_that_is_killed_and_started_again_loses_nothing(folders, page):
    """SIGKILL while the page shows a question with a comment; the same command; the same page goes on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folders["tmp"] / "a.jsonl"
    command = [sys.executable, "-m", "tools.label", "--init", folders["sft"], "--out", out, "--port", port]
    command += ["--prompts", folders["tmp"] / "prompts.jsonl", "--response_len", 8]

    def start():
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)
        return process, address_of(process)

    process, address = start()
    try:
        begin(page, address)
        press(page, "1", "1 done")
        prompt, shown = page.locator("#prompt").text_content(), texts(page)
        page.locator("#comment").fill("before the kill")
        process.kill()
        process.wait()
        page.get_by_role("button", name="2 is better").click()
        page.wait_for_selector("#trouble:visible")
        assert len(out.read_text().splitlines()) == 1
        process, again = start()
        assert again == address
        page.wait_for_timeout(1000)  # the first questions are made
        page.get_by_role("button", name="Try again").click()
        wait(page, "Saved. 2 done")
        row = json.loads(out.read_text().splitlines()[1])
        assert (row["prompt"], row["comment"]) == (prompt, "before the kill") and row["chosen"].endswith(shown[1])
        page.locator("#comment").fill("a draft")
        process.kill()
        process.wait()
        process, _ = start()
        page.reload()
        wait(page, "2 done")
        assert page.locator("#comment").input_value() == "a draft"
        page.locator("#back").click()
        page.locator("#list button").nth(1).click()
        wait(page, "Your answer 1 of 2 was: 1 is better.")
    finally:
        process.kill()
        process.wait()


def test_two_rounds_with_people_go_by_the_commands_of_the_page(folders, page):
    """The five lines of tools/README.md as they stand, with options that keep the answers short and few."""
    folder, n, printed = folders["tmp"], 12, []
    shutil.copytree(folders["sft"], folder / "out" / "sft")
    section = (ROOT / "tools" / "README.md").read_text().partition("### A round with people")[2]
    second = section.split("```")[1].strip().splitlines()
    first = [line.replace("out/ppo-1", "out/sft").replace("2", "1") for line in second]
    few = {"tools.label": f"--response_len 8 --n_prompts {n} --port 0", "reward.py": "--response_len 8 --batch_size 2"}
    few["ppo.py"] = "--response_len 8 --batch_size 8 --minibatch_size 4 --iterations 2"
    scripts = {"tools.label": "tools/label/__main__.py", "tools.evaluate": "tools/evaluate.py"}
    for line in first + second:
        name, *words = [word for word in shlex.split(line) if word not in ("python", "-m")]
        words += [*few.get(name, "").split(), "--device", "cpu"]
        if "--prompts" in words:
            choose_the_first(page, [sys.executable, ROOT / scripts[name], *words], folder, n)
        else:
            done = run(scripts.get(name, name), *words, cwd=folder)
            assert not done.returncode, (line, done.stderr)
            printed.append(done.stdout)
    for number, policy in enumerate(("out/sft", "out/ppo-1"), 1):
        answers = label.read_answers(folder / "labels" / f"{number}.jsonl")
        assert [row["checkpoint"] for row in answers] == [[policy] * 2] * n
        start = read_metrics(folder / "out" / f"ppo-{number}")[0]
        assert (abs(start["objective/kl"]) < 1e-5) == (number == 1)  # to the first start
    found = re.findall(r"labels/\*\.jsonl: preferences, (\d+) rows", "".join(printed))
    assert found == [str(n), str(2 * n)] and len(printed) == 8
    assert all("KL to the reference (nats)" in text for text in printed[3::4])


def choose_the_first(page, command, folder, n):
    """Answer the n questions of a labelling command that runs in `folder`, and stop it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*map(str, command)], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        begin(page, address_of(process))
        for i in range(n):
            press(page, "1", f"{i + 1} done")
        page.wait_for_selector("#end:visible")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::1"])
def test_a_browser_opens_the_printed_address_with_and_without_its_last_slash(tmp_path, page, host):
    sitting = label.Sitting(["question"], make, tmp_path / "answers.jsonl", 1, 0)
    try:
        server = label.Server(sitting, host, 0)
    except InputError:
        pytest.skip("this machine has no such address")
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    begin(page, server.address)
    page.goto(server.address.removesuffix("/"))
    wait(page, "0 done")
    assert page.locator("#prompt").text_content() == "question"
    server.shutdown()
    server.server_close()

"""The sheet in a browser: Debian's chromium, driven through its debugging pipe. Skipped only where there is none."""

import csv
import json
import time

import numpy as np
import pytest
from browser import PATIENCE, Browser, needs_chromium

from evaluation.ratings import read_ratings
from evaluation.sheet import Item, key_of_items, sheet_name, write_page
from pages.render import jpeg_uri

pytestmark = needs_chromium


ITEMS = [
    Item("a.mp4", "microscope", ("x", "y"), ("A car, a cyclist and a car. No bus.", "A truck passes; then a car.")),
    Item("a.mp4", "copilot", ("y", "x"), ("Car ahead.", "Car ahead.")),  # equal: nobody is asked which is better
    Item("b.mp4", "microscope", ("y", "x"), ("A <b>bus</b>.", "")),
    Item("b.mp4", "copilot", ("x", "y"), ("Bus, then a dog.", "Stop sign.")),
]
ALL = {"q1": "B", "q1A1": "there", "q1A2": "not there", "q1A3": "cannot tell", "q1A4": "there", "q1B1": "not there",
       "q1B2": "there", "q2A1": "there", "q3": "A", "q3A1": "there", "q4": "same", "q4A1": "there", "q4A2": "not there",
       "q4B1": "cannot tell"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, tmp_path):
    """The browser with the sheet of ITEMS open, nothing answered, laptop wide; downloads go to tmp_path."""
    frames = {}
    for video, light in (("a.mp4", 60), ("b.mp4", 120)):
        pictures = [np.full((90, 160, 3), light + 30 * k, np.uint8) for k in range(3)]
        frames[video] = [{"uri": jpeg_uri(picture), "label": f"{k} of 3"} for k, picture in enumerate(pictures)]
    assert write_page(tmp_path / "sheet.html", ITEMS, frames) == len(ALL)
    browser.size(1366, 768)
    browser("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.events.clear()
    browser.open(f"file://{tmp_path}/sheet.html")
    browser.js("localStorage.clear()")  # what the test before has left
    browser.open(f"file://{tmp_path}/sheet.html")
    browser.js("confirm = () => true")
    return browser


def click(browser, selector):
    """A click with the mouse on the middle of an element, scrolled into view."""
    where = browser.js(f"""(() => {{ const element = document.querySelector({json.dumps(selector)});
        element.scrollIntoView({{block: "center"}}); const box = element.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2]; }})()""")
    for kind in ("mousePressed", "mouseReleased"):
        browser("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)


def choose(browser, question, value):
    click(browser, f'#{question} input[value="{value}"] + span')


def chosen(browser):
    return browser.js("Object.fromEntries([...document.querySelectorAll('input:checked')].map(i => [i.name, i.value]))")


def downloaded(browser, file):
    click(browser, "#download")
    until = time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < until, browser.js("document.querySelector('#message').textContent")
        time.sleep(0.05)
    return list(csv.reader(file.read_text(encoding="utf-8").splitlines()))


def is_silent(browser):
    """Nothing was fetched but the page itself, no script failed, nothing was refused by the page's policy."""
    urls = [event["params"]["request"]["url"] for event in browser.events
            if event["method"] == "Network.requestWillBeSent"]
    bad = [event for event in browser.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    return bad == [] and all(url.startswith(("file:", "data:", "blob:")) for url in urls)


def test_a_rater_clicks_through_reloads_and_downloads(page, tmp_path):
    assert page.js("document.querySelector('#count').textContent") == "0 of 14 answered"
    click(page, "#rater")
    page("Input.insertText", text='Anna "the 1st", Müller')
    for question in ("q1", "q1A1", "q1A2", "q1A3", "q1A4", "q1B1"):
        choose(page, question, ALL[question])
    choose(page, "q1A1", "not there")
    choose(page, "q1A1", ALL["q1A1"])  # an answer can be changed
    assert page.js("document.querySelector('#count').textContent") == "6 of 14 answered"
    click(page, "#clips button:nth-child(2)")
    choose(page, "q3", ALL["q3"])

    page("Page.reload")
    page.wait("document.readyState === 'complete' && document.querySelector('#bar').value > 0")
    assert chosen(page) == {name: ALL[name] for name in ("q1", "q1A1", "q1A2", "q1A3", "q1A4", "q1B1", "q3")}
    assert page.js("document.querySelector('#rater').value") == 'Anna "the 1st", Müller'
    assert page.js("[...document.querySelectorAll('section')].map(clip => clip.hidden)") == [True, False]

    for question in ("q3A1", "q4", "q4A1", "q4A2", "q4B1"):
        choose(page, question, ALL[question])
    click(page, "section:not([hidden]) .previous")
    rows = downloaded(page, tmp_path / "ratings_Anna_the_1st_Müller.csv")
    assert "2 questions open" in page.js("document.querySelector('#message').textContent") and len(rows) == 13
    (tmp_path / "ratings_Anna_the_1st_Müller.csv").unlink()
    for question in ("q1B2", "q2A1"):
        choose(page, question, ALL[question])
    rows = downloaded(page, tmp_path / "ratings_Anna_the_1st_Müller.csv")
    assert page.js("document.querySelector('#message').textContent") == "Downloaded. Thank you."
    assert rows[0] == ["sheet", "rater", "item", "mention", "answer"]
    assert {tuple(row[:2]) for row in rows[1:]} == {(sheet_name(ITEMS), 'Anna "the 1st", Müller')}
    assert {f"q{item}{mention}": answer for _, _, item, mention, answer in rows[1:]} == ALL and len(rows) == 15

    problems = []
    key = {"sheet": sheet_name(ITEMS), "items": key_of_items(ITEMS, {})}
    ratings = read_ratings([str(tmp_path / "ratings_Anna_the_1st_Müller.csv")], key, problems)
    assert problems == [] and len(ratings['Anna "the 1st", Müller']) == 14
    assert is_silent(page)


def test_the_sheet_can_be_answered_by_keyboard_alone(page):
    def at():
        return page.js("(document.activeElement.closest('fieldset') || document.activeElement).id")

    choose(page, "q1B2", "cannot tell")
    page.js("document.activeElement.blur()")
    page.press("2", "Digit2")
    assert chosen(page) == {"q1B2": "cannot tell"}  # the first open question is a preference
    page.press("b", "KeyB")
    assert chosen(page) == {"q1": "B", "q1B2": "cannot tell"} and at() == "q1A1"
    page.press("!", "Digit1", shift=True)  # this car, the other of A, that of the copilot line; that of B has its mark
    assert chosen(page) == {"q1": "B", "q1B2": "cannot tell", "q1A1": "there", "q1A4": "there", "q2A1": "there"}
    assert at() == "q1A2"
    page.press("2", "Digit2")
    page.press("3", "Numpad3")
    assert at() == "q1B1" and chosen(page)["q1A3"] == "cannot tell"
    page.press("k", "KeyK")
    page.press("k", "KeyK")
    assert at() == "q1A3"
    page.press("1", "Digit1")
    page.press("2", "Digit2")
    assert chosen(page)["q1B1"] == "not there" and page.js("document.activeElement.className") == "next main"
    assert page.js("document.querySelector('#clips button').classList.contains('done')")
    page.press("n", "KeyN")
    assert page.js("[...document.querySelectorAll('section')].map(clip => clip.hidden)") == [True, False]
    for key, code in (("a", "KeyA"), ("1", "Digit1"), ("s", "KeyS"), ("1", "Digit1"), ("2", "Digit2"), ("3", "Digit3")):
        page.press(key, code)
    assert chosen(page) == ALL | {"q1A3": "there", "q1B2": "cannot tell"}
    page.js("document.querySelector('#rater').focus()")
    page.press("p", "KeyP")  # a letter of the name, no command
    assert page.js("document.querySelector('#rater').value") == "p"
    assert page.js("[...document.querySelectorAll('section')].map(clip => clip.hidden)") == [True, False]


def test_pictures_can_be_stepped_played_and_enlarged(page):
    def when():
        return page.js("document.querySelector('.when').textContent")

    assert when() == "frame 1 of 3, 0 of 3"
    page.press(".", "Period")
    assert when() == "frame 2 of 3, 1 of 3"
    page.press(",", "Comma")
    page.press(",", "Comma")
    assert when() == "frame 3 of 3, 2 of 3"
    click(page, ".thumbs button:nth-child(2)")
    assert page.js("document.querySelector('.large img').src === document.querySelectorAll('.thumbs img')[1].src")
    click(page, ".play")
    page.wait("document.querySelector('.when').textContent.startsWith('frame 1 of')")
    click(page, ".play")
    click(page, ".large")
    assert page.js("document.querySelector('dialog').open && document.querySelector('dialog img').clientWidth > 1000")
    click(page, "dialog")
    assert page.js("document.querySelector('dialog').open") is False


def test_no_name_no_file_and_a_browser_that_keeps_nothing_says_so(page, tmp_path):
    choose(page, "q1", "A")
    click(page, "#download")
    assert page.js("document.activeElement.id") == "rater"
    assert "Write your name first" in page.js("document.querySelector('#message').textContent")
    click(page, "#start_over")
    assert chosen(page) == {} and page.js("document.querySelector('#count').textContent") == "0 of 14 answered"
    click(page, "#rater")
    page("Input.insertText", text="Ben")
    page("Page.reload")
    page.wait("document.readyState === 'complete' && document.querySelector('#rater').value === 'Ben'")
    page.js("Storage.prototype.setItem = () => { throw new Error('full'); }")
    choose(page, "q1", "B")
    assert chosen(page) == {"q1": "B"}
    assert "keeps nothing" in page.js("document.querySelector('#message').textContent")
    assert list(tmp_path.glob("*.csv")) == []


@pytest.mark.parametrize("width, height", [(1366, 768), (390, 844)])
def test_everything_fits_at_laptop_and_phone_width(page, width, height):
    page.size(width, height)
    assert page.js("document.documentElement.scrollWidth") <= width
    assert page.js("document.querySelector('.large img').clientWidth") >= 320
    boxes = page.js("""[...document.querySelectorAll('section:not([hidden]) .choices span, .desk button')].map(
        element => { const box = element.getBoundingClientRect(); return [box.left, box.right, box.height]; })""")
    assert boxes and all(0 <= left < left + 20 < right <= width and down > 20 for left, right, down in boxes)
    choose(page, "q2A1", "there")  # the last question: the clip is still in sight above or beside it
    picture = page.js("(() => { const box = document.querySelector('.large').getBoundingClientRect(); "
                      "return [box.top, box.bottom]; })()")
    assert picture[0] >= 0 and picture[1] <= height
    assert chosen(page) == {"q2A1": "there"}

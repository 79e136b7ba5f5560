"""The drawing pad in a real browser: its own half alone, then in two applications.

`python -m tests.test_browser` takes the picture of the pad for the README.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import numpy as np
import pytest

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="apt install chromium")

ROOT = Path(__file__).parents[1]
THREE = [  # in hundredths of the paper
    *[(29, 27), (38, 19), (52, 18), (62, 26), (61, 38), (48, 48)],
    *[(62, 54), (68, 66), (61, 79), (46, 84), (29, 76)],
]
CELLS = [
    """import torch
from mnist_helpers.handwriting.pad import show_pad
from mnist_helpers.model import load_model
example = torch.zeros(28, 28, dtype=torch.uint8)
example[4:24, 13:16] = 255""",
    "show_pad(load_model('model.pth'), example)",
    "print('the last cell')",
]

# Two views of one pad; the page's `questions` are what a kernel would get. The browser
# is one that falsifies what is read back from a canvas.
STAND_IN = """
CanvasRenderingContext2D.prototype.getImageData = (x, y, width, height) => {
    const white = new ImageData(width, height);
    white.data.fill(255);
    return white;
};
const hearers = [];
window.questions = [];
window.model = {
    on: (name, hear) => hearers.push(hear),
    send: (question, callbacks, [ink]) =>
        questions.push({ ...question, ink: [...new Uint8Array(ink)] }),
};
window.reply = (question, answer) => {
    const message = { sequence: question.sequence, ...answer };
    const pixels = new DataView(new ArrayBuffer(28 * 28));
    hearers.forEach((hear) => hear(message, [pixels]));
};
for (const el of document.querySelectorAll("div")) render({ model, el });
"""


@contextmanager
def launch():
    """A headless Chromium."""
    expect.set_options(timeout=30_000)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser():
    with launch() as browser:
        yield browser


# The browser's half alone: no Jupyter, no kernel


@pytest.fixture
def page(browser):
    """A page with two views of one pad, and a clock that stands still."""
    page = browser.new_page(has_touch=True)
    page.clock.install(time=0)
    folder = ROOT / "mnist_helpers/handwriting"
    style = (folder / "pad.css").read_text()
    page.set_content(f"<style>{style}</style><div></div><div></div>")
    script = (folder / "pad.js").read_text().replace("export default", "window.pad =")
    page.add_script_tag(content=script + STAND_IN)
    page.clock.pause_at(60)
    yield page
    page.close()


def reply(page, number, **answer):
    """Answer a question; by default it is a 4, of which the model is 91% sure."""
    answer = {"probabilities": [0.01] * 4 + [0.91] + [0.01] * 5} | answer
    page.evaluate("given => reply(questions[given[0]], given[1])", [number, answer])


def test_ink_that_is_sent_is_the_ink_that_is_shown_and_has_no_corners(page):
    draw(page, [(25, 25), (75, 25), (75, 75)])
    draw(page, [(25, 60)])  # a tap
    draw(page, [(99, 90)])  # and one beyond the edge
    reply(page, 0)
    ink = np.array(page.evaluate("questions.at(-1).ink"))
    shown = page.evaluate("""() => {
        const paths = [...document.querySelectorAll('.paper path')];
        return [...Array(56 * 56).keys()].map((pixel) => {
            const point = new DOMPoint(pixel % 56 + 0.5, Math.floor(pixel / 56) + 0.5);
            return paths.some((path) => path.isPointInStroke(point));
        });
    }""")
    assert sum((ink > 127) != shown) <= 5
    assert ink.sum() / 255 == pytest.approx(sum(shown), rel=0.1)
    ink = ink.reshape(56, 56)
    assert ink[14, 20] == 255
    assert ink[14, 42] == 0, "the corner is not rounded"


def test_one_question_at_a_time_and_what_is_said_meanwhile(page):
    hint, status = page.locator(".hint").first, page.locator(".status").first
    answer = page.locator(".answer").first
    expect(hint).to_contain_text("Draw a digit")
    draw(page, [(30, 30), (60, 60)])
    expect(hint).to_be_hidden()
    page.clock.run_for(3100)
    expect(status).to_contain_text("busy or gone")
    assert page.evaluate("questions.map(asked => asked.finished)") == [False]
    reply(page, 0)
    expect(status).to_have_text("")
    expect(answer).to_have_text("491% sure")
    assert "width: 91%" in page.locator(".best").inner_html()
    assert page.evaluate("questions.map(asked => asked.finished)") == [False, True]
    reply(page, 1, problem="too small")
    page.clock.run_for(4000)
    expect(status).to_have_text("too small")
    expect(answer).to_have_text("?")
    with pytest.raises(playwright.Error):
        reply(page, 1, probabilities=None)
    expect(status).to_contain_text("TypeError")
    page.locator(".clear").first.click()
    expect(hint).to_be_visible()


def test_two_views_of_one_pad_hear_only_their_own_answers(page):
    draw(page, [(30, 30), (60, 60)])
    draw(page, [(60, 30), (30, 60)], pad=1)
    answers = page.locator(".answer b")
    reply(page, 1)
    expect(answers.last).to_have_text("4")
    expect(answers.first).to_have_text("?")


def test_second_finger_and_palm_change_nothing(page):
    wire = page.context.new_cdp_session(page)
    paths = page.locator("path")

    def touch(kind, *places):
        """Where the fingers are now."""
        points = [{"id": name, "x": x, "y": y} for name, (x, y) in enumerate(places)]
        event = {"type": f"touch{kind}", "touchPoints": points}
        wire.send("Input.dispatchTouchEvent", event)

    touch("Start", (50, 50))
    touch("Start", (50, 50), (200, 250))
    touch("Move", (60, 100))  # the second finger is lifted
    touch("Move", (60, 200))
    touch("End")
    stroke = paths.bounding_box()
    assert stroke["width"] < 50, "the second finger drew"
    assert stroke["height"] > 145, "the second finger ended the stroke"

    pen = {"pointerType": "pen", "button": "left", "buttons": 1, "x": 150, "y": 50}
    touch("Start", (250, 250))  # a palm that comes down before its pen
    wire.send("Input.dispatchMouseEvent", pen | {"type": "mousePressed"})
    wire.send("Input.dispatchMouseEvent", pen | {"type": "mouseReleased"})
    touch("End")
    touch("Start", (250, 250))  # and again between two strokes
    touch("End")
    expect(paths).to_have_count(2)
    assert paths.last.bounding_box()["x"] < 160, "the palm drew"


@pytest.mark.parametrize(
    ("key", "code", "held", "strokes"),
    [
        ("Z", "KeyZ", "metaKey", 1),  # with Caps Lock
        ("я", "KeyZ", "ctrlKey", 1),  # a Cyrillic keyboard
        ("z", "KeyY", "ctrlKey", 1),  # a German one
        ("Z", "KeyZ", "ctrlKey shiftKey", 2),
        ("z", "KeyZ", "", 2),
        ("Delete", "Delete", "", 0),
    ],
)
def test_keys(page, key, code, held, strokes):
    draw(page, [(30, 30), (60, 60)])
    draw(page, [(60, 30), (30, 60)])
    event = {"key": key, "code": code} | dict.fromkeys(held.split(), True)
    page.locator(".paper:focus").dispatch_event("keydown", event)
    expect(page.locator("path")).to_have_count(strokes)


# In Jupyter


@contextmanager
def serve(folder):
    """A Notebook server over a copy of the package: where to open things."""
    shutil.copytree(ROOT / "mnist_helpers", folder / "mnist_helpers")
    shutil.copy(ROOT / "model.pth", folder)
    places = ("JUPYTERLAB_SETTINGS_DIR", "JUPYTER_RUNTIME_DIR")  # not the person's own
    environment = os.environ | dict.fromkeys(places, str(folder))
    command = [sys.executable, "-m", "notebook", "--no-browser", "--allow-root"]
    command += ["--port=0", "--ServerApp.root_dir=."]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=log)
    try:
        wait_for(lambda: list(folder.glob("jpserver-*.html")), "the server")
        [found] = folder.glob("jpserver-*.json")
        server = json.loads(found.read_text())
        yield server["url"] + "{}/small.ipynb?token=" + server["token"]
    finally:
        process.terminate()  # takes its kernels along
        process.wait(60)


def test_pad_in_jupyter(browser, tmp_path):
    with serve(tmp_path) as address:
        for application in ("notebooks", "lab/tree"):
            path = tmp_path / "small.ipynb"
            page = run_notebook(browser, path, address.format(application))
            check_drawing(page, tmp_path / "pad.png")
            check_keys(page, path)
            page.close()


def check_drawing(page, screenshot):
    """The answer to a 3, in the pad and in the card below it."""
    pad = page.locator(".mnist-pad")
    card = page.locator(".jp-Cell", has=pad).locator("img")
    before = card.get_attribute("src")
    draw(page, THREE)
    expect(pad.locator(".answer b")).to_have_text("3")
    expect(card).not_to_have_attribute("src", before)
    pad.screenshot(path=screenshot)
    read = "seen => [...seen.getContext('2d').getImageData(0, 0, 28, 28).data]"
    red = pad.locator(".seen").evaluate(read)[::4]  # of red, green, blue, opacity
    assert red[0] < max(red), "the model sees bright ink on dark paper"


def check_keys(page, path):
    """The notebook hears no key of the pad's, except the one that saves."""
    for name in (".undo", ".clear", ".paper"):
        page.locator(name).focus()
        for key in "xbddaz":
            page.keyboard.press(key)
    page.wait_for_timeout(1000)
    expect(page.locator(".jp-Cell")).to_have_count(len(CELLS))
    written = path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    wait_for(lambda: path.stat().st_mtime_ns > written, "the file to be saved")
    page.wait_for_timeout(500)
    saved = nbformat.read(path, as_version=4)
    assert [cell.source for cell in saved.cells] == CELLS
    assert "widgets" not in saved.metadata, "widget state is in the file"
    announcement, latest = [output["data"] for output in saved.cells[1].outputs]
    assert "appears when this cell is run" in announcement["text/plain"]
    assert "image/png" in latest
    assert latest["text/plain"].startswith("3 with")


def run_notebook(browser, path, address):
    """A page with the small notebook, whose cells have run."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    nbformat.write(notebook, path)
    page = browser.new_page()
    page.goto(address)
    indicator = page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']")
    indicator.wait_for(timeout=60_000)
    page.wait_for_timeout(3000)  # sent at once, "Run All" is sometimes dropped
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    end = page.locator(".jp-OutputArea-output", has_text="the last cell")
    expect(end).to_be_visible(timeout=60_000)
    return page


def draw(page, points, pad=0):
    """Draw one stroke with the mouse; points in hundredths of the paper."""
    paper = page.locator(".paper").nth(pad)
    paper.scroll_into_view_if_needed()
    box = paper.bounding_box()
    for number, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + 2.78 * x, box["y"] + 2.78 * y)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def wait_for(condition, what):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.2)


if __name__ == "__main__":
    with TemporaryDirectory() as name, launch() as browser:
        test_pad_in_jupyter(browser, Path(name))
        shutil.copy(f"{name}/pad.png", ROOT / ".github")

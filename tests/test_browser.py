"""The notebook in a real browser: Notebook 7 and JupyterLab 4, headless Chromium, a mouse that draws.

`python -m tests.test_browser` takes the picture of the pad for the README.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from textwrap import dedent

import nbformat
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "for-this-test"
DRAWINGS = {  # strokes from point to point, in hundredths of the paper
    "1": [[(50, 20), (48, 80)]],
    "7": [[(28, 25), (72, 25), (60, 50), (45, 80)]],
    "3": [
        [(30, 25), (50, 18), (66, 30), (60, 43), (46, 48), (62, 53), (70, 66), (60, 80), (45, 83), (29, 76)]
    ],
}
CELLS = [
    """
    import torch
    from mnist_helpers.data import Digits
    from mnist_helpers.handwriting.pad import DrawingPad, show_pad
    from mnist_helpers.live import watch
    from mnist_helpers.model import load_model
    from mnist_helpers.training import Config, fit
    noise = torch.randint(0, 256, (4000, 28, 28), dtype=torch.uint8)
    toy = Digits(noise, torch.randint(0, 10, (4000,)), "noise")
    example = torch.zeros(28, 28, dtype=torch.uint8)
    example[4:24, 13:16] = 255
    """,
    "show_pad(load_model('model.pth'), example)",
    """
    config = Config(hidden=(64,), epochs=1000)
    for epoch in watch(fit(config, toy, toy[:100]), config.epochs):
        pass
    """,
    "print('kept:', 0 < epoch.number < 1000)",
    "DrawingPad(None, print)",  # a pad whose model cannot answer
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("project")) as (address, folder):
        yield address, folder


@contextmanager
def serve(folder):
    """A running Notebook server over a copy of the project: its address, and the copy's folder."""
    shutil.copytree(ROOT / "mnist_helpers", folder / "mnist_helpers")
    for name in ("model.pth", "notebook.ipynb"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {  # two busy cores: threads that wait for each other make every timing useless
        "OMP_NUM_THREADS": "1",
        "QUICK": "1",
        "MNIST_ROOT": str(folder / "empty"),  # the small digits will do, and there is no network
        **{name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")},
        "no_proxy": "127.0.0.1,localhost",
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),  # none of the person's own
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command = [sys.executable, "-m", "notebook", *options, f"--IdentityProvider.token={TOKEN}"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | settings, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: can_open(f"{address}/api?token={TOKEN}"), "the server to start", 60)
        yield address, folder
    finally:
        process.terminate()  # takes its kernels along
        process.wait(20)


@pytest.fixture(scope="module")
def browser():
    with launch() as browser:
        yield browser


@contextmanager
def launch():
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    expect.set_options(timeout=20_000)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.mark.parametrize("application", ["notebooks", "lab/tree"])
def test_pad_and_stop_button(server, browser, application):
    address, folder = server
    write_notebook(folder / "small.ipynb")
    page = open_notebook(browser, f"{address}/{application}/small.ipynb")
    run_all(page)
    check_stop_button_and_busy_kernel(page)
    check_drawing(page)
    latency = min(measure_latency(page) for _ in range(2))  # others may use the same cores
    print(f"\npen movement -> new bars: median {latency:.0f} ms")
    assert latency < 100
    check_undo_and_keys(page)
    check_errors_are_shown(page)
    check_card_follows(page, "3")
    saved = save(page, folder / "small.ipynb")
    check_saved(saved, page)
    pad, card = saved.cells[1].outputs
    assert "run this cell" in pad["data"]["text/plain"]
    assert "image/png" in card["data"]
    assert card["data"]["text/plain"].startswith("3 with"), "the card must show the latest drawing"
    page.close()


def test_whole_notebook(server, browser):
    address, folder = server
    page = open_notebook(browser, f"{address}/notebooks/notebook.ipynb")
    run_all(page)
    wait_for_end(page)
    check_links(page)
    draw(page, "3")  # the network of so few digits need not be right
    expect(page.locator(".mnist-pad .answer b").first).not_to_have_text("?")
    saved = save(page, folder / "notebook.ipynb")
    check_saved(saved, page)
    counts = [cell.execution_count for cell in saved.cells if cell.cell_type == "code" and cell.source]
    assert counts == list(range(1, len(counts) + 1))
    accuracy = float(re.search(r"final +(\d+\.\d+)% of [\d,]+ test digits right", str(saved)).group(1))
    assert 80 < accuracy <= 100
    assert (folder / "model.pth").read_bytes() == (ROOT / "model.pth").read_bytes()


def check_links(page):
    """Every link of the table at the top brings the heading that it names into view."""
    links = page.locator("table").first.locator("a")
    titles = links.all_inner_texts()
    assert len(titles) == 16
    for number, title in enumerate(titles):
        links.nth(number).click()
        expect(page.get_by_role("heading", name=title).first).to_be_in_viewport()


def check_stop_button_and_busy_kernel(page):
    """Drawing while the kernel trains: ink flows, one question waits, the pad says why, then catches up."""
    expect(page.locator(".jp-Cell").nth(2).locator("img")).to_be_visible(timeout=60_000)  # it trains
    page.questions.clear()
    draw(page, "7")
    assert page.locator(".mnist-pad path").first.get_attribute("d").count("L") > 10
    expect(page.locator(".mnist-pad .status").first).to_contain_text("busy")
    assert len(page.questions) == 1, "more than one message waits for a busy kernel"
    page.locator(".jp-Toolbar [data-command='notebook:interrupt-kernel']").click()
    expect(page.locator(".jp-OutputArea", has_text="kept: True").first).to_be_visible()
    expect(page.locator(".mnist-pad .answer b").first).to_have_text("7")
    clear(page)


def check_drawing(page):
    for digit in ("3", "7"):
        draw(page, digit)
        expect(page.locator(".mnist-pad .answer b").first).to_have_text(digit)
        bars = page.locator(".mnist-pad").first.locator(".bar u")
        widths = bars.evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
        assert sum(widths) == pytest.approx(100, abs=0.1), "the bars are no probabilities"
        assert widths.index(max(widths)) == int(digit)
        pixels = page.locator(".mnist-pad .seen").first.evaluate(
            "canvas => [...canvas.getContext('2d').getImageData(0, 0, 28, 28).data]"
        )
        red = pixels[::4]  # of red, green, blue, opacity
        assert red[0] == 0, "the 28x28 that the model sees: paper is dark"
        assert max(red) > 200, "the 28x28 that the model sees: ink is bright"
        clear(page)


def check_card_follows(page, digit):
    card = page.locator(".jp-Cell", has=page.locator(".mnist-pad")).first.locator("img")
    before = card.get_attribute("src")
    draw(page, digit)
    expect(page.locator(".mnist-pad .answer b").first).to_have_text(digit)
    expect(card).not_to_have_attribute("src", before)


def check_undo_and_keys(page):
    strokes = page.locator(".mnist-pad").first.locator("path")
    draw(page, "1")
    draw(page, "7")
    expect(strokes).to_have_count(2)
    page.keyboard.press("Control+z")
    expect(strokes).to_have_count(1)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "undo", "a button out of the keyboard's reach"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(strokes).to_have_count(0)
    draw(page, "1")
    page.keyboard.press("Delete")
    expect(strokes).to_have_count(0)


def check_errors_are_shown(page):
    draw(page, "1", pad=1)
    expect(page.locator(".mnist-pad .status.problem")).to_contain_text("Error")


def measure_latency(page, movements=25):
    """Median milliseconds from a movement of the pen to the frame with its bars."""
    page.evaluate("""() => {
        const pad = document.querySelector('.mnist-pad');
        let moved = null;
        window.latencies = [];
        pad.addEventListener('pointermove', () => { moved ??= performance.now(); }, true);
        new MutationObserver(() => {
            const start = moved;
            moved = null;
            if (start !== null) requestAnimationFrame(() => window.latencies.push(performance.now() - start));
        }).observe(pad, { attributeFilter: ['data-answered'] });
    }""")
    box = find_paper(page)
    page.mouse.move(box["x"] + 0.35 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.wait_for_timeout(300)
    page.evaluate("window.latencies.length = 0")
    for step in range(1, movements + 1):  # each movement is answered before the next
        x, y = 0.35 + step / 100, 0.2 + step / 50
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.wait_for_function("count => window.latencies.length >= count", arg=step)
    page.mouse.up()
    clear(page)
    return median(page.evaluate("window.latencies"))


def draw(page, digit, pad=0):
    box = find_paper(page, pad)
    for stroke in DRAWINGS[digit]:
        places = [(box["x"] + x / 100 * box["width"], box["y"] + y / 100 * box["height"]) for x, y in stroke]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=6)
        page.mouse.up()
    page.wait_for_timeout(300)


def clear(page):
    page.get_by_role("button", name="Clear").first.click()
    expect(page.locator(".mnist-pad").first.locator("path")).to_have_count(0)
    expect(page.locator(".mnist-pad .answer b").first).to_have_text("?")


def find_paper(page, pad=0):
    """Where the paper lies, once the page has stopped growing."""
    paper = page.locator(".mnist-pad .paper").nth(pad)
    paper.scroll_into_view_if_needed()
    before = None
    while (box := paper.bounding_box()) != before:
        before = box
        page.wait_for_timeout(300)
    return box


def open_notebook(browser, address):
    """A page with an idle kernel; `page.problems` gets console errors, `page.questions` widget messages."""
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    page.problems, page.questions = [], []
    page.on("pageerror", lambda error: page.problems.append(error.stack))
    page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
    page.on("websocket", lambda wire: wire.on("framesent", lambda sent: note_question(page, sent)))
    page.goto(f"{address}?token={TOKEN}")
    page.locator(".jp-Cell").first.wait_for(timeout=60_000)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").wait_for(timeout=60_000)
    page.wait_for_timeout(1500)  # sent at once, "Run All" is sometimes dropped
    page.problems.clear()  # Notebook's own: no cell has run yet
    return page


def note_question(page, sent):
    if b'"comm_msg"' in (sent if isinstance(sent, bytes) else sent.encode()):
        page.questions.append(sent)


def run_all(page):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    expect(page.locator(".jp-InputPrompt", has_text="[*]").first).to_be_visible()


def wait_for_end(page, seconds=600):
    """Until the kernel has been idle for a while; cells out of sight do not tell whether they still wait."""
    status = page.locator(".jp-Notebook-ExecutionIndicator").first
    idle = []

    def has_ended():
        idle.append(status.get_attribute("data-status") == "idle")
        return len(idle) > 10 and all(idle[-10:])

    wait_for(has_ended, "all cells to finish", seconds)


def save(page, path):
    """Save as a person would, and read the file."""
    before = path.stat().st_mtime_ns
    page.locator(".jp-CodeCell .jp-InputPrompt").first.click()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+s")
    wait_for(lambda: path.stat().st_mtime_ns > before, "the notebook to be saved", 20)
    page.wait_for_timeout(500)
    return nbformat.read(path, as_version=4)


def check_saved(saved, page):
    nbformat.validate(saved)
    assert "widgets" not in saved.metadata, "widget state is in the saved file"
    outputs = [output for cell in saved.cells for output in cell.get("outputs", [])]
    assert [output.ename for output in outputs if output.output_type == "error"] == []
    assert page.problems == [], "errors in the page's console"


def write_notebook(path, cells=CELLS):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.cells = [nbformat.v4.new_code_cell(dedent(source).strip()) for source in cells]
    nbformat.write(notebook, path)


def can_open(url):
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


def wait_for(condition, what, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.2)


def take_picture(path):
    """The pad with a 3 drawn on it and the answer beside it, as a PNG."""
    with TemporaryDirectory() as folder, serve(Path(folder)) as (address, folder), launch() as browser:
        write_notebook(folder / "small.ipynb", CELLS[:2])
        page = open_notebook(browser, f"{address}/notebooks/small.ipynb")
        run_all(page)
        draw(page, "3")
        expect(page.locator(".mnist-pad .answer b").first).to_have_text("3")
        page.locator(".mnist-pad").first.screenshot(path=path)


if __name__ == "__main__":
    take_picture(ROOT / ".github" / "pad.png")

"""The lessons where people meet them: JupyterLab and Voila, in a real browser, offline.

Debian's Chromium, headless, driven by Playwright. Screenshots and the measured times of a redraw go to
the folder that BDLIB_SCREENSHOTS names, else to pytest's temporary folder.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from bdlib import lessons as stored
from bdlib import site
from bdlib.archive import Archive

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("BDLIB_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
# As in the Makefile: the page comes first, its cells one by one; the run from code is left out.
VOILA = ["--theme=light", "--progressive_rendering=True"]
VOILA += ["--VoilaExecutor.skip_cells_with_tag=live-run"]
DASHBOARD = "20_instructor_dashboard"
LOCAL = re.compile(r"^(https?|wss?)://(localhost|127\.0\.0\.1)[:/]|^(data|blob|about|file):")
WAIT = 300_000  # ms that a page may take on a busy machine; some twenty seconds on an idle one
REDRAW = 300  # ms from a key to the changed picture, the median of some moves
# A font of icons, which Voila's page asks for and does without.
ICONS = "https://cdn.jsdelivr.net/npm/@fortawesome/"
# Told by the browser and not by the lesson: the server has no such optional file.
HARMLESS = re.compile(f"favicon|{ICONS}")


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    named = os.environ.get("BDLIB_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def lessons(tmp_path_factory, repository):
    """Copies without outputs: what is seen afterwards is from this run, and nothing stored changes."""
    folder = tmp_path_factory.mktemp("lessons")
    for name in ("00_start_here", DASHBOARD):
        notebook = nbformat.read(repository / "notebooks" / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def serving(folder, log, *arguments):
    """A server of Jupyter's, once it answers; its address."""
    port = free_port()
    places = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    environment = {f"JUPYTER_{name}": str(log.parent / name.lower()) for name in places}
    for name in ("SETTINGS", "WORKSPACES"):
        environment[f"JUPYTERLAB_{name}_DIR"] = str(log.parent / name.lower())
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--no-browser", f"--port={port}"],
            cwd=folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
            # One thread: two that wait for each other on a busy machine take many times as long.
            env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        )
    address = f"http://127.0.0.1:{port}"
    yield process, address, log
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def answering(server):
    process, address, log = server
    place = "127.0.0.1", int(address.rpartition(":")[2])
    deadline = time.monotonic() + WAIT / 1000
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        with contextlib.suppress(OSError), socket.create_connection(place, timeout=5):
            return address
        time.sleep(0.2)
    pytest.fail(f"no server at {address}: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def lab(lessons, tmp_path_factory):
    log = tmp_path_factory.mktemp("lab") / "log"
    options = ["--LabApp.extension_manager=readonly", "--LabApp.news_url=None", "--allow-root"]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    token = "--IdentityProvider.token="
    with serving(lessons, log, "jupyterlab", *options, token) as server:
        yield server


@pytest.fixture(scope="module")
def voila(lessons, tmp_path_factory):
    log = tmp_path_factory.mktemp("voila") / "log"
    with serving(lessons, log, "voila", f"{DASHBOARD}.ipynb", *VOILA) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    options = ["--no-sandbox", "--disable-dev-shm-usage"]  # as root, in a container
    with playwright.sync_playwright() as engine:
        started = engine.chromium.launch(executable_path=CHROMIUM, args=options)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A page that reaches nothing but this machine; its errors and what it asked for are kept."""
    context = browser.new_context(viewport={"width": 1400, "height": 1100})
    made = context.new_page()
    made.set_default_timeout(WAIT)
    made.faults = []

    def guard(route):
        if LOCAL.match(route.request.url):
            route.continue_()
        else:
            if not route.request.url.startswith(ICONS):
                made.faults.append(f"asked for {route.request.url}")
            route.abort()

    def heard(message):
        if message.type == "error" and not HARMLESS.search(message.text + str(message.location)):
            made.faults.append(f"console: {message.text} {message.location}")

    context.route("**/*", guard)
    made.on("console", heard)
    made.on("pageerror", lambda error: made.faults.append(f"page: {error}"))
    yield made
    context.close()


def choose(page, command):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=command, exact=True).click()


def run_all(page, address, path):
    """Open a lesson in JupyterLab, run every cell, save; the notebook as it then is."""
    page.goto(f"{address}/lab/tree/{path.name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", state="attached")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    choose(page, "Run All Cells")
    deadline = time.monotonic() + WAIT / 1000
    idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    while time.monotonic() < deadline:
        page.wait_for_timeout(500)
        if not idle.count():
            continue
        page.keyboard.press("Control+s")
        page.wait_for_timeout(700)
        with contextlib.suppress(json.JSONDecodeError, nbformat.reader.NotJSONError):
            notebook = nbformat.read(path, as_version=4)
            code = [cell for cell in notebook.cells if cell.cell_type == "code"]
            if all(cell.execution_count for cell in code) or any(map(errors, code)):
                return code
            if not any(cell.execution_count for cell in code):
                choose(page, "Run All Cells")  # what is sent while a kernel connects can get lost
    page.screenshot(path=path.with_suffix(".png"))
    pytest.fail(f"{path.name} did not run to its end")


def errors(cell):
    """Errors and warnings in a cell's outputs."""
    return [
        output.get("evalue") or output.get("text")
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def test_first_lesson_runs_in_jupyterlab(page, lab, lessons, shots):
    code = run_all(page, answering(lab), lessons / "00_start_here.ipynb")
    assert [found for cell in code if (found := errors(cell))] == []
    trace = page.locator('[title="accepted"]', has_not_text="accepted").first
    trace.scroll_into_view_if_needed()
    assert page.locator(".jp-OutputArea-output img").count() >= 1
    page.screenshot(path=shots / "lab-00-trace.png")
    assert page.get_by_text("get notified about official Jupyter news").count() == 0
    assert page.faults == []


# Milliseconds from the key to the changed picture, as the page itself sees them.
WATCH = """
part => {
  const place = document.querySelector(`.bd-html-${part}`);
  window.redraw = new Promise((done, failed) => {
    let pressed = null;
    setTimeout(() => failed(`nothing changed in ${part}`), 100000);
    document.addEventListener("keydown", () => { pressed ??= performance.now(); }, true);
    new MutationObserver((found, self) => {
      self.disconnect();
      requestAnimationFrame(() => done(performance.now() - pressed));
    }).observe(place, {childList: true, subtree: true, characterData: true});
  });
}
"""


def press(page, name, key, times=1, part="left"):
    """Move a slider with the keyboard; the milliseconds until the picture has changed."""
    page.locator(f".bd-{name} .noUi-handle").focus()
    spent = []
    for _ in range(times):
        page.evaluate(WATCH, part)
        page.keyboard.press(key)
        spent.append(page.evaluate("() => window.redraw"))
    return spent


def move_the_budget(page, shots, name):
    """Move the budget to 512: the figure, the map and the numbers follow; the times are kept."""
    page.locator(".bd-html-left svg").wait_for()
    seen = {part: page.locator(f".bd-html-{part}").inner_html() for part in ("left", "map")}
    memory = page.locator(".bd-memory").inner_text()
    page.screenshot(path=shots / f"{name}-before.png")
    press(page, "budget", "ArrowRight")
    assert page.locator(".bd-budget .widget-readout").inner_text() == "512"
    page.screenshot(path=shots / f"{name}-after.png")
    for part, before in seen.items():
        assert page.locator(f".bd-html-{part}").inner_html() != before
    assert page.locator(".bd-memory").inner_text() != memory
    where = ("budgetdraft-feature-gpu", "chunk_topk_recent", 512, 4096, 0.0)
    text = page.locator(".bd-text select option:checked").inner_text()
    archived = Archive.read().find(text, *where).acceptance
    assert page.locator(".bd-acceptance").inner_text() == f"{archived:.1%}"
    spent = press(page, "budget", "ArrowRight", 2) + press(page, "budget", "ArrowLeft", 3)
    spent += press(page, "budget", "ArrowRight", 2)
    middle = statistics.median(spent)
    times = {"ms": [round(ms, 1) for ms in spent], "median_ms": round(middle, 1)}
    (shots / f"{name}-redraw-ms.json").write_text(json.dumps(times) + "\n")
    assert middle < REDRAW, times


def test_dashboard_in_jupyterlab(page, lab, lessons, shots):
    code = run_all(page, answering(lab), lessons / f"{DASHBOARD}.ipynb")
    assert [found for cell in code if (found := errors(cell))] == []
    page.locator(".bd-step").scroll_into_view_if_needed()
    move_the_budget(page, shots, "lab-20")

    page.locator(
        ".bd-runs .bd-run"
    ).click()  # at a context of 4,096: reading the prompt takes a while
    status = page.locator(".bd-html-status")
    status.get_by_text(re.compile("reading the prompt|drafter reads|decoding")).wait_for()
    press(page, "gamma", "ArrowRight", part="numbers")  # the kernel answers meanwhile
    assert page.locator(".bd-tokens + div").inner_text() == "expected, gamma 5"
    page.locator(".bd-cancel").click()
    status.get_by_text("cancelled").wait_for()
    page.screenshot(path=shots / "lab-20-cancelled.png")
    assert page.faults == []


def test_dashboard_as_a_voila_page(page, voila, shots):
    page.goto(answering(voila))
    page.locator(".bd-budget").wait_for()
    move_the_budget(page, shots, "voila-20")
    press(page, "context", "ArrowLeft", 3)
    assert page.locator(".bd-context .widget-readout").inner_text() == "512"
    # Nothing is archived there: the page says so, draws nothing, and offers the run.
    assert page.locator(".bd-acceptance").inner_text() == "not measured"
    assert page.locator(".bd-html-left path").count() == 0
    page.locator(".bd-offer").get_by_text("Not measured: budgetdraft-feature-gpu").wait_for()
    page.screenshot(path=shots / "voila-20-not-measured.png")
    page.locator(".bd-offer .bd-run").click()
    page.locator(".bd-html-status").get_by_text("done").wait_for()
    assert page.locator(".bd-html-trace [title]").count() > 8
    assert re.fullmatch(r"\d+ of \d+", page.locator(".bd-run-same").inner_text())
    assert page.locator(".bd-html-live_map svg rect").count() > 1
    page.screenshot(path=shots / "voila-20-run.png", full_page=True)
    assert page.get_by_text("Traceback").count() == 0
    assert page.faults == []


def test_static_pages_need_no_network_and_no_kernel(page, shots, tmp_path):
    (index, lesson) = site.build(tmp_path, stored.find(["00"])[:1])
    page.goto(index.as_uri())
    page.locator(f'a[href="{lesson.name}"]').click()
    formula = page.locator('svg[aria-label^="\\\\text{speed-up}"]')
    formula.scroll_into_view_if_needed()
    box = formula.bounding_box()
    assert 100 < box["width"] < 600
    assert 20 < box["height"] < 80
    page.screenshot(path=shots / "static-00.png")
    assert page.faults == []

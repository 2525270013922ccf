"Open the kit in JupyterLab in a headless browser, run notebooks, and use the widgets."

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a Chromium on the PATH")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
SETTINGS = {
    "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
    "notebook-extension/tracker": dict(windowingMode="none", autosave=False),
}
READY = """async () => { const a = window.jupyterapp; await a.restored; const w = a.shell.currentWidget;
  await w.context.ready; await w.sessionContext.ready; return w.sessionContext.prevKernelName }"""
IDLE = """() => { const w = window.jupyterapp.shell.currentWidget;
  const cells = [...w.model.cells].filter(c => c.type === 'code' && c.sharedModel.source.trim());
  return cells.length > 0 && cells.every(c => c.executionCount)
    && w.sessionContext.session.kernel.status === 'idle' }"""
ERRORS = """() => {
  const bad = [], cells = [...window.jupyterapp.shell.currentWidget.model.cells].filter(c => c.type === 'code');
  for (const c of cells) for (let i = 0; i < c.outputs.length; i++) {
    const o = c.outputs.get(i).toJSON();
    if (o.output_type === 'error') bad.push(o.ename + ': ' + o.evalue) }
  return bad }"""
IMAGES = "() => document.querySelectorAll('.jp-Notebook .jp-OutputArea img').length"


@pytest.fixture(scope="session")
def notebooks(tmp_path_factory):
    "A folder with a copy of the notebooks, and settings for a server of its own."
    tmp = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", tmp / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs", "*.pdf"))
    for name, value in SETTINGS.items():
        f = tmp / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(value))
    return tmp


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(tmp):
    dirs = dict(
        JUPYTER_CONFIG_DIR="config",
        JUPYTER_DATA_DIR="data",
        JUPYTER_RUNTIME_DIR="run",
        JUPYTERLAB_SETTINGS_DIR="settings",
        JUPYTERLAB_WORKSPACES_DIR="ws",
        IPYTHONDIR="ipython",
        MPLCONFIGDIR="mpl",
    )
    env = dict(os.environ, **{k: str(tmp / v) for k, v in dirs.items()})
    env.pop("IN_TEST", None)
    return env


@pytest.fixture(scope="session")
def lab(notebooks):
    "A JupyterLab on the loopback address, behind a token."
    tmp, port, env = notebooks, free_port(), environment(notebooks)
    token, url = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    command = (
        f"-m jupyterlab --no-browser --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0 "
        f"--IdentityProvider.token={token} --allow-root --LabApp.expose_app_in_browser=True "
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.extension_manager=readonly "
        f"--ServerApp.root_dir={tmp / 'nbs'}"
    )
    with open(tmp / "server.log", "w") as log:
        server = subprocess.Popen([sys.executable, *command.split()], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/api?token={token}", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (tmp / "server.log").read_text()[-2000:]
                time.sleep(0.2)
        yield url, token
    finally:
        try:
            urllib.request.urlopen(
                urllib.request.Request(f"{url}/api/shutdown?token={token}", method="POST"), timeout=5
            )
        except OSError:
            server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="session")
def page(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, headless=True, args=FLAGS.split())
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.set_default_timeout(180_000)
        yield page
        browser.close()


def open_and_run(lab, page, name):
    "Open a notebook, run all its cells, and see that none failed."
    url, token = lab
    page.goto(f"{url}/lab/tree/{name}.ipynb?token={token}&reset", wait_until="domcontentloaded")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext")
    page.evaluate(READY)
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.wait_for_function(IDLE)
    assert page.evaluate(ERRORS) == []


@pytest.fixture
def shot(page, tmp_path):
    "Called with a name, leaves an image of the page; MSINET_SHOTS names a folder to keep them."

    def take(name):
        path = Path(os.environ.get("MSINET_SHOTS", tmp_path)) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=path)
        assert path.stat().st_size > 10_000

    return take


def test_the_index_runs(lab, page, shot):
    open_and_run(lab, page, "index")
    assert page.evaluate(IMAGES) >= 6
    shot("index")


def move(page, name, key="End"):
    "Move a slider by the keyboard; seconds until the panel's image has changed."
    row = page.locator(".jp-Notebook .widget-inline-hbox", has=page.get_by_text(name, exact=True)).first
    panel = page.locator(".jp-Notebook .widget-vbox", has=page.get_by_text(name, exact=True)).first
    image, before = panel.locator("img").first, panel.locator("img").first.get_attribute("src")
    handle = row.locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    start = time.perf_counter()
    page.keyboard.press(key)
    page.wait_for_function(
        "([e, before]) => e.getAttribute('src') !== before && e.complete", arg=[image.element_handle(), before]
    )
    return time.perf_counter() - start


def test_augmentation_sliders_move(lab, page, shot):
    open_and_run(lab, page, "data/04a_turn_the_dials")
    seconds = [move(page, name) for name in ("mirror", "shift", "brightness", "contrast", "saturation", "seed")]
    seconds.append(move(page, "erase", "Home"))
    shot("augment_lab")
    assert sorted(seconds)[len(seconds) // 2] < 2, seconds


PANELS = [
    "interaction_lab",
    "alpha_player",
    "live_search",
    "cell_browser",
    "activation_lens",
    "retrieval_browser",
    "sam_explorer",
    "embedding_map",
    "augment_lab",
]
SLIDERS = dict(
    interaction_lab="query",
    alpha_player="epoch",
    cell_browser="cell",
    activation_lens="query",
    retrieval_browser="query",
    sam_explorer="position",
    embedding_map="point",
    augment_lab="seed",
)
CLICKS = dict(interaction_lab=3, cell_browser=5, sam_explorer=14, embedding_map=-1)
EXECUTE = """async code => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const f = kernel.requestExecute({code, store_history: false});
  let out = '';
  f.onIOPub = m => {
    out += m.content.text ?? (m.content.ename ? m.content.ename + ': ' + m.content.evalue : '') };
  await f.done;
  return out }"""
ICONS = """() => [...document.fonts].some(f =>
  f.family.includes('Font Awesome') && f.weight === '900' && f.status === 'loaded')"""
CHANGED = "([e, before]) => e.getAttribute('src') !== before && e.complete"


class TourPanel:
    "One panel of the tour, in JupyterLab or on a web page."

    def __init__(self, page, name):
        self.page, self.panel = page, page.locator(".widget-vbox").nth(PANELS.index(name))
        self.image = self.panel.locator("img").first

    def timed(self, act):
        "Seconds from an act until the image is another one."
        before, start = self.image.get_attribute("src"), time.perf_counter()
        act()
        self.page.wait_for_function(CHANGED, arg=[self.image.element_handle(), before])
        return time.perf_counter() - start

    def slide(self, name, keys=("ArrowLeft", "ArrowRight", "ArrowLeft", "ArrowRight")):
        handle = (
            self.panel.locator(".widget-inline-hbox", has=self.page.get_by_text(name, exact=True))
            .locator(".noUi-handle")
            .first
        )
        handle.scroll_into_view_if_needed()
        handle.focus()
        if handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemin"):
            keys = keys[1:]
        return sorted(self.timed(lambda k=k: self.page.keyboard.press(k)) for k in keys)[len(keys) // 2]

    def spot(self, i):
        grid = self.panel.locator(".widget-gridbox .widget-gridbox")
        place, over, under = grid.locator("button").nth(i), grid.bounding_box(), self.image.bounding_box()
        assert all(abs(over[k] - under[k]) < 1.5 for k in over), f"buttons lie on {over}, the image on {under}"
        place.scroll_into_view_if_needed()
        return self.timed(lambda: place.click())

    def press(self, name):
        self.panel.get_by_role("button", name=name).click()

    def says(self, text):
        self.panel.locator(".widget-label", has_text=text).first.wait_for()


@pytest.fixture(scope="session")
def tour(lab, page):
    open_and_run(lab, page, "widgets/40a_tour")
    page.wait_for_function(f"() => document.querySelectorAll('.widget-vbox img').length === {len(PANELS)}")
    return page


def test_panels_of_the_tour_follow_sliders_and_clicks(tour):
    seconds = {name: TourPanel(tour, name).slide(label) for name, label in SLIDERS.items()}
    clicks = {name: TourPanel(tour, name).spot(i) for name, i in CLICKS.items()}
    print(
        "seconds to the new image:",
        {k: round(v, 2) for k, v in seconds.items()},
        "clicks:",
        {k: round(v, 2) for k, v in clicks.items()},
    )
    for name in PANELS:
        panel = TourPanel(tour, name).panel
        assert "Error" not in panel.inner_text(), name
        if "MSINET_SHOTS" in os.environ:
            panel.screenshot(path=Path(os.environ["MSINET_SHOTS"]) / f"{name}.png")
    assert sorted(seconds.values())[len(seconds) // 2] < 2, seconds


def test_search_is_started_paused_stepped_stopped_and_resumed(lab, tour, shot):
    live, player = TourPanel(tour, "live_search"), TourPanel(tour, "alpha_player")
    live.timed(lambda: live.press("start"))
    live.says("running")
    player.slide("epoch", ("ArrowLeft", "ArrowRight"))  # the notebook responds meanwhile
    live.press("pause")
    live.says("paused")
    iteration = live.panel.locator(".widget-label", has_text="iteration").inner_text()
    live.timed(lambda: live.press("step"))
    live.says("paused")
    tour.wait_for_function(
        "([e, was]) => e.innerText !== was",
        arg=[live.panel.locator(".widget-label", has_text="iteration").element_handle(), iteration],
    )
    shot("live_paused")
    live.press("stop")
    live.says("stopped")
    assert (
        tour.evaluate(
            EXECUTE,
            "import threading; print(any('search' in t.name for t in threading.enumerate()), live.page.answered)",
        ).strip()
        == "False True"
    )
    tour.evaluate(EXECUTE, "live.page.every, live.page.patience, live.page.unanswered = .3, 5, 0")
    live.press("resume")
    live.says("running")
    tour.goto("about:blank")  # the page is closed: after a while the search stops
    time.sleep(5)
    url, token = lab
    tour.goto(f"{url}/lab/tree/widgets/40a_tour.ipynb?token={token}&reset", wait_until="domcontentloaded")
    tour.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext")
    tour.evaluate(READY)
    assert tour.evaluate(EXECUTE, "print(live.search.state)").strip() in ("stopped", "finished")


def test_the_tour_works_as_a_web_page(notebooks, page, shot):
    pytest.importorskip("voila")
    port = free_port()
    command = (
        f"-m voila {notebooks / 'nbs' / 'widgets' / '40a_tour.ipynb'} --no-browser --Voila.ip=127.0.0.1 "
        f"--port={port} --port_retries=0 --theme=light"
    )
    with open(notebooks / "voila.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, *command.split()], env=environment(notebooks), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None, (notebooks / "voila.log").read_text()[-2000:]
                time.sleep(0.2)
        page.route(
            lambda url: not url.startswith(("http://127.0.0.1", "data:", "blob:")), lambda route: route.abort()
        )  # a classroom without a network
        page.goto(f"http://127.0.0.1:{port}/", wait_until="domcontentloaded")
        page.wait_for_function(f"() => document.querySelectorAll('.widget-vbox img').length === {len(PANELS)}")
        page.wait_for_function(ICONS)
        cells, positions = TourPanel(page, "cell_browser"), TourPanel(page, "sam_explorer")
        cells.slide("cell")
        positions.spot(9)
        assert "Traceback" not in page.inner_text("body") and page.locator(".jp-InputArea-editor").count() == 0
        shot("voila")
        if "MSINET_SHOTS" in os.environ:
            TourPanel(page, "alpha_player").panel.screenshot(path=Path(os.environ["MSINET_SHOTS"]) / "voila_player.png")
    finally:
        page.unroute_all()
        server.terminate()
        server.wait(20)

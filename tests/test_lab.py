"Open the kit in a real JupyterLab in a headless browser and run the first page, as a newcomer would."
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
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage"
SETTINGS = {
    "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
    "notebook-extension/tracker": dict(windowingMode="none", autosave=False),
}
READY = """async () => { const a = window.jupyterapp; await a.restored; const w = a.shell.currentWidget;
  await w.context.ready; await w.sessionContext.ready; return w.sessionContext.prevKernelName }"""
IDLE = """() => { const w = window.jupyterapp.shell.currentWidget;
  const cells = [...w.model.cells].filter(c => c.type === 'code' && c.sharedModel.source.trim());
  return cells.length > 0 && cells.every(c => c.executionCount) && w.sessionContext.session.kernel.status === 'idle' }"""
ERRORS = """() => [...window.jupyterapp.shell.currentWidget.model.cells].filter(c => c.type === 'code').flatMap(c => {
  const bad = []; for (let i = 0; i < c.outputs.length; i++) { const o = c.outputs.get(i).toJSON(); if (o.output_type === 'error') bad.push(o.ename + ': ' + o.evalue) } return bad })"""
PICTURES = "() => document.querySelectorAll('.jp-Notebook .jp-OutputArea img').length"


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "A JupyterLab on a copy of the notebooks, on the loopback address, behind a token."
    tmp = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", tmp / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs", "figures"))
    for name, value in SETTINGS.items():
        f = tmp / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(value))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token, url = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    dirs = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="run", JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="ws", IPYTHONDIR="ipython", MPLCONFIGDIR="mpl")
    env = dict(os.environ, **{k: str(tmp / v) for k, v in dirs.items()})
    env.pop("IN_TEST", None)
    command = f"-m jupyterlab --no-browser --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0 --IdentityProvider.token={token} --allow-root --LabApp.expose_app_in_browser=True"
    command += f" --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.extension_manager=readonly --ServerApp.root_dir={tmp / 'nbs'}"
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
            urllib.request.urlopen(urllib.request.Request(f"{url}/api/shutdown?token={token}", method="POST"), timeout=5)
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
    "Called with a name, leaves a picture of the page; MSINET_SHOTS names a folder to keep them."
    def take(name):
        path = Path(os.environ.get("MSINET_SHOTS", tmp_path)) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=path)
        assert path.stat().st_size > 10_000
    return take


def test_first_page_runs(lab, page, shot):
    open_and_run(lab, page, "index")
    assert page.evaluate(PICTURES) >= 6
    shot("index")


def move(page, name, key="End"):
    "Move the slider of that name by the keyboard, wait until the panel's picture has changed, and say how long that took."
    row = page.locator(".jp-Notebook .widget-inline-hbox", has=page.get_by_text(name, exact=True)).first
    panel = page.locator(".jp-Notebook .widget-vbox", has=page.get_by_text(name, exact=True)).first
    picture, before = panel.locator("img").first, panel.locator("img").first.get_attribute("src")
    handle = row.locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    start = time.perf_counter()
    page.keyboard.press(key)
    page.wait_for_function("([e, before]) => e.getAttribute('src') !== before && e.complete", arg=[picture.element_handle(), before])
    return time.perf_counter() - start


def test_augmentation_sliders_move(lab, page, shot):
    open_and_run(lab, page, "04a_turn_the_dials")
    seconds = [move(page, name) for name in ("mirror", "shift", "brightness", "contrast", "saturation", "seed")]
    seconds.append(move(page, "erase", "Home"))
    shot("augment_lab")
    assert sorted(seconds)[len(seconds) // 2] < 2, seconds

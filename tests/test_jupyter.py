"""The labs in JupyterLab, driven in a real browser: sliders redraw, the race draws while it trains and stops when told to."""
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from _browser import launch

ROOT = Path(__file__).resolve().parent.parent
SLIDERS = ["labs/explorer.ipynb", "labs/loss_curves.ipynb", "labs/loss_maps.ipynb", "labs/loss_results.ipynb"]
SHOTS = os.environ.get("SHOTS")  # a folder for screenshots, if one wants to look

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def page():
    with launch() as browser:
        yield browser.new_page(viewport={"width": 1400, "height": 1100})


@pytest.fixture(scope="module")
def lab(page, tmp_path_factory):
    """The address of a JupyterLab with its own settings on a copy of the notebooks (autosave must not touch the originals)"""
    pytest.importorskip("jupyterlab")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", folder / "work/nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("results", "settings.ini"):
        (folder / "work" / name).symlink_to(ROOT / name)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = {key: str(folder / key.lower()) for key in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_SETTINGS_DIR",
                                                      "JUPYTERLAB_WORKSPACES_DIR")}
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | own | {"MLMSNET_SCALE": "smoke"}
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
             "--allow-root", "--IdentityProvider.token=t0ken",
             f"--ServerApp.root_dir={folder / 'work/nbs'}", "--LabApp.expose_app_in_browser=True",
             "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"], env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (folder / "lab.log").read_text()[-2000:]
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()


def run_notebook(page, lab, name):
    """Open a notebook and run all its cells; returns when the kernel is idle again"""
    page.goto(f"{lab}/lab/tree/{name}?token=t0ken&reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    kernel = "window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel"
    page.wait_for_function(f"() => {kernel}?.connectionStatus === 'connected'", timeout=60_000)
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.wait_for_function(f"() => {kernel}?.status === 'idle'", timeout=300_000)
    errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] .ansi-red-fg")
    assert not errors.count(), errors.first.inner_text()


def shot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name.replace('/', '_').replace('.ipynb', '')}.png")


def live_box(page):
    """The innermost box that holds both a picture and controls"""
    box = page.locator(".jp-OutputArea-output .widget-vbox").filter(has=page.locator("img")).last
    box.wait_for(timeout=60_000)
    box.scroll_into_view_if_needed()
    return box


NEW_PICTURE = "([box, old]) => { const i = box.querySelector('img'); return i && i.src !== old && i.complete }"


@pytest.mark.parametrize("name", SLIDERS)
def test_slider_gives_a_new_picture(lab, page, name):
    run_notebook(page, lab, name)
    box = live_box(page)
    element, handle = box.element_handle(), box.locator(".noUi-handle").first
    sliding = handle.count() > 0
    if sliding:
        at_end = float(handle.get_attribute("aria-valuenow")) >= float(handle.get_attribute("aria-valuemax"))
        moves = ["ArrowLeft", "ArrowRight"] if at_end else ["ArrowRight", "ArrowLeft"]
    else:
        handle = box.locator("select").first
        now = handle.evaluate("e => e.selectedIndex")
        moves = [int(now == 0), now]
    shot(page, name)
    seconds = []
    for move in (*moves, moves[0]):
        old = box.locator("img").first.get_attribute("src")
        start = time.perf_counter()
        if sliding:
            handle.focus()
            handle.press(move)
        else:
            handle.select_option(index=move)
        page.wait_for_function(NEW_PICTURE, arg=[element, old], timeout=20_000)
        seconds.append(time.perf_counter() - start)
    shot(page, name)
    print(f"{name}: new picture after {min(seconds):.2f} to {max(seconds):.2f} s")


def test_the_race_draws_while_it_trains_and_stops(lab, page):
    run_notebook(page, lab, "compare_losses.ipynb")
    boxes = page.locator(".jp-OutputArea-output .widget-vbox").filter(has=page.get_by_role("button", name="Start"))
    box = boxes.filter(has=page.locator("img")).last
    box.scroll_into_view_if_needed()
    start, stop, clear = (box.get_by_role("button", name=name) for name in ("Start", "Stop", "Clear"))
    clear.click()
    picture, element = box.locator("img").first, box.element_handle()
    page.wait_for_function("b => b.innerText.includes('Choose losses and press')", arg=element, timeout=20_000)
    start.click()
    for _ in range(3):  # three new pictures while it trains
        old = picture.get_attribute("src")
        page.wait_for_function(NEW_PICTURE, arg=[element, old], timeout=60_000)
    shot(page, "race")
    stop.click()
    begin = time.perf_counter()
    page.wait_for_function("b => b.innerText.includes('Nothing runs')", arg=element, timeout=20_000)
    print(f"race: stopped {time.perf_counter() - begin:.2f} s after the click")
    page.wait_for_timeout(1500)
    still = picture.get_attribute("src")
    page.wait_for_timeout(2500)
    assert picture.get_attribute("src") == still, "it still draws after it was stopped"
    shot(page, "race_stopped")


def test_ticking_a_loss_adds_its_curve(lab, page):
    run_notebook(page, lab, "labs/loss_curves.ipynb")
    box = live_box(page)
    old, element = box.locator("img").first.get_attribute("src"), box.element_handle()
    box.locator("input[type=checkbox]:not(:checked)").first.check()
    page.wait_for_function(NEW_PICTURE, arg=[element, old], timeout=20_000)

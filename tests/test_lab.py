"The notebooks run in JupyterLab, clicked through in a browser, and leave nothing behind that git would see."
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from browser import Browser, until

ROOT = Path(__file__).resolve().parent.parent
SLOW = 600  # seconds until a step is given up; on an idle machine the longest takes about 15


def git(checkout, *arguments):
    return subprocess.run(["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments], cwd=checkout, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "The working tree's files in a repository of their own; the executed notebooks stay behind."
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode: pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("lab") / "checkout"
    for name in filter(None, names.stdout.split("\0")):
        if name.startswith("outputs/") or not (ROOT / name).is_file(): continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "as it is")
    return folder


def environment(checkout):
    "Kernels use the checkout's package, and a server nobody's settings."
    own = {name: str(checkout.parent / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    return {**os.environ, **own, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def lab(checkout, tmp_path_factory):
    "The address of a running server, in a browser."
    env = environment(checkout)
    settings = Path(env["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # else cells out of sight are not in the page
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = (checkout.parent / "server.log").open("w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
                               "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={checkout}", "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"],
                              env=env, stdout=log, stderr=log)
    browser = None
    def answers():
        assert server.poll() is None, "the server ended:\n" + Path(log.name).read_text()
        return json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=60))
    try:
        until(answers, "JupyterLab's server", SLOW)
        browser = Browser(tmp_path_factory.mktemp("chromium"))
        browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/lab")
        until(lambda: browser.js("!!window.jupyterapp"), "JupyterLab's page", SLOW)
        browser.wait("window.jupyterapp.restored.then(() => true)", "JupyterLab's start", SLOW)
        yield browser
    finally:
        if browser: browser.close()
        server.terminate()
        server.wait(60)
        log.close()


def ran(lab, path, added=""):
    "Open a notebook and run all of its cells, the parameters' or else the first with an addition; what they put out."
    lab.wait("""(async () => {
        const panel = window.panel = await jupyterapp.commands.execute('docmanager:open', {path: %s, factory: 'Notebook'})
        await panel.context.ready
        await panel.sessionContext.ready
        jupyterapp.shell.activateById(panel.id)
    })()""" % json.dumps(path), f"opening {path}", SLOW)
    return lab.wait("""(async () => {
        const cells = [...panel.content.model.cells], added = %s
        const cell = (cells.find(c => (c.getMetadata('tags') || []).includes('parameters')) || cells.find(c => c.type === 'code')).sharedModel
        const written = cell.getSource()
        if (added) cell.setSource(written + '\\n' + added)
        await jupyterapp.commands.execute('notebook:run-all-cells')
        if (added) cell.setSource(written)
        return cells.filter(c => c.type === 'code').map(c => ({count: c.executionCount, outputs: c.outputs.toJSON()}))
    })()""" % json.dumps(added), f"running {path}", SLOW)


def shut(lab, path):
    "Clear the outputs, save, and close notebook and kernel."
    lab.wait("""(async () => {
        await jupyterapp.commands.execute('notebook:clear-all-cell-outputs')
        await panel.context.save()
        await panel.sessionContext.shutdown()
        panel.dispose()
    })()""", f"closing {path}", SLOW)


def assert_clean(checkout, path):
    "Jupyter writes a notebook its own way, which git sees; after `nbdev_clean` it does not."
    assert git(checkout, "status", "--porcelain") == f" M {path}\n"
    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=checkout, env=environment(checkout), check=True, capture_output=True)
    assert git(checkout, "status", "--porcelain") == "", git(checkout, "diff")


def errors(cells): return ["\n".join(o["traceback"]) for c in cells for o in c["outputs"] if o["output_type"] == "error"]


def test_a_table(lab, checkout, tmp_path):
    path = "nbs/table1_daat.ipynb"
    cells = ran(lab, path, "preset, rows, columns, figures = 'quick', 'Standard AT,DAAT', 'natural,PGD-20', 'none'\n"
                           f"epochs, train_examples, test_examples, outputs = 1, 128, 32, {str(tmp_path)!r}")
    assert errors(cells) == [] and all(c["count"] for c in cells)
    shown = [str(o["data"]["text/html"]) for c in cells for o in c["outputs"] if "text/html" in o.get("data", {})]
    assert any("DAAT, Table 1" in html and "paper 84.66" in html for html in shown) and (tmp_path / "table1_daat" / "quick" / "table.csv").exists()
    shut(lab, path)
    assert_clean(checkout, path)


def test_explore(lab, checkout):
    path = "nbs/explore.ipynb"
    cells = ran(lab, path)
    assert errors(cells) == [] and all(c["count"] for c in cells)
    assert any("image/png" in o.get("data", {}) for c in cells for o in c["outputs"])
    until(lambda: lab.js("document.querySelectorAll('.widget-slider').length") == 5 and lab.js("document.querySelectorAll('.widget-dropdown select').length") == 2, "the controls", SLOW)
    picture = "document.querySelector('.widget-output img')?.src"
    before = until(lambda: lab.js(picture), "the figure below the controls", SLOW)
    lab.js("(() => { const s = [...document.querySelectorAll('.widget-dropdown select')].at(-1); s.value = 'fixed'; s.dispatchEvent(new Event('change', {bubbles: true})) })()")
    until(lambda: lab.js(picture) not in (None, before), "the figure of another rule", SLOW)
    assert lab.js("[...document.querySelectorAll('.widget-output')].every(e => !/Error|Traceback/.test(e.textContent))")
    shut(lab, path)
    assert_clean(checkout, path)


def test_a_cell_that_fails_is_seen(lab, checkout):
    path = "nbs/explore.ipynb"
    assert "ZeroDivisionError" in errors(ran(lab, path, "1 / 0"))[0]
    shut(lab, path)

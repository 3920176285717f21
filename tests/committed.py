"The runs behind what stands in `outputs/`: planned again from the parameters that each executed notebook shows."
import importlib, json, re
from contextlib import contextmanager
from pathlib import Path

from adaptive_at.data import datasets
from adaptive_at.tables.parameters import TABLES, check_parameters
from adaptive_at.tables.plan import Plan, open_session

ROOT = Path(__file__).resolve().parent.parent
# Content hash and sizes of the image folder that stands in the committed outputs; it is not in git.
JPEG = datasets.DatasetInfo("imagefolder:data/cifar10-jpeg", "CIFAR-10 (JPEG copy)", datasets.OFFICIAL["cifar10"].classes, (3, 32, 32), 50_000, 0, 10_000, 8/255, datasets.CROP_FLIP, "f87cbc4918eb3284")


@contextmanager
def recorded_data():
    "Planning finds the image folder that it has no files of."
    found, datasets.info = datasets.info, lambda name, root: JPEG if name == JPEG.name else found(name, root)
    try: yield
    finally: datasets.info = found


def notebooks(): return {path: json.loads(path.read_text()) for path in sorted((ROOT/"outputs").rglob("*.ipynb"))}


def injected(notebook):
    "The parameters that papermill was given."
    values = {}
    for cell in notebook["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", []): exec("".join(cell["source"]), values)
    return {k: v for k, v in values.items() if k != "__builtins__"}


def plan(name, given):
    "The plan of a table for these parameters; nothing is read but what the table needs to know of its data."
    session = open_session(check_parameters(name, given | dict(dry_run=True, device="cpu")))
    return Plan(importlib.import_module(f"adaptive_at.papers.{name}").TABLE, session)


def runs(plan):
    "Every run of a plan, those that others start from included."
    found, waiting = {}, [run for block in plan.blocks for each in block.runs.values() for run in each]
    while waiting:
        run = waiting.pop()
        found[run.id] = run
        if run.start: waiting.append(run.start)
    return found


def planned():
    "Of each executed notebook of a table, its runs by id."
    with recorded_data():
        return {path: runs(plan(path.stem, injected(notebook))) for path, notebook in notebooks().items() if path.stem in TABLES and path.stem != "frontier"}


def printed(path):
    "The ids that an executed notebook shows, and those in the files beside it."
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    for file in (path.parent/path.stem).rglob("*.csv"): text += file.read_text()
    return set(re.findall(r"\b(?=[0-9a-f]*[a-f])[0-9a-f]{12}\b|\b[0-9]{12}\b", text))

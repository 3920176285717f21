"A bad value in every table notebook."
import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from adaptive_at.base.errors import UserError
from adaptive_at.tables.parameters import TABLES

ROOT = Path(__file__).resolve().parent.parent.parent
BAD = dict(zip(TABLES, [dict(preset="quik"), dict(datasets="cifar"), dict(network="resnet17"), dict(device="tpu"), dict(seeds=-1), dict(rows="nobody"), dict(columns="PGD-7"), dict(figures="fig99"),
                        dict(data_root=""), dict(outputs=""), dict(epochs=1.5), dict(train_examples=-5), dict(test_examples="all"), dict(precision="fp16"), dict(dry_run="yes"), dict(eps=8),
                        dict(epoch=3), dict(eps=-0.1), dict(preset=1), dict(rows=3), dict(epochs=True), dict(device="cuda:99"), dict(seeds=1001)], strict=False))
BAD["frontier"] = dict(eps="8/255")


def problem(sentence: str, parameters: dict) -> str:
    "What is wrong with a refusal; empty: nothing."
    (name, value), = parameters.items()
    if "\n" in sentence or "Traceback" in sentence or not sentence.endswith("."): return f"no sentence: {sentence}"
    return "" if name in sentence and repr(value).strip("'") in sentence or name in sentence and name == "epoch" else f"{name} and {value!r} are not named: {sentence}"


def executed(name: str, folder: Path) -> str:
    "Through papermill; what was wrong."
    told = [part for k, v in ({"dry_run": True} | BAD[name]).items() for part in ("-p", k, str(v))]
    done = subprocess.run([sys.executable, "-m", "papermill", ROOT/"nbs"/f"{name}.ipynb", "out.ipynb", "--no-progress-bar", *told], cwd=folder, capture_output=True, text=True)
    if done.returncode == 0: return f"{name} {BAD[name]}: exit code 0"
    sentence = [line for line in done.stderr.splitlines() if line.strip()][-1]
    cells = json.loads((folder/"out.ipynb").read_text())["cells"]
    shown = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    if [o["traceback"] for o in shown] != [[sentence]]: return f"{name} {BAD[name]}: more than the sentence is shown"
    if left := [p.name for p in folder.iterdir() if p.name != "out.ipynb"]: return f"{name} {BAD[name]}: {left} were written"
    return f"{name} {BAD[name]}: {text}" if (text := problem(sentence, BAD[name])) else ""


def started(name: str, parameters: dict) -> str:
    "The sentence that a notebook's own cells end with, from the parameters on to the plan, in this process; empty: they ran."
    cells = ["".join(c["source"]) for c in json.loads((ROOT/"nbs"/f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    first = next(i for i, c in enumerate(cells) if f"check_parameters('{name}'" in c)
    last = next((i for i, c in enumerate(cells) if "Plan(TABLE" in c), first)
    namespace = {s.target.id: ast.literal_eval(s.value) for c in cells[:first] for s in ast.parse(c).body if isinstance(s, ast.AnnAssign)} | {"dry_run": True} | parameters
    try:
        for cell in cells[first:last + 1]: exec(compile(cell, name, "exec"), namespace)
    except UserError as e: return str(e)
    return ""


def campaign(report_line=lambda line: None) -> list[str]:
    "All notebooks, one after another."
    found = []
    for name in BAD:
        with tempfile.TemporaryDirectory() as folder: wrong = executed(name, Path(folder))
        found += [wrong] * bool(wrong)
        report_line(f"{name} {BAD[name]}: {wrong or 'refused'}")
    return found


def refused(monkeypatch, folder: Path) -> list[str]:
    "All notebooks' own cells in this process; what was wrong."
    monkeypatch.chdir(folder)
    found = [f"{name} {bad}: {text}" for name, bad in BAD.items() if (text := problem(started(name, bad), bad))]
    return found + [f"{p} was written" for p in os.listdir(folder)]

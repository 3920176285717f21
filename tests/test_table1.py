"`papermill nbs/table1_daat.ipynb` end to end at tiny sizes: quick, a part of the table, a dry run, the paper path, and bad input."
import csv, json, math, os, re, subprocess, sys, time
from pathlib import Path

import pytest

import archives
from adaptive_at.data import datasets
from adaptive_at.base.errors import UserError
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables.results import run

ROOT = Path(__file__).resolve().parent.parent
ROWS = ["Natural", "Standard AT", "FAT", "DAAT", "TRADES", "DAAT-TRADES", "MART", "DAAT-MART"]
COLUMNS = ["natural", "FGSM", "FGSM (no start)", "PGD-20", "PGD-40", "C&W-20", "AA", "transfer PGD-20 (Non-Robust)", "transfer PGD-20 (AT)"]
FIELDS = "dataset,network,row,checkpoint,column,value,ci_low,ci_high,n,seeds,std,paper,difference,warning,overrides,run".split(",")
TINY = dict(preset="quick", device="cpu", epochs=1, train_examples=1000, test_examples=10)  # a size at which AutoAttack soon breaks all images


class Executed:
    "What one `papermill nbs/table1_daat.ipynb out.ipynb -p ...` did, run in `folder`."
    def __init__(self, folder, env=None, **parameters):
        told = [part for name, value in parameters.items() for part in ("-p", name, str(value))]
        began = time.perf_counter()
        self.process = subprocess.run([sys.executable, "-m", "papermill", ROOT/"nbs"/"table1_daat.ipynb", "out.ipynb", "--no-progress-bar", *told],
                                      cwd=folder, env=env, capture_output=True, text=True)
        self.seconds = time.perf_counter() - began
        print(f"papermill {' '.join(told)}: {self.seconds:.1f} s")
        self.cells = json.loads((folder/"out.ipynb").read_text())["cells"]

    def outputs(self, kind=None): return [o for c in self.cells for o in c.get("outputs", []) if kind in (None, o["output_type"])]

    @property
    def printed(self): return "".join("".join(o["text"]) for o in self.outputs("stream"))

    @property
    def counts(self):
        "Runs from the store, trained; evaluations from the store, made."
        return [int(n) for n in re.search(r"(\d+) runs from the store, (\d+) trained; (\d+) evaluations from the store, (\d+) made", self.printed).groups()]

    @property
    def html(self): return ["".join(o["data"]["text/html"]) for o in self.outputs("execute_result") if "text/html" in o["data"]]

    def succeeded(self):
        assert self.process.returncode == 0, self.process.stderr
        return self


def table(folder, preset="quick"):
    with open(folder/"outputs"/"table1_daat"/preset/"table.csv", newline="") as file: return list(csv.DictReader(file))


def files(folder): return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def distinct(lines, field): return list(dict.fromkeys(line[field] for line in lines))


def one_sentence(text, *parts):
    assert text.endswith(".") and "\n" not in text and not re.search(r"[.!?] ", text), text
    for part in parts: assert part in text, f"{part} is not in: {text}"


# The quick table

@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    return folder, Executed(folder, **TINY).succeeded()


def test_a_quick_run_gives_the_whole_table_and_both_figures(quick):
    folder, done = quick
    lines = table(folder)
    assert list(lines[0]) == FIELDS
    assert distinct(lines, "row") == ROWS and set(distinct(lines, "column")) == set(COLUMNS)
    surrogates = {"transfer PGD-20 (Non-Robust)": "Natural", "transfer PGD-20 (AT)": "Standard AT"}  # not attacked by themselves
    assert [(l["row"], l["column"]) for l in lines] == [(r, c) for r in ROWS for c in COLUMNS if surrogates.get(c) != r]
    for line in lines:
        assert 0 <= float(line["ci_low"]) <= float(line["value"]) <= float(line["ci_high"]) <= 100
        assert (line["n"], line["seeds"], line["std"], line["difference"], line["checkpoint"]) == ("10", "1", "", "", "last")
        assert line["overrides"] == "test_examples=10 of 450; epochs=1 of 20; train_examples=1000 of 1197"
    assert next(l for l in lines if (l["row"], l["column"]) == ("DAAT", "AA"))["paper"] == "44.32"
    for name in ("fig4.png", "fig6b.png"):
        picture = (folder/"outputs/table1_daat/quick"/name).read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5000
    assert sum("image/png" in o["data"] for o in done.outputs("display_data")) == 2
    assert done.counts[:3] == [0, 11, 0] and done.counts[3] >= len(lines)  # three more rows, and what else the figures need


def test_the_executed_notebook_is_clean(quick):
    folder, done = quick
    text = json.dumps([[c["source"], c.get("outputs")] for c in done.cells])
    for place in {str(ROOT), str(folder), str(Path.home()), sys.prefix, sys.base_prefix, os.environ.get("TMPDIR", "/tmp")} - {"/"}:
        assert place.rstrip("/") + "/" not in text, re.search(rf".{{60}}{re.escape(place)}.{{60}}", text)
    assert not [o for o in done.outputs("stream") if o["name"] != "stdout"]
    assert not re.search("warning", " ".join(done.html + [done.printed]).replace("Warning", "warning")), "noise in the notebook"
    assert not done.outputs("error")
    assert not re.search(r"epoch +1/1|AA: ", done.printed)  # no progress lines are left


def test_a_second_run_trains_nothing_and_gives_the_same_table(quick):
    folder, done = quick
    before, first = files(folder/"outputs"/"runs"), (folder/"outputs/table1_daat/quick/table.csv").read_bytes()
    again = Executed(folder, **TINY).succeeded()
    assert again.counts == [11, 0, done.counts[3], 0]
    assert files(folder/"outputs"/"runs") == before
    assert (folder/"outputs/table1_daat/quick/table.csv").read_bytes() == first


def test_a_part_of_the_table(tmp_path, monkeypatch):
    done = Executed(tmp_path, **TINY, rows="Standard AT,DAAT", columns="clean,AA", figures="none").succeeded()
    lines = table(tmp_path)
    assert [(l["row"], l["column"]) for l in lines] == [("Standard AT", "natural"), ("Standard AT", "AA"), ("DAAT", "natural"), ("DAAT", "AA")]
    assert done.counts == [0, 2, 0, 4] and not list(tmp_path.rglob("*.png"))
    monkeypatch.chdir(tmp_path)
    clean, natural = (run(TABLE, **TINY, rows="DAAT", columns=name, figures="none").frame for name in ("clean", "natural"))
    assert clean.equals(natural) and list(clean.column) == ["natural"]
    kept = tmp_path/"outputs"/"table1_daat"/"quick"/"claims.csv"
    assert {(l["higher"], l["lower"], l["column"]) for l in csv.DictReader(kept.read_text().splitlines())} == {("DAAT", "Standard AT", "natural"), ("DAAT", "Standard AT", "AA")}
    shown = run(TABLE, **TINY, rows="DAAT", columns="natural", figures="none").claims([("DAAT is ahead", "DAAT", "Standard AT", "natural")])
    line, = csv.DictReader(kept.read_text().splitlines())   # of all that is in the store
    assert list(shown.data["this run"]) == ["not run"] and line["claim"] == "DAAT is ahead" and line["verdict"] != "not run"


# The paper preset

def test_a_dry_run_of_the_paper_prints_the_whole_plan_without_data(tmp_path):
    done = Executed(tmp_path, preset="paper", dry_run=True, device="cpu").succeeded()
    plan = next(h for h in done.html if "to train" in h)
    said = done.printed + plan
    assert re.search(r"about [\d,.]+ h of work", said) and re.search(r"[1-9][\d,.]* MB of disk", said), said
    heads = re.findall(r'<th id="\w+" class="row_heading level(\d) row\d+"[^>]*>([^<]*)</th>', plan)
    blocks = {}
    for level, text in heads:
        if level == "0": blocks[text] = []
        else: blocks[list(blocks)[-1]].append(text)
    assert list(blocks) == ["CIFAR-10", "SVHN"]
    for rows in blocks.values():
        assert [r for r in rows if "(" not in r] == ROWS and len(rows) == 11  # three more for the figures
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"] and not done.outputs("error")
    assert "trained;" not in done.printed


@pytest.fixture(scope="module")
def tiny_archives():
    "Archives so small that even a ResNet-18 is measured on them in seconds."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "N_TRAIN", 80)
        patch.setattr(archives, "N_TEST", 40)
        yield


def test_the_paper_path_on_both_blocks(tmp_path, tiny_archives):
    env = archives.environment(tmp_path/"data", ("cifar10", "svhn"))
    done = Executed(tmp_path, env, preset="paper", datasets="all", network="narrow", rows="Natural,FAT,DAAT-MART", columns="clean,PGD-20,Non-Robust", figures="fig4",
                    epochs=1, train_examples=64, test_examples=32, device="cpu").succeeded()
    lines = [l for l in table(tmp_path, "paper") if l["row"] in ("Natural", "FAT", "DAAT-MART")]  # the file also holds what Fig. 4 needed of other rows
    assert [(l["dataset"], l["row"], l["column"]) for l in lines] == [
        (d, r, c) for d in ("CIFAR-10", "SVHN") for r in ("Natural", "FAT", "DAAT-MART") for c in ("natural", "PGD-20", "transfer PGD-20 (Non-Robust)") if (r, c) != ("Natural", "transfer PGD-20 (Non-Robust)")]
    for line in lines:
        assert line["n"] == "32" and line["network"] == "narrow ResNet"
        assert float(line["difference"]) == pytest.approx(float(line["value"]) - float(line["paper"]), abs=1e-3)
        assert "network=narrow ResNet" in line["overrides"] and re.search(r"epochs=1 of 1[02]0", line["overrides"])
    papers = {(l["dataset"], l["row"], l["column"]): float(l["paper"]) for l in lines}
    assert papers["CIFAR-10", "Natural", "natural"] == 94.63 and papers["CIFAR-10", "Natural", "natural"] != papers["SVHN", "Natural", "natural"]
    assert done.counts[:2] == [0, 12]  # with the rows that only Fig. 4 needs
    assert sorted(p.name for p in (tmp_path/"outputs/table1_daat/paper").glob("*.png")) == ["fig4.png", "fig4_svhn.png"]


def test_the_paper_path_with_its_own_network(tmp_path, tiny_archives, monkeypatch):
    archives.here(tmp_path/"data", monkeypatch, ("cifar10",))
    monkeypatch.chdir(tmp_path)
    results = run(TABLE, preset="paper", datasets="cifar10", rows="DAAT", columns="clean,FGSM", figures="none", epochs=1, train_examples=8, test_examples=8, device="cpu")
    assert list(results.frame.network) == ["ResNet-18"] * 2 and list(results.frame.dataset) == ["CIFAR-10"] * 2
    assert results.frame.difference.notna().all() and results.plan.blocks[0].protocol.eps == 0.031
    assert "network" not in results.frame.overrides[0]


# Bad input

NOTHING = dict(preset="quick", figures="none", dry_run=True)  # what would be left to do if the bad value were taken

@pytest.mark.parametrize("parameters, parts", [
    (dict(preset="quik"), ["preset", "'quik'", "quick", "paper"]),
    (dict(preset=1), ["preset", "1", "quick"]),
    (dict(rows="DAAT,Standrad AT"), ["rows", "'Standrad AT'", "Standard AT", "DAAT-MART"]),
    (dict(rows=3), ["rows", "3"]),
    (dict(columns="clean,PGD-7"), ["columns", "'PGD-7'", "PGD-20", "AA"]),
    (dict(datasets="cifar"), ["datasets", "'cifar'", "cifar10", "svhn"]),
    (dict(datasets="imagefolder:nowhere"), ["datasets", "nowhere", "train"]),
    (dict(network="resnet17"), ["network", "'resnet17'", "resnet18", "narrow"]),
    (dict(device="tpu"), ["device", "'tpu'", "cuda"]),
    (dict(device="cuda:99"), ["device", "'cuda:99'", "cpu"]),
    (dict(figures="fig4,fig99"), ["figures", "'fig99'", "fig4", "fig6b", "none"]),
    (dict(precision="fp16"), ["precision", "'fp16'", "bf16"]),
    (dict(epochs=-1), ["epochs", "-1", "from 1 on"]),
    (dict(epochs=1.5), ["epochs", "1.5", "whole number"]),
    (dict(epochs="ten"), ["epochs", "'ten'", "whole number"]),
    (dict(epochs=True), ["epochs", "True", "whole number"]),
    (dict(seeds=-1), ["seeds", "-1", "from 1 to 1000"]),
    (dict(seeds=1001), ["seeds", "1001", "from 1 to 1000"]),
    (dict(train_examples=-5), ["train_examples", "-5"]),
    (dict(test_examples=-5), ["test_examples", "-5"]),
    (dict(eps=-0.1), ["eps", "-0.1", "below 1"]),
    (dict(eps=1.0), ["eps", "1.0", "below 1"]),
    (dict(eps=8), ["eps", "8", "below 1"]),
    (dict(eps=math.nan), ["eps", "nan", "below 1"]),
    (dict(eps="8/255"), ["eps", "'8/255'", "below 1"]),
    (dict(rho=-0.1), ["rho", "-0.1"]),
    (dict(tau=0.5), ["tau", "0.5"]),
    (dict(tau=math.inf), ["tau", "inf"]),
    (dict(dry_run="yes"), ["dry_run", "'yes'", "True or False"]),
    (dict(data_root=""), ["data_root", "''", "folder"]),
    (dict(outputs=""), ["outputs", "''", "folder"]),
    (dict(outputs="taken/below"), ["outputs", "taken"]),
    (dict(outputs="taken"), ["outputs", "taken"]),
    (dict(epoch=3), ["epoch", "epochs", "train_examples"]),
    (dict(beta=6.0), ["beta", "rho"]),  # a parameter of other tables
], ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "")
def test_a_bad_value_is_refused_in_one_sentence(parameters, parts, tmp_path, monkeypatch):
    (tmp_path/"taken").write_text("a file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal: run(TABLE, **NOTHING | parameters)
    one_sentence(str(refusal.value), *parts)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    (tmp_path/"closed").mkdir(mode=0o555)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal: run(TABLE, **NOTHING, outputs="closed/outputs")
    one_sentence(str(refusal.value), "outputs", "closed")


def test_data_that_cannot_be_had_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "reachable", lambda url: False)
    with pytest.raises(UserError) as refusal: run(TABLE, preset="paper", device="cpu", datasets="svhn")
    one_sentence(str(refusal.value), "datasets", "SVHN", "train_32x32.mat")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("parameters, parts", [
    (dict(preset="quick", dry_run=True, rows="Standrad AT"), ["rows", "'Standrad AT'", "Standard AT"]),
    (dict(preset="quick", dry_run=True, epoch=3), ["epoch", "epochs"]),
    (dict(preset="quick", dry_run=True, outputs="taken/below"), ["outputs", "taken"]),
    (dict(preset="paper", device="cpu"), ["datasets", "CIFAR-10", "cifar-10-python.tar.gz"]),
], ids=["row", "name", "outputs", "data"])
def test_the_notebook_stops_with_that_sentence_alone(parameters, parts, tmp_path):
    archives_elsewhere = archives.environment(tmp_path/"elsewhere"/"data", ("cifar10", "svhn"), server="http://127.0.0.1:9")  # nobody answers there
    folder = tmp_path/"here"
    folder.mkdir()
    (folder/"taken").write_text("a file")
    stopped = Executed(folder, archives_elsewhere, **dict(epochs=1, train_examples=16, test_examples=10, figures="none") | parameters)
    assert stopped.process.returncode != 0
    sentence = [line for line in stopped.process.stderr.splitlines() if line.strip()][-1]
    one_sentence(sentence, *parts)
    failing = next(c for c in stopped.cells if any(o["output_type"] == "error" for o in c.get("outputs", [])))
    assert len(failing["outputs"]) == 1 and failing["outputs"][0]["traceback"] == [sentence]
    assert not any(c["outputs"] for c in stopped.cells[stopped.cells.index(failing) + 1:] if c["cell_type"] == "code")
    assert {p.name for p in folder.iterdir()} == {"out.ipynb", "taken"}

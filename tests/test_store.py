"The store as a user meets it: parts of a table, damaged or deleted files."
import csv
from dataclasses import replace

import pytest

from adaptive_at.core import UserError
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables import run

SIZE = dict(preset="quick", device="cpu", epochs=2, train_examples=96, test_examples=20, figures="none")


@pytest.fixture
def store(tmp_path):
    results = run(TABLE, **SIZE, rows="Natural", columns="clean,FGSM", outputs=str(tmp_path))
    return tmp_path, results


def lines(folder):
    with open(folder/"table1_daat/quick/table.csv", newline="") as f: return {(l["row"], l["column"]): l["value"] for l in csv.DictReader(f)}


def test_a_part_run_keeps_what_the_store_holds(store):
    folder, _ = store
    before = lines(folder)
    assert set(before) == {("Natural", "natural"), ("Natural", "FGSM")}
    part = run(TABLE, **SIZE, rows="Standard AT", columns="PGD-20", outputs=str(folder))
    after = lines(folder)
    assert set(after) == {*before, ("Standard AT", "PGD-20")} and all(after[k] == v for k, v in before.items())
    assert list(part.frame.row) == ["Standard AT"], "the table shown is the part that was asked for"


@pytest.mark.parametrize("pattern", ["runs/*/spec.json", "runs/*/evals/clean-*.json"])
def test_a_damaged_file_is_one_sentence_and_deleting_it_mends_it(store, pattern):
    folder, first = store
    path, = folder.glob(pattern)
    weights = {p: p.stat().st_mtime_ns for p in folder.rglob("best.pt")}
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(UserError) as caught: run(TABLE, **SIZE, rows="Natural", columns="clean,FGSM", outputs=str(folder))
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    again = run(TABLE, **SIZE, rows="Natural", columns="clean,FGSM", outputs=str(folder))
    assert again.frame.value.tolist() == first.frame.value.tolist()
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("best.pt")} == weights, "nothing was trained again"


def test_an_output_folder_that_only_looks_writable_is_refused():
    with pytest.raises(UserError, match="outputs is '/proc/nowhere'"): run(TABLE, **SIZE, rows="Natural", columns="clean", outputs="/proc/nowhere")


def test_a_table_without_its_surrogate_s_row_leaves_the_column_out(tmp_path):
    table = replace(TABLE, rows=lambda p: {"Standard AT": TABLE.rows(p)["Standard AT"]})
    results = run(table, **SIZE, columns="clean", outputs=str(tmp_path))
    assert list(results.frame.column) == ["natural"]
    with pytest.raises(UserError, match="made on the row 'Natural'"): run(table, **SIZE, columns="Non-Robust", outputs=str(tmp_path))

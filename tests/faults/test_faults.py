"The campaign in short; `python -m tests.faults --kills 50` is the whole of it."

import resource
import signal

import pytest

from helpers import contents

from . import damage, failures, kills, notebooks, writes
from .bench import METHODS, Process, differences, reference, table_of, tiny


@pytest.fixture(scope="module", autouse=True)
def small():
    with tiny(): yield


def test_killed_processes_end_as_if_nothing_had_happened(tmp_path):
    found = kills.campaign(tmp_path, 9, seed=1)
    print(found)
    assert not found.wrong and found.landed == 9 and len(found.methods) >= 6 and {"training", "checkpointing"} <= set(found.phases)


@pytest.fixture(scope="module")
def bases(tmp_path_factory): return damage.Bases(tmp_path_factory.mktemp("bases"))


def test_damaged_files_never_give_another_number(bases, tmp_path):
    cases = [case for i, case in enumerate(damage.CASES) if i % 6 == 1]   # most files, and each fault
    found = damage.campaign(tmp_path, cases, seed=1, bases=bases)
    print(found)
    assert not found.wrong and sum(found.outcomes.values()) == len(cases) >= 13


def test_files_that_fail_for_a_while_stay_and_are_read_afterwards(bases, tmp_path):
    cases = [("finished", "last.pt", "short memory"), ("begun", "best.pt", "I/O error after the checksum"),
             ("begun", "last.pt", "short memory"), ("finished", "spec.json", "unreadable")]
    found = failures.campaign(tmp_path, cases, bases=bases)
    print(found)
    assert not found.wrong and found.outcomes.total() == len(cases) and not found.outcomes["not needed"]


def test_four_processes_share_an_empty_store(tmp_path):
    wrong, said = kills.shared(tmp_path, methods=METHODS[:4])
    print(said)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", [3_000, 12_000, 40_000])
def test_a_full_disk_stops_cleanly_and_more_room_mends_it(room, tmp_path):
    "Files that cannot grow: no larger than this many bytes."
    def cramped():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        table_of(tmp_path/"outputs", "DAAT")()
    log = tmp_path/"log"
    assert Process(log, cramped).wait() == 1
    refusal = log.read_text().splitlines()[-1]
    assert "Traceback" not in log.read_text() and refusal.startswith("refused: ") and "could not be written" in refusal and "free some space" in refusal
    assert Process(log, table_of(tmp_path/"outputs", "DAAT")).wait() == 0
    assert not differences(contents(tmp_path/"outputs"), reference("DAAT", tmp_path/"whole").contents) and not list(tmp_path.rglob(".*.part"))


def test_a_disk_that_fails_at_any_write_loses_nothing(tmp_path):
    found = writes.campaign(tmp_path, each=23)   # the campaign fails at every one
    print(found)
    assert not found.wrong and found.writes > 150 and found.refused >= 5 and found.refused + found.borne == len(range(0, found.writes, 23))


def test_the_campaign_sees_a_write_whose_failure_is_a_traceback(tmp_path, monkeypatch):
    from adaptive_at.store import runs
    monkeypatch.setattr(runs, "write_text", lambda path, text: path.write_text(text))   # history.csv
    with writes.Disk().used(): writes.work(tmp_path/"whole")
    result, expected = writes.Writes(), contents(tmp_path/"whole")
    steps = []
    class Noted(writes.Disk):
        def step(self, what, path=""):
            steps.append((what, str(path).rpartition("/")[2]))
            super().step(what, path)
    with Noted().used(): writes.work(tmp_path/"noted")
    at = 1 + steps.index(("open", "history.csv"))
    assert "history.csv" in writes.one(tmp_path/"failed", writes.Disk(at), expected, result)


def test_the_campaign_sees_a_result_that_is_not_the_same(tmp_path, monkeypatch):
    "A resumed run that forgets its radii."
    from adaptive_at.training import State
    whole = State.load_state_dict
    def forgetful(self, saved):
        whole(self, saved)
        self.bank.eps.fill_(0.1)
    monkeypatch.setattr(State, "load_state_dict", forgetful)
    found = kills.campaign(tmp_path, 6, seed=2, methods=["DAAT"])   # enough that some land after the first checkpoint
    assert found.wrong and all("differs" in text for text in found.wrong)


def test_the_table_names_its_methods():
    assert {fault for _, _, fault in failures.CASES} == set(failures.FAILURES) and len(failures.CASES) >= 25
    assert len(METHODS) >= 6 and len(damage.CASES) >= 40 and set(notebooks.BAD) == set(notebooks.TABLES)


def test_every_notebook_refuses_a_bad_value(tmp_path, monkeypatch):
    wrong = notebooks.refused(monkeypatch, tmp_path)
    assert not wrong, "\n".join(wrong)

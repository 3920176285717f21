"Tables as tasks of Ray: the numbers of this machine alone, workers that are killed, Ctrl-C, and what is refused."
import contextlib
import importlib
import ipaddress
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from adaptive_at.jobs import ray_jobs
from adaptive_at.tables import plan as plans
from adaptive_at.base import identity
from adaptive_at.base.errors import UserError
from adaptive_at.jobs.ray_jobs import Job, in_order, joined, machines, on_ray, on_this_machine, resources
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables.parameters import check_parameters
from adaptive_at.tables.plan import Plan, open_session
from adaptive_at.jobs.interrupts import Stopped, defer_interrupt
from adaptive_at.tables.results import _jobs, execute, run
from helpers import contents

ROOT = Path(__file__).resolve().parent.parent
SIZE = dict(preset="quick", device="cpu", figures="none", rows="Natural,DAAT", columns="clean,PGD-20,AT", epochs=4, train_examples=256, test_examples=20, eps=0.25, rho=0.005)  # and Standard AT, as a surrogate


@pytest.fixture(scope="module")
def ray():
    "One Ray for all tests; one that runs already where RAY_ADDRESS says so."
    with joined(os.environ.get("RAY_ADDRESS", "")) as ray: yield ray


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    "The table, one run after another in this process."
    folder = tmp_path_factory.mktemp("serial")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(plans, "cores", lambda: 1)
        run(TABLE, **SIZE, outputs=str(folder))
    return contents(folder)


def planned(outputs, table=TABLE, **parameters): return Plan(table, open_session(check_parameters(table.name, SIZE | {"outputs": str(outputs), "launcher": "ray"} | parameters)))


def workers():
    "The processes of tasks that run now, of any Ray on this machine that this process can see."
    return [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0] == "ray::_work"]


# Who can reach it

ALONE = {} if os.environ.get("RAY_ADDRESS") else {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}   # for a process that joins the Ray of the tests, which is on the loopback address


def listening(processes):
    "The addresses on which these processes take connections."
    found = set()
    for p in processes:
        with contextlib.suppress(psutil.Error): found |= {c.laddr.ip for c in p.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}
    return found


at_home = pytest.mark.skipif(bool(os.environ.get("RAY_ADDRESS")), reason="of a Ray that starts here")


@at_home
def test_ray_on_this_machine_listens_on_this_machine_only(ray):
    assert ray.get(ray.remote(lambda: 1).remote()) == 1   # a worker is there
    found = listening([psutil.Process(), *psutil.Process().children(recursive=True), *(p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0].startswith("ray::"))])
    assert found and all(ipaddress.ip_address(ip.replace("::ffff:", "")).is_loopback for ip in found), found


@at_home
def test_ray_on_this_machine_asks_for_its_token(ray):
    address = ray.get_runtime_context().gcs_address
    wrong = dict(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    tried = subprocess.run([sys.executable, "-c", ray_jobs.JOINS, address], env=os.environ | ALONE | wrong, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert tried.returncode != 0 and "authentication" in tried.stderr.lower(), tried.stderr[-500:]


@pytest.mark.parametrize("address", ["10.1.2.3", "::", "0.0.0.0"])
def test_a_ray_that_others_can_reach_is_not_used(address, monkeypatch):
    class Open:
        def nodes(self): return [{"NodeManagerAddress": "127.0.0.1"}, {"NodeManagerAddress": address}]
    said = sentence(ray_jobs.check_loopback, Open())
    assert address in said and "this machine" in said


# Jobs

def test_the_jobs_of_a_table_wait_for_what_they_need(tmp_path):
    from adaptive_at.papers.table2_dra import TABLE as DRA
    plan = Plan(DRA, open_session(check_parameters(DRA.name, dict(preset="quick", device="cpu", outputs=str(tmp_path)))))
    block, = plan.blocks
    jobs = _jobs(plan, False)
    training = {job.specs[0].id: job for job in jobs if job.work.func.__name__ == "_train"}
    assert set(training) == {r.id for runs in block.runs.values() for r in runs} and any(j.after for j in training.values())
    for i, job in enumerate(jobs):
        about = job.specs[0]
        assert all(jobs.index(a) < i for a in job.after)
        if job in training.values(): assert {a.specs[0].id for a in job.after} == ({about.start.id} if about.start else set())
        else: assert about.id in {a.specs[0].id for a in job.after}
    ordered = in_order(jobs)
    assert set(ordered) == set(jobs) and all(ordered.index(a) < i for i, job in enumerate(ordered) for a in job.after)


def test_an_evaluation_waits_for_its_surrogate(tmp_path):
    plan = planned(tmp_path)
    evaluating, = [job for job in _jobs(plan, False) if job.work.func.__name__ == "_evaluate" and "DAAT" in job.work.args]
    assert {a.specs[0].id for a in evaluating.after} == {plan.blocks[0].runs[row][0].id for row in ("DAAT", "Standard AT")}


@pytest.mark.parametrize("seconds", [(0, 0, 0, 0), (1, 9, 0, 5), (0, 0, 9, 0), (3, 2, 1, 4)])
def test_every_job_comes_after_those_it_waits_for(seconds):
    a, b = Job(print, seconds=seconds[0]), Job(print, seconds=seconds[1])
    c = Job(print, after=(a,), seconds=seconds[2])
    d = Job(print, after=(c, b), seconds=seconds[3])
    ordered = in_order([a, b, c, d])
    assert {*ordered} == {a, b, c, d} and all(ordered.index(before) < ordered.index(job) for job in ordered for before in job.after)


def test_the_job_with_the_longest_way_to_the_end_is_first():
    a, b, c = Job(print, seconds=1.), Job(print, seconds=3.), Job(print, seconds=2.)
    d = Job(print, after=(a,), seconds=9.)
    assert in_order([a, b, c, d]) == [a, d, b, c] and in_order([]) == []


def test_a_job_does_not_wait_for_others_than_its_own(tmp_path):
    "A free worker takes the next one, though a job that was begun before still runs: here that one waits for it."
    def until_written(report_line):
        until = time.monotonic() + 30
        while not (tmp_path/"written").exists() and time.monotonic() < until: time.sleep(0.01)
        report_line("written" if (tmp_path/"written").exists() else "gave up")
    def write(report_line): (tmp_path/"written").touch()
    said, first = [], Job(lambda report_line: report_line("first"), seconds=1.)
    on_this_machine([first, Job(until_written, seconds=9.), Job(write, after=(first,))], 2, said.append)
    assert said == ["first", "written"]


def test_a_long_evaluation_is_a_job_of_its_own(tmp_path):
    plan = planned(tmp_path, columns="clean,PGD-20,AA", train_examples=0, test_examples=0, rows="Natural")
    training, together, alone = _jobs(plan, False)
    cells = {job: job.work.args[4] for job in (together, alone)}
    assert sorted(c for c, _ in cells[together]) == ["PGD-20", "natural"] and [c for c, _ in cells[alone]] == ["AA"]
    assert alone.seconds > 10 > together.seconds > 0 and training.seconds > 0 and together.after == alone.after == (training,)
    left = plan.left(plan.blocks[0], "Natural")
    assert together.seconds + alone.seconds == pytest.approx(left.evaluating) and training.seconds == pytest.approx(left.training)


def test_jobs_on_this_machine_run_in_processes_of_their_own_and_wait():
    said = []
    first = Job(lambda report_line: (time.sleep(0.3), report_line(f"first {os.getpid()}")))
    on_this_machine([first, Job(lambda report_line: report_line("other")), Job(lambda report_line: report_line("second"), after=(first,))], 3, said.append)
    assert said[0] == "other" and said[2] == "second" and said[1].startswith("first ") and said[1] != f"first {os.getpid()}"


@pytest.mark.parametrize("threads, device, taken", [(1, "cpu", (1, 0)), (3, "cpu", (3, 0)), (1, "cuda", (1, 0.25)), (None, "cuda", (1, 1))])
def test_what_a_task_takes(threads, device, taken): assert tuple(resources(threads, device).values()) == taken


def test_a_large_network_takes_the_threads_of_pytorch(): assert resources(None, "cpu")["num_cpus"] == torch.get_num_threads()


# The numbers

def test_a_table_on_ray_has_the_numbers_of_one_process(ray, serial, tmp_path):
    said = []
    execute(planned(tmp_path), said.append)
    assert contents(tmp_path) == serial
    assert re.fullmatch(r"Ray: 1 machine, \d+ CPUs?", said[0])
    assert sum(bool(re.match(r"(DAAT|Natural|Standard AT): epoch ", line)) for line in said) == 3 * 4 and len(set(said)) == len(said)
    assert said[-1].startswith("0 runs from the store, 3 trained; 0 evaluations from the store, 6 made")
    assert not [p for p in tmp_path.rglob(".*") if p.name.startswith(".seen")]
    execute(planned(tmp_path), said.append)
    assert said[-1].startswith("3 runs from the store, 0 trained; 6 evaluations from the store, 0 made")


def test_workers_that_are_killed_change_nothing(ray, serial, tmp_path):
    said, killed, over = [], [], threading.Event()

    def killer():
        "SIGKILL whoever has just finished an epoch."
        seen = {}
        while not over.wait(0.02):
            now = {p: p.read_text().count("\n") for p in tmp_path.glob("runs/*/history.csv")}
            if now != seen and len(killed) < 4 and (running := workers()):
                running[len(killed) % len(running)].kill()
                killed.append(now)
            seen = now
    thread = threading.Thread(target=killer)
    thread.start()
    try: execute(planned(tmp_path), said.append)
    finally:
        over.set()
        thread.join()
    assert len(killed) >= 3 and any("continuing after" in line for line in said), said
    assert contents(tmp_path) == serial


SCRIPT = """
    import sys
    from dataclasses import dataclass, replace
    import torch
    from adaptive_at.algorithms.baselines import at
    from adaptive_at.papers.table1_daat import TABLE
    from adaptive_at.radius import RadiusRule
    from adaptive_at.tables.results import run

    LEAST = 0.5

    @dataclass(frozen=True)
    class Halved(RadiusRule):
        "A rule that only this script has."
        def radius(self, bank, batch, model): return torch.full((len(batch.y),), least() * self.eps)

    def least(): return LEAST

    def rows(p): return {"Halved": at(p.eps, Halved(p.eps))}

    if __name__ == "__main__":
        for folder, where in (("a", dict(launcher="ray", address=sys.argv[1])), ("b", {})):
            results = run(replace(TABLE, rows=rows, columns=lambda p: {"natural": TABLE.columns(p)["natural"]}), preset="quick", device="cpu", figures="none", epochs=1, train_examples=64, test_examples=20, outputs=folder, **where)
            print(results.plan.blocks[0].runs["Halved"][0].id, results.frame.value[0])
"""


def test_a_rule_of_a_script_is_sent_with_its_source_to_a_cluster(ray, tmp_path):
    (tmp_path/"own.py").write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, "own.py", ray.get_runtime_context().gcs_address], cwd=tmp_path, env=os.environ | ALONE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    on_ray, here = [line for line in done.stdout.splitlines() if re.match(r"\w{12} [\d.]+$", line)]
    assert on_ray == here and contents(tmp_path/"a") == contents(tmp_path/"b") != {}


class Talks:
    "Work that says something all the time, and how many tasks are at work."
    def __init__(self, folder): self.folder = folder
    def __call__(self, report_line):
        own = self.folder/f"at-work-{os.getpid()}"
        own.touch()
        for _ in range(100):
            report_line(f"{len(list(self.folder.glob('at-work-*')))} at work")
            time.sleep(0.05)
        own.unlink()


def test_tasks_that_talk_do_not_outnumber_the_cpus(ray, tmp_path):
    "Ray gives the CPUs of a task that waits, for instance until its line is heard, to another one, and takes none back."
    said, cpus = [], int(ray.cluster_resources()["CPU"])
    on_ray([Job(Talks(tmp_path)) for _ in range(2 * cpus)], "", "cpu", tmp_path, said.append)
    counts = [int(line.split()[0]) for line in said[1:]]
    assert len(counts) == 2 * cpus * 100 and max(counts) == cpus


# Ctrl-C

class Waits:
    "Work that ends when it is asked to."
    def __init__(self, saves): self.saves = saves
    def __call__(self, report_line):
        with defer_interrupt(60.) as asked:
            report_line("begun")
            while not (asked() and self.saves): time.sleep(0.01)
            report_line("saved")


def interrupt(times, said):
    "Told lines, until `times` have begun; then as if Ctrl-C were pressed."
    def report_line(line):
        said.append(line)
        if said.count("begun") == times and line == "begun": os.kill(os.getpid(), signal.SIGINT)
    return report_line


def test_ctrl_c_lets_tasks_save_and_ends_those_that_wait(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_jobs, "LONGEST", 60.)
    said, first = [], Job(Waits(True))
    with pytest.raises(Stopped, match="^stopped; run the same command again, it goes on from there$"):
        on_ray([first, Job(Waits(True)), Job(Waits(True), after=(first,))], "", "cpu", tmp_path, interrupt(2, said))
    assert said[1:] == ["begun"] * 2 + ["saved"] * 2 and not workers()


def test_ctrl_c_ends_a_task_that_takes_too_long(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_jobs, "LONGEST", 0.5)
    said = []
    with pytest.raises(Stopped): on_ray([Job(Waits(False))], "", "cpu", tmp_path, interrupt(1, said))
    for _ in range(100):
        if not workers(): break
        time.sleep(0.05)
    assert said[1:] == ["begun"] and not workers()


class Interrupted:
    def __init__(self, opening): self.opening, self.digest = opening, identity.spec_hash(())
    def opened(self, machine):
        if self.opening: raise KeyboardInterrupt
        return Job(self)
    def __call__(self, report_line): raise KeyboardInterrupt


@pytest.mark.parametrize("opening", [True, False])
def test_a_process_that_is_interrupted_ends(opening, tmp_path, monkeypatch):
    "It may have been importing, here or in the midst of its work: Ray would give it the next task, and half of numpy cannot be imported again."
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(f"ended with {status}"))
    monkeypatch.setattr("ray.get", lambda refs: None)
    with pytest.raises(SystemExit, match="ended with 1"): ray_jobs._work(Interrupted(opening), 1, "cpu", tmp_path, None)


def test_a_stopped_table_goes_on(ray, serial, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_jobs, "LONGEST", 60.)
    said, sent = [], []
    def report_line(line):
        said.append(line)
        if "epoch   2/4" in line and not sent:
            sent.append(line)   # before: the signal raises inside os.kill, and the other row's second epoch would stop the stopping
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped): execute(planned(tmp_path), report_line)
    assert any(re.match(r"stopped; run the same command again, digits-\S+ goes on after ", line) for line in said), said
    execute(planned(tmp_path), said.append)
    assert contents(tmp_path) == serial


# What fails

class Fails:
    def __init__(self, error, *args): self.error, self.args = error, args
    def __call__(self, report_line): raise self.error(*self.args)


class Long:
    def __call__(self, report_line): time.sleep(300)


class Picky(UserError):
    "An error that cannot be pickled."
    def __init__(self, one, other): super().__init__(f"{one} is {other}.")


def test_the_first_job_that_fails_ends_the_others(ray, tmp_path):
    with pytest.raises(UserError, match="^the disk is full.$") as caught: on_ray([Job(Long()), Job(Fails(Picky, "the disk", "full"))], "", "cpu", tmp_path, lambda line: None)
    assert type(caught.value) is UserError and caught.value.__cause__ is None
    with pytest.raises(RuntimeError, match="(?s)ray::_work.*ZeroDivisionError: oh"): on_ray([Job(Fails(ZeroDivisionError, "oh"))], "", "cpu", tmp_path, lambda line: None)


class Dies:
    def __call__(self, report_line): os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_always_dies_is_given_up(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_jobs, "RETRIES", 1)
    with pytest.raises(UserError, match="^training of DAAT: Ray could not finish the task .*run the same command again, it goes on where it stopped.$"):
        on_ray([Job(Dies(), name="training of DAAT")], "", "cpu", tmp_path, lambda line: None)


def sentence(call, *args, **kwargs):
    with pytest.raises(UserError) as caught: call(*args, **kwargs)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


def test_ray_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_jobs, "find_spec", lambda name: None)
    assert 'pip install "adaptive_at[cluster]"' in sentence(planned, tmp_path/"outputs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("parameters, parts", [
    (dict(launcher="slurm"), ["launcher", "'slurm'", "ray"]), (dict(launcher="", address="auto"), ["address", "'auto'", "launcher ray"]), (dict(launcher="local", address="auto"), ["address", "launcher ray"]),
    (dict(device="cuda:1"), ["device", "'cuda:1'", "launcher ray"]), (dict(device="mps"), ["device", "'mps'"])])
def test_parameters_that_do_not_go_together(parameters, parts, tmp_path):
    said = sentence(planned, tmp_path/"outputs", **parameters)
    assert all(part in said for part in parts)


def test_no_cluster_at_an_address(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_jobs, "PATIENCE", 20.)
    monkeypatch.setattr("ray.is_initialized", lambda: False)   # other tests have joined one
    began = time.monotonic()
    said = sentence(execute, planned(tmp_path/"outputs", address="127.0.0.1:1"), lambda line: None)
    assert re.match(r"address is '127.0.0.1:1', where no Ray cluster could be joined \(.+\); write auto ", said) and time.monotonic() - began < 60
    assert not list(tmp_path.iterdir())


def test_a_cluster_without_a_gpu(ray, tmp_path):
    if any(n["Resources"].get("GPU") for n in ray.nodes()): pytest.skip("this machine has a GPU")
    said = sentence(on_ray, [Job(Long())], "", "cuda", tmp_path/"outputs")
    assert said.startswith("device is 'cuda', but no machine of the Ray cluster has a GPU;") and not list(tmp_path.iterdir())


def test_a_cluster_of_small_machines(ray):
    assert "no machine of the cluster has the 1000 CPUs" in sentence(machines, ray, "cpu", 1000)


def test_a_gpu_that_the_workers_pytorch_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "does not see the GPU" in sentence(ray_jobs._work, None, 1, "cuda", tmp_path, None)


def test_a_folder_that_is_not_shared(ray, tmp_path):
    "Through a descriptor of this process, which means nothing in another one."
    here = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        folder = Path(f"/proc/self/fd/{os.dup2(here, 700)}")/"outputs"
        said = sentence(execute, planned(folder), lambda line: None)
        assert said.startswith(f"outputs is '{folder}/runs', which the machine ") and "choose a folder that all machines share" in said
    finally:
        os.close(here)
        os.close(700)
    assert not list(tmp_path.iterdir())


def test_a_machine_that_comes_later_and_does_not_see_the_folder(tmp_path):
    said = sentence(ray_jobs._work, None, 1, "cpu", tmp_path/"elsewhere", None)
    assert "outputs is" in said and not (tmp_path/"elsewhere").exists()


def test_another_version_over_there(tmp_path):
    sent = ray_jobs.Sent(pickle.dumps(Job(Long(), specs=(1,))), "f00", {}, ())
    assert "another version" in sentence(ray_jobs._work, sent, 1, "cpu", tmp_path, None)


def test_a_module_that_is_not_over_there(tmp_path, monkeypatch):
    (tmp_path/"mine_alone.py").write_text("def work(tell): pass")
    with monkeypatch.context() as m:
        m.syspath_prepend(tmp_path)
        sent = ray_jobs.Sent(pickle.dumps(Job(importlib.import_module("mine_alone").work)), "", {}, ())
    m.delitem(sys.modules, "mine_alone")
    assert "cannot import mine_alone (No module named 'mine_alone'); install it there" in sentence(ray_jobs._work, sent, 1, "cpu", tmp_path, None)


# A notebook

def test_an_interrupted_notebook_is_one_sentence_and_its_lines_are_logged(tmp_path):
    told = SIZE | dict(rows="DAAT", columns="clean", epochs=400, launcher="ray")
    command = [sys.executable, "-m", "papermill", ROOT/"nbs"/"table1_daat.ipynb", "out.ipynb", "--no-progress-bar", "--log-output", *(part for k, v in told.items() for part in ("-p", k, str(v)))]
    papermill = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(tmp_path.glob("outputs/runs/*/history.csv")) and papermill.poll() is None: time.sleep(0.05)
    time.sleep(1.)
    kernel, = [p for p in psutil.Process(papermill.pid).children() if "ipykernel" in " ".join(p.cmdline())]
    below = kernel.children(recursive=True)
    kernel.send_signal(signal.SIGINT)
    said = papermill.communicate(timeout=120)[0]
    assert papermill.returncode != 0
    assert re.search(r"DAAT: epoch +1/400", said) and "stopped; run the same command again, digits-" in said
    assert said.rstrip().endswith("stopped; run the same command again, it goes on from there")
    assert below and not psutil.wait_procs(below, 20)[1]   # Ray ends with the notebook

"Several processes train one run as one process would: the same weights to rounding, one store, any number of processes after an interruption."
import copy, multiprocessing, os, re, signal, socket, sys, threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import psutil
import pytest
import torch

from adaptive_at.data import datasets
from adaptive_at.jobs import distributed
from adaptive_at.tables import plan as plans
from adaptive_at.__main__ import main
from adaptive_at.attacks import PGD
from adaptive_at.algorithms.cat import cat_v2
from adaptive_at.base.identity import foreign_modules, from_spec, spec_hash, to_spec
from adaptive_at.base.files import write_json
from adaptive_at.algorithms.iaat import iaat, imagenet_iaat, mixup_at
from adaptive_at.algorithms.baselines import Training, at, mart
from adaptive_at.algorithms.daat import daat
from adaptive_at.radius import DAAT
from adaptive_at.networks import MNISTCNN, NarrowResNet
from adaptive_at.jobs.distributed import DDPTeam, check_processes, launched, why_not_distributed
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.papers.table3_iaat import TABLE as IMAGENET
from adaptive_at.radius import RadiusRule
from adaptive_at.store.runs import Store
from adaptive_at.jobs.interrupts import Stopped
from adaptive_at.tables.results import run as run_table
from adaptive_at.training import Monitor, Run, State, train
from adaptive_at.awp import AWP
from helpers import digits
from test_datasets import refused
from test_imagenet import root  # noqa: F401 - a tiny ImageNet

EPS = 0.25
SMALL = MNISTCNN(filters=(8, 16), hidden=32)   # no batch norm


def spec(method, network=SMALL, epochs=2, examples=201, batch=25, **changes):
    "201 examples in batches of 25: shares of 13 and 12, and a last batch of one image, of which the second process has nothing."
    return Run("digits", digits().info.identity, network, method, Training(epochs=epochs, batch=batch, lr=0.2), Monitor(PGD(EPS / 4, 2), EPS, examples=40, select="val"), train_examples=examples, **changes)


RUNS = {
    "at": spec(at(EPS, steps=3)),
    "daat": spec(daat(EPS, rho=0.005, steps=3)),
    "iaat": spec(iaat(EPS, warmup=66), epochs=3),   # of 200: one of the three epochs
    "mart, joint, awp, dropout": spec(replace(mart(EPS, DAAT(EPS, rho=0.005, calibration="joint"), steps=3), weights=AWP(0.01, 0.01)), replace(SMALL, dropout=0.3)),
    "cat": spec(cat_v2(EPS)),              # its hinge is a sum over the batch
}


# Processes, as torchrun starts them

CONTEXT = multiprocessing.get_context("forkserver")   # children of one process that has imported all
CONTEXT.set_forkserver_preload("adaptive_at.__main__ adaptive_at.papers.table1_daat adaptive_at.store.audit sklearn.datasets torch._dynamo pytest".split())


def work(rank, size, port, log, arguments, before):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    torch.set_num_threads(1)
    if before: before(rank)
    sys.exit(main(arguments))


def job(run, folder, size=2, before=None):
    "Train with `size` processes into `folder`; their exit codes, and what they said."
    write_json(path := folder/f"{run.id}.json", {"run": to_spec(run)})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = ["train", str(path), "--outputs", str(folder), "--data-root", str(folder), "--device", "cpu", *(word for module in foreign_modules(to_spec(run)) for word in ("--allow", module))]
    log = folder/"log"
    log.unlink(missing_ok=True)
    processes = [CONTEXT.Process(target=work, args=(rank, size, port, str(log), arguments, before)) for rank in range(size)]
    for p in processes: p.start()
    for p in processes: p.join(100)
    return [p.exitcode for p in processes], log.read_text() if log.exists() else ""


def state_of(run, folder):
    "The last state that a store holds."
    return torch.load(Store(folder/"runs").folder(run)/"last.pt", weights_only=True)


def one_process(run, states=None):
    return train(run, digits(), State(run, digits()), lambda s: states is not None and states.append(copy.deepcopy(s.state_dict())), lambda line: None).state_dict()


def equal(found, expected, run):
    "Weights, momentum, radii and everything measured; and the weights have moved by far more than they may differ."
    new = State(run, digits()).state_dict()
    assert max(float((new["model"][k] - w).abs().max()) for k, w in expected["model"].items()) > 1e-2
    for k, w in expected["model"].items(): assert torch.allclose(found["model"][k], w, rtol=0, atol=1e-5), k
    for k in ("eps", "used", "realised"): assert torch.allclose(found["bank"][k], expected["bank"][k], rtol=0, atol=1e-5), k
    if "head" in expected["bank"]:
        for k, w in expected["bank"]["head"].items(): assert torch.allclose(found["bank"]["head"][k], w, rtol=0, atol=1e-5)
    for a, b in zip(found["history"], expected["history"], strict=True):
        for k in b: assert k == "seconds" or a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-5), k


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(name, tmp_path):
    run = RUNS[name]
    codes, said = job(run, tmp_path)
    assert codes == [0, 0], said
    expected = one_process(run)
    equal(state_of(run, tmp_path), expected, run)
    store = Store(tmp_path/"runs")
    assert store.finished(run) and said.count("epoch") == run.training.epochs   # one process speaks
    assert np.allclose(store.radius(run)["eps"], expected["bank"]["eps"], atol=1e-5) and store.facts(run)["made with"][-1]["processes"] == 2 and "batch norm" not in store.facts(run)["made with"][-1]
    if name in ("daat", "iaat", "cat"): assert len(expected["bank"]["eps"].unique()) > 1   # there is something to share


def test_a_last_batch_of_one_image_joins_the_one_before_where_batch_norm_needs_two(tmp_path):
    whole, alone = (spec(at(EPS, steps=1), NarrowResNet(width_factor=4, strides=(2, 2, 2)), epochs=1, examples=n, batch=4) for n in (9, 10))
    codes, said = job(whole, tmp_path)
    assert codes == [0, 0] and Store(tmp_path/"runs").finished(whole), said   # 2 and 2 images, then 3 and 2
    codes, said = job(alone, tmp_path)
    assert codes != [0, 0] and "cannot be trained on a single image" in said and "Traceback" not in said, said   # at last 1 and 1


# Interrupted

def stopping(rank):
    "The second process, and only it, is asked to stop, after its fifth batch."
    if rank == 0: return
    asked = iter(range(10**6))
    @contextmanager
    def soon(): yield lambda: next(asked) >= 4
    distributed.defer_interrupt = soon


@pytest.mark.parametrize("name", ["daat", "iaat"])
def test_stopped_inside_an_epoch_and_resumed_by_one_process(name, tmp_path):
    run = RUNS[name]
    codes, said = job(run, tmp_path, before=stopping)
    assert codes == [1, 1] and said.count("adaptive_at: ") == 1, said
    assert said.strip().splitlines()[-1] == f"adaptive_at: stopped; run the same command again, {run.slug}-{run.id} goes on after batch 5 of epoch 1 of {run.training.epochs}"
    told = []
    assert Store(tmp_path/"runs").train(run, digits(), report_line=told.append) and told[0] == f"continuing after batch 5 of epoch 1 of {run.training.epochs}"
    equal(state_of(run, tmp_path), one_process(run), run)
    assert ["processes" in made for made in Store(tmp_path/"runs").facts(run)["made with"]] == [True, False]


def test_begun_by_one_process_and_resumed_by_three(tmp_path, monkeypatch):
    run, epochs = RUNS["daat"], []
    expected = one_process(run, epochs)
    store, save = Store(tmp_path/"runs"), Store._save
    def stop(self, run, state, *rest):
        save(self, run, state, *rest)
        raise KeyboardInterrupt
    monkeypatch.setattr(Store, "_save", stop)
    with pytest.raises(KeyboardInterrupt): store.train(run, digits(), report_line=lambda line: None)
    codes, said = job(run, tmp_path, size=3)
    assert codes == [0, 0, 0] and said.startswith("continuing after epoch 1 of 2"), said
    equal(state_of(run, tmp_path), expected, run)
    again = job(run, tmp_path)
    assert again == ([0, 0], "")   # nothing left to train


def left_over():
    "Processes of a job that do not end within ten seconds."
    def of_job(p):
        with suppress(psutil.Error): return "adaptive_at" in p.cmdline()   # else it has ended
    return psutil.wait_procs(filter(of_job, psutil.Process().children(recursive=True)), timeout=10)[1]


def test_a_process_that_dies_ends_the_job_with_a_sentence_and_a_good_checkpoint(tmp_path):
    "With torchrun itself. The other process says what happened, once, and the run goes on from the last epoch."
    run, told = spec(at(EPS), examples=1000, epochs=4), []
    def report_line(line):
        told.append(line)
        if len(told) == 1:
            second, = [p for p in psutil.Process().children(recursive=True) if p.environ().get("RANK") == "1"]
            second.kill()
    text = refused(launched, run, 2, "digits", tmp_path, tmp_path, "cpu", report_line)
    name = f"{run.slug}-{run.id}"
    assert re.fullmatch(rf"process 1: its process was ended by SIGKILL, as the system does when memory runs out; (another process of this job has ended|the job was told to end, or one of its processes has ended); run the same command again, {name} goes on after epoch [1-3] of 4\.", text), text
    assert not left_over()
    told = []
    launched(run, 2, "digits", tmp_path, tmp_path, "cpu", told.append)
    assert re.match("continuing after epoch [1-3] of 4", told[0])
    codes, said = job(run, undisturbed := tmp_path/"undisturbed")
    assert codes == [0, 0], said
    found, expected = state_of(run, tmp_path), state_of(run, undisturbed)
    assert all(torch.equal(found["model"][k], w) for k, w in expected["model"].items())   # to the bit: so long a run shows one sign of a gradient that rounding has turned


def test_ctrl_c_stops_a_job_of_torchrun_after_a_step(tmp_path):
    "In a notebook or a terminal the signal reaches this process alone; the job saves, says so, and is gone."
    run, told = spec(at(EPS), examples=1000, epochs=30), []
    def report_line(line):
        told.append(line)
        if len(told) == 1: threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(Stopped) as stopped: launched(run, 2, "digits", tmp_path, tmp_path, "cpu", report_line)
    name = f"{run.slug}-{run.id}"
    assert re.fullmatch(rf"stopped; run the same command again, {name} goes on after (batch \d+ of epoch|epoch) \d+ of 30", str(stopped.value))
    assert not [p for p in psutil.Process().children(recursive=True) if str(tmp_path) in " ".join(p.cmdline())]
    reached = max((torch.load(p, weights_only=True) for p in (tmp_path/"runs"/name).glob("*.pt") if p.stem in ("within", "last")), key=lambda s: (s["epoch"], s["batch"]))
    assert str(stopped.value).endswith(f"batch {reached['batch']} of epoch {reached['epoch'] + 1} of 30" if reached["batch"] else f"epoch {reached['epoch']} of 30")


# ImageNet

@pytest.mark.parametrize("processes", [0, 2])
def test_the_imagenet_table_runs_in_the_papers_preset(root, tmp_path, processes, monkeypatch):  # noqa: F811
    monkeypatch.setattr(plans, "measured_cost", lambda *args: plans.Cost(1e-3, 2e-3, 1e-3))   # on 128 images of this size: too much for a test
    results = run_table(IMAGENET, preset="paper", device="cpu", network="early", rows="IAAT", columns="natural", figures="none", epochs=2, train_examples=3, test_examples=2,
                        gpus_per_run=processes, data_root=str(root), outputs=str(tmp_path))
    (run,), = (block.runs["IAAT"] for block in results.plan.blocks)
    store = results.plan.store
    assert run.method == imagenet_iaat(half=True) and run.training.epochs == 2 and store.finished(run) and results.frame.value.notna().all()
    bank, made = store.radius(run), store.facts(run)["made with"][-1]
    assert (bank["used"] > 0).sum() == 3 and bank["used"][bank["used"] > 0].min() == pytest.approx(4/255)   # the lower bound
    assert made.get("processes", 1) == (processes or 1) and ("batch norm" in made) == (processes > 1)
    assert ("trained by 2 processes, and batch norm saw the share of one of them at a time" in results.frame.warning[0]) == (processes > 1)


def shares(size):
    "The members of a team that nobody has started."
    found = [object.__new__(DDPTeam) for _ in range(size)]
    for rank, team in enumerate(found): team.rank, team.size = rank, size
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
def test_processes_read_their_share_of_the_files_and_no_more(root, size, monkeypatch):  # noqa: F811
    monkeypatch.setattr(datasets, "loaders", lambda: 0)
    data, teams = datasets.load("imagenet", root), shares(size)
    whole = list(datasets.batches(data.train, 4, 1, datasets.ResizedCrop()))
    parts = [list(datasets.batches(data.train, 4, 1, datasets.ResizedCrop(), mine=team.part)) for team in teams]
    for batch, *own in zip(whole, *parts, strict=True):
        counted = [b for b, team in zip(own, teams) if team.places(len(batch.y)).stop > team.places(len(batch.y)).start]
        for field in ("x", "y", "index"): assert torch.equal(torch.cat([getattr(b, field) for b in counted]), getattr(batch, field))
        assert all(torch.equal(b.whole, batch.index) and b.size == len(batch.y) for b in own)
        assert all(len(b.y) == 1 for b in own if not any(b is c for c in counted))   # fewer images than processes: something to compute with


def test_cores_are_shared_by_the_readers_of_all_processes(monkeypatch):
    monkeypatch.setattr(datasets, "cores", lambda: 16)
    for processes, readers in ((1, 15), (2, 7), (8, 1), (16, 0), (64, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert datasets.loaders() == readers


# Specs, back

@pytest.mark.parametrize("name", RUNS)
def test_a_spec_says_all(name):
    run = RUNS[name]
    assert from_spec(to_spec(run)) == run and spec_hash(from_spec(to_spec(run))) == run.id


def test_a_spec_of_other_code_is_refused():
    told = to_spec(RUNS["daat"])
    told["method"]["radius"]["version"] = 7
    assert "another version" in refused(from_spec, told)
    assert "cannot import" in refused(from_spec, told | {"method": {"piece": "__main__.Method", "version": 1}})


# What is refused

@dataclass(frozen=True)
class Stray(RadiusRule):
    "Keeps for itself what the others would need."
    def after_step(self, bank, batch, x_adv, model): bank.eps[0] += 0.01 * batch.index[0]


def test_processes_that_no_longer_agree_do_not_go_on(tmp_path):
    run = spec(at(EPS, Stray(EPS), steps=1))
    codes, said = job(run, tmp_path)
    assert codes == [1, 1] and said == "adaptive_at: after epoch 1 the processes no longer hold the same weights and radii: a rule or network of this run keeps what they do not share; train it with one process.\n"


def test_a_loss_of_the_whole_batch_is_not_shared(tmp_path):
    run = spec(mixup_at(EPS))
    assert why_not_distributed(run).startswith("the loss of MixupCE needs all images of a batch at once") and not why_not_distributed(RUNS["cat"])
    codes, said = job(run, tmp_path)
    assert codes == [1, 1] and said == f"adaptive_at: {run.slug}-{run.id} cannot be trained by several processes: {why_not_distributed(run)}\n"


def test_a_table_trains_it_with_one_process_and_says_so(tmp_path, capsys):
    table = replace(TABLE, rows=lambda p: {"mixup": mixup_at(p.eps)})
    run_table(table, preset="quick", device="cpu", epochs=1, train_examples=50, test_examples=10, columns="natural", figures="none", gpus_per_run=2, outputs=str(tmp_path))
    assert "mixup: trained by one process, since the loss of MixupCE" in capsys.readouterr().out


@pytest.mark.parametrize("processes, device, parts", [
    (3, "cpu", ["gpus_per_run is 3", "2 cores", "choose 2 at most"]), (2, "cuda", ["gpus_per_run is 2", "0 CUDA devices"]), (2, "cuda:1", ["'cuda:1'", "CUDA_VISIBLE_DEVICES"]), (2, "mps", ["'mps'"])])
def test_more_processes_than_devices(processes, device, parts, monkeypatch):
    monkeypatch.setattr(distributed, "cores", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = refused(check_processes, "gpus_per_run", processes, device)
    assert all(part in text for part in parts) and text.count(".") == 1 + text.count(". "), text
    assert check_processes("gpus_per_run", 2, "cpu") == "cpu" and check_processes("gpus_per_run", 0, "cuda:1") == "cuda:1"


def test_a_table_refuses_before_any_work(tmp_path):
    text = refused(lambda: run_table(TABLE, preset="quick", device="cpu", gpus_per_run=999, outputs=str(tmp_path)))
    assert "gpus_per_run is 999" in text and not list(tmp_path.iterdir())


def test_the_train_command(tmp_path, capsys):
    run, store = spec(at(EPS, steps=1), epochs=1), Store(tmp_path/"runs")
    def told(*arguments): return main(["train", *map(str, arguments), "--outputs", str(tmp_path), "--data-root", str(tmp_path)]), *capsys.readouterr()
    write_json(tmp_path/"spec.json", {"run": to_spec(run)})
    assert told(tmp_path/"spec.json")[0] == 0 and store.finished(run)
    for name in (run.id, run.id[:5], store.folder(run), store.folder(run)/"spec.json"): assert told(name) == (0, "", "")
    write_json(tmp_path/"other.json", {"run": to_spec(replace(run, content="0" * 16))})
    write_json(tmp_path/"none.json", {"run": {}})
    for spoilt, says in (("0" * 12, "no run id"), ("zzz", "no run id"), (tmp_path/"other.json", "other data"), (tmp_path/"none.json", "not the spec of a run")):
        code, out, err = told(spoilt)
        assert code == 1 and not out and says in err and len(err.splitlines()) == 1, err

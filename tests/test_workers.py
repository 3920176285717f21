"Jobs in forked processes."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptive_at.base.errors import UserError
from adaptive_at.jobs.pool import run_jobs

ROOT = Path(__file__).resolve().parent.parent
AFTER_THREADS = """
import torch
from adaptive_at.jobs.pool import run_jobs
def work(tell):
    x = torch.rand(64, 3, 128, 128).to(memory_format=torch.channels_last) * 2  # large enough for several threads
    tell(f'{x.shape[0]} images, {torch.get_num_threads()} thread')
assert torch.get_num_threads() == 2
work(lambda line: None)  # the parent's OpenMP has its threads now, which no forked process has
said = []
run_jobs([work] * 3, 2, said.append)
print(said)
"""


def test_jobs_do_not_wait_for_threads_that_only_their_parent_has():
    "Where OMP_NUM_THREADS is not set, as on most people's machines, OpenMP in a forked process would wait for ever."
    ran = subprocess.run([sys.executable, "-c", AFTER_THREADS], env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == str(["64 images, 1 thread"] * 3), ran.stderr


def test_a_job_whose_process_dies_is_named_with_what_it_said_last():
    def dies(report_line):
        report_line("epoch 3 of 20")
        os.kill(os.getpid(), signal.SIGKILL)
    def waits(report_line): time.sleep(30)
    with pytest.raises(UserError, match=r"^training of DAAT: its process was ended by SIGKILL, as the system does when memory runs out, after it said 'epoch 3 of 20'; run the same command again, it goes on where it stopped\.$"):
        run_jobs([waits, dies], 2, lambda line: None, names=["training of AT", "training of DAAT"])
    with pytest.raises(UserError, match=r"^a job: its process ended with exit code 7; run"): run_jobs([lambda report_line: os._exit(7)] * 2, 2)
    with pytest.raises(UserError, match=r"^a job: its process ended with exit code 0; run"): run_jobs([lambda report_line: os._exit(0)] * 2, 2)   # no end of a job
    with pytest.raises(RuntimeError, match="(?s)^training of AT failed\n.*ZeroDivisionError"): run_jobs([lambda report_line: 1 / 0] * 2, 2, names=["training of AT"] * 2)   # a fault in the code keeps its traceback


def test_what_a_job_says_may_be_any_text():
    said = []
    run_jobs([lambda report_line: report_line("odd \udcff name")] * 2, 2, said.append)
    assert said == ["odd \\udcff name"] * 2


def test_the_jobs_of_a_table_have_names(tmp_path):
    from adaptive_at.tables import plan as plans, results as tables
    from adaptive_at.papers.table1_daat import TABLE
    from adaptive_at.tables.parameters import check_parameters
    plan = plans.Plan(TABLE, plans.open_session(check_parameters("table1_daat", dict(preset="quick", device="cpu", outputs=str(tmp_path), seeds=2, rows="Standard AT", columns="natural,PGD-20", figures="none"))))
    names = [job.name for job in tables._jobs(plan, True)]
    assert names == ["training of Standard AT", "training of Standard AT, seed 1", "evaluation of Standard AT (natural, PGD-20)", "evaluation of Standard AT, seed 1 (natural, PGD-20)"], names

"Jobs in forked processes."
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AFTER_THREADS = """
import torch
from adaptive_at.workers import side_by_side
def work(tell):
    x = torch.rand(64, 3, 128, 128).to(memory_format=torch.channels_last) * 2  # large enough for several threads
    tell(f'{x.shape[0]} images, {torch.get_num_threads()} thread')
assert torch.get_num_threads() == 2
work(lambda line: None)  # the parent's OpenMP has its threads now, which no forked process has
said = []
side_by_side([work] * 3, 2, said.append)
print(said)
"""


def test_jobs_do_not_wait_for_threads_that_only_their_parent_has():
    "Where OMP_NUM_THREADS is not set, as on most people's machines, OpenMP in a forked process would wait for ever."
    ran = subprocess.run([sys.executable, "-c", AFTER_THREADS], env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == str(["64 images, 1 thread"] * 3), ran.stderr

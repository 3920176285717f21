"One thread for everything the tests start, no display, Ctrl-C as in a terminal, and property tests that repeat exactly."
import os, signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it, and so would all that the tests start
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it

import matplotlib
import torch
from hypothesis import settings

torch.set_num_threads(1)
matplotlib.use("Agg")  # not by MPLBACKEND: notebook kernels would inherit it and show no figures

settings.register_profile("adaptive_at", deadline=None, derandomize=True)
settings.load_profile("adaptive_at")

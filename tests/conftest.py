"One thread for everything the tests start, no display, and property tests that repeat exactly."
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it

import matplotlib
import torch
from hypothesis import settings

torch.set_num_threads(1)
matplotlib.use("Agg")  # not by MPLBACKEND: notebook kernels would inherit it and show no figures

settings.register_profile("adaptive_at", deadline=None, derandomize=True)
settings.load_profile("adaptive_at")

"python -m tests.faults --kills 50: the whole campaign; the exit code says whether anything was lost or wrong."
import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch

torch.set_num_threads(1)

from . import damage, failures, kills, notebooks, writes   # noqa: E402
from .bench import tiny   # noqa: E402


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition(": ")[2])
    parser.add_argument("--kills", type=int, default=50, help="processes to kill (default 50)")
    parser.add_argument("--damages", type=int, default=len(damage.CASES), help=f"files to damage (default and at most {len(damage.CASES)})")
    parser.add_argument("--failures", type=int, default=len(failures.CASES),
                        help=f"files that fail for a while, for want of memory or permission, or by an error of the disk (default and at most {len(failures.CASES)})")
    parser.add_argument("--processes", type=int, default=4, help="that share an empty store (default 4)")
    parser.add_argument("--each", type=int, default=1, help="fail at every n-th write of a run; 0: at none (default 1)")
    parser.add_argument("--notebooks", action="store_true", help="also a bad value in every table notebook, through papermill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="only the figures")
    told = parser.parse_args(arguments)
    report_line = (lambda line: None) if told.quiet else lambda line: print(line, flush=True)
    wrong = []
    with tempfile.TemporaryDirectory() as folder, tiny():
        for name in ("kills", "damages", "failures", "shared", "contained", "writes"): (Path(folder)/name).mkdir()
        if told.kills:
            found = kills.campaign(Path(folder)/"kills", told.kills, told.seed, report_line=report_line)
            wrong += found.wrong + ["fewer kills landed than were asked for"] * (found.landed < told.kills)
            print(found, flush=True)
        if told.damages:
            cases = sorted(random.Random(told.seed).sample(damage.CASES, min(told.damages, len(damage.CASES))), key=damage.CASES.index)
            found = damage.campaign(Path(folder)/"damages", cases, told.seed, report_line)
            wrong += found.wrong
            print(found, flush=True)
        if told.failures:
            chosen = random.Random(told.seed).sample(failures.CASES, min(told.failures, len(failures.CASES)))
            cases = sorted(chosen, key=failures.CASES.index)
            found = failures.campaign(Path(folder)/"failures", cases, report_line)
            wrong += found.wrong
            print(found, flush=True)
        for name, called in (("shared", None), ("contained", 7)) if told.processes else ():
            problems, text = kills.shared(Path(folder)/name, told.processes, called=called)
            wrong += problems
            print("\n  ".join([text if not problems else f"{told.processes} processes{' with one process id' * bool(called)} on an empty store:", *problems]), flush=True)
        if told.each:
            found = writes.campaign(Path(folder)/"writes", told.each, report_line)
            wrong += found.wrong
            print(found, flush=True)
    if told.notebooks:
        problems = notebooks.campaign(report_line)
        wrong += problems
        print("\n  ".join([f"{len(notebooks.BAD)} notebooks with a bad value through papermill: {len(problems)} without a sentence and an exit code", *problems]))
    return int(bool(wrong))


if __name__ == "__main__": sys.exit(main())

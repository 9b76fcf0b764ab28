"""Kills runs with SIGKILL: `python killed_runs.py EXPERIMENT RUNS KILLS` in the folder of the five experiments.

One process imports everything and forks one for each start, so that a start takes a moment instead of ten seconds. What
is killed is a whole process group: the run and its workers, in the midst of whatever they do.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from five_experiments import last_ledger

from experiments.cli import main
from models.random import keyed_generator

STEPS = 40


def start(name: str, root: str) -> int:
    """Fork a process that begins the run, or goes on with it."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        torch.set_num_threads(1)
        words = [f"--run_root={root}", "--resume=auto", "--data.num_workers=2", f"--trainer.max_steps={STEPS}"]
        code = 1
        try:
            main(["fit", f"--config={name}.yaml", *words])
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def finish(child: int) -> None:
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("a run failed by itself")


def steps_done(root: str, name: str) -> int:
    runs = sorted(Path(root, name).glob("version_*/ledger.0.jsonl"))
    return last_ledger(runs[-1].parent)[-1][0] if runs and runs[-1].stat().st_size else -1


if __name__ == "__main__":
    name, runs, kills = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    began = time.monotonic()
    finish(start(name, "straight"))
    length = time.monotonic() - began
    for run in range(runs):
        root = f"killed{run}"
        for kill in range(kills):
            generator = keyed_generator(run, kill)
            # a step of this part of the run to wait for, and then a moment within what a step takes
            first = 3 + kill * (STEPS - 6) // kills
            step = first + int(torch.randint((STEPS - 6) // kills, (), generator=generator))
            child = start(name, root)
            while steps_done(root, name) < step:
                if os.waitpid(child, os.WNOHANG)[0]:
                    raise SystemExit("a run ended before it was killed")
                time.sleep(0.002)
            time.sleep(float(torch.rand((), generator=generator)) * length / STEPS)
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            print("killed at", steps_done(root, name), flush=True)
        finish(start(name, root))

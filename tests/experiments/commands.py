"""Runs the command lines of a JSON file one after the other: Lightning starts this script once more as rank 1."""

import json
import os
import sys
from pathlib import Path

import torch

from experiments.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for words in json.loads(Path(sys.argv[1]).read_text()):
        main(words)
        # the processes are there now: the next command joins them instead of starting its own
        os.environ.setdefault("LOCAL_RANK", "0")

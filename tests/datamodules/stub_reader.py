"""A reading process that is never done with files called `slow`, and dies of those called `deadly`."""

import os
import sys
import time
import types
from pathlib import Path

DATAMODULES = Path(__file__).resolve().parents[2] / "datamodules"

if __name__ == "__main__":
    package = types.ModuleType("datamodules")
    package.__path__ = [str(DATAMODULES)]
    sys.modules["datamodules"] = package
    from datamodules import reader

    original = reader._answers

    def answers(function, path, *args):
        if "slow" in path.name:
            time.sleep(1000)
        if "deadly" in path.name:
            os.abort()
        return original(function, path, *args)

    reader._answers = answers
    reader._serve()

"""Runs the code blocks of a page of the documentation, in the working directory and in this process."""

import re
import shlex
import sys
from pathlib import Path

from experiments.cli import ROOT, main

BLOCK = re.compile(r"^```(yaml|python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(name: str) -> list[str]:
    """Write the files, run the commands and the Python of `docs/<name>`; returns the kinds of the blocks.

    A block whose first line is `# <name of a file>` is that file. Python blocks share their names.
    """
    names: dict[str, object] = {}
    kinds = []
    for kind, content in BLOCK.findall((ROOT / "docs" / name).read_text()):
        kinds.append(kind)
        file = re.match(r"# (\S+\.(?:yaml|py))\n", content)
        if file:
            Path(file[1]).write_text(content)
        elif kind == "python":
            exec(compile(content, name, "exec"), names)
        else:
            for line in content.replace("\\\n", " ").splitlines():
                if line == "export PYTHONPATH=.":
                    sys.path.insert(0, str(Path.cwd()))
                    continue
                program, *words = shlex.split(line)
                assert program == "longtake"
                main(words)
    return kinds

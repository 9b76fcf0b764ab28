"""What the commands say: help that names defaults, and what was typed wrong, where, and what to type instead."""

import argparse
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable

# What jsonargparse says around the reason, for an option that may also be null: no news to who made the mistake.
_AROUND = re.compile(
    r"^\s*(- )?(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Expected a <class 'NoneType'>"
    r"|Given value type: .*|Given value: .*)$"
)
_CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds defaults to the help of options, but of switches and of those whose help says what None means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False  # not 0
        says_it = not action.option_strings or nothing or action.default in (argparse.SUPPRESS, [])
        return action.help if says_it else f"{action.help} (default: %(default)s)"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint to append to a message, with a space before it, or nothing if no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f" Did you mean {near[0]}?" if near else ""


def shortened(message: str) -> str:
    """A parser's message without the lines that tell no reason, on as few lines as it has reasons."""
    lines: list[str] = []
    for line in message.splitlines():
        if _AROUND.match(line):
            continue
        text = _CLASS.sub(r"\1", line.replace("typing.", "")).strip().removeprefix("- ")
        if lines and lines[-1].endswith(":"):
            lines[-1] += f" {text}"
        else:
            lines.append(text)
    given = re.search(r"^\s*Given value: ([\w.+-]{1,40})$", message, re.MULTILINE)
    if given and "Got value" not in message:  # one of several types: none of them says what came
        lines.append(f"Given: {given[1]}")
    return "\n  ".join(lines).removesuffix(":").rstrip(".") + "."


def options_of(class_path: str) -> list[str]:
    """Names of the arguments of a class, as the command line knows them."""
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)

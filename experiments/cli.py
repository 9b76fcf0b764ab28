"""The console command `longtake`: small commands run at once, the rest imports Lightning first (about ten seconds)."""

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.messages import did_you_mean

ROOT = Path(__file__).resolve().parent.parent

LIGHTNING_COMMANDS = {
    "fit": "train an experiment",
    "validate": "compute the validation numbers of a checkpoint",
    "tokenize": "run a tokenizer over a data set once, and keep the codes",
    "sample": "generate videos from a checkpoint: mp4 files and a contact sheet",
    "evaluate": "score a checkpoint under a named protocol: results.json, a table's row, a contact sheet",
}


def _export(args: Sequence[str]) -> None:
    from experiments.export import main

    main(args)


def _cache_frames(args: Sequence[str]) -> None:
    from experiments.cache_frames import main

    main(args)


def _compare(args: Sequence[str]) -> None:
    from experiments.compare import main

    main(args)


def _report(args: Sequence[str]) -> None:
    from experiments.report import main

    main(args)


def _import_weights(args: Sequence[str]) -> None:
    from experiments.import_weights import main

    main(args)


def _demo(args: Sequence[str]) -> None:
    from experiments.demo import main

    main(args)


def _cascade(args: Sequence[str]) -> None:
    from experiments.cascade import main

    main(args)


def _tasks(args: Sequence[str]) -> None:
    from experiments.task_sheet import main

    main(args)


def _doctor(args: Sequence[str]) -> None:
    from experiments.doctor import main

    main(args)


def _plan(args: Sequence[str]) -> None:
    from experiments.plan import main

    main(args)


SMALL_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "export": ("turn a tokenizer's checkpoint into a bundle: safetensors and JSON", _export),
    "cache-frames": ("decode the videos of a data set once, at training size", _cache_frames),
    "compare": ("one table and one plot of evaluations under one protocol", _compare),
    "report": ("runs on one page: curves, samples, scores, and what made them", _report),
    "doctor": ("what a data set holds, what of it can be used, what is wrong with it", _doctor),
    "plan": ("what an experiment costs: parameters, FLOPs, memory, hours, disk", _plan),
    "import-weights": ("turn what TATS or MeBT has released into bundles", _import_weights),
    "cascade": ("videos from a base model and its super-resolution stages (W.A.L.T)", _cascade),
    "tasks": ("COMMIT's ten tasks on one sheet, and what a checkpoint makes of them", _tasks),
    "demo": ("embedded video, tokenizer, prior, samples and numbers, on a CPU", _demo),
}


def overview() -> str:
    """What `longtake --help` prints."""
    commands = LIGHTNING_COMMANDS | {name: text for name, (text, _) in SMALL_COMMANDS.items()}
    lines = [f"  {name:<16}{text}" for name, text in commands.items()]
    return "\n".join(["usage: longtake COMMAND ... (longtake COMMAND --help lists its options)", "", *lines])


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: The command and its options; None takes those of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(overview())
    elif args[0] in SMALL_COMMANDS:
        SMALL_COMMANDS[args[0]][1](args[1:])
    elif args[0] in LIGHTNING_COMMANDS:
        from experiments.lightning_cli import run

        run(args)
    else:
        hint = did_you_mean(args[0], [*LIGHTNING_COMMANDS, *SMALL_COMMANDS])
        raise SystemExit(f"longtake: error: there is no command {args[0]!r}.{hint}\n{overview()}")


def console(args: Sequence[str] | None = None) -> None:
    """Entry of the console command: errors that are for the user are one message, not a traceback, and exit status 1.

    Args:
        args: The command and its options; None takes those of the process. `--debug` among them shows tracebacks.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        main([word for word in words if word != "--debug"])
    except Exception as error:
        if "--debug" in words or not is_for_the_user(error):
            raise
        reason = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}. Give another place, or change what lies there."
        raise SystemExit(f"longtake: error: {reason}\n(--debug shows where it was raised.)") from None


def is_for_the_user(error: Exception) -> bool:
    """Whether an error says what the user can change: ours do, and those of files and of Lightning's settings."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_ours = ROOT in raised_in.parents and ".venv" not in raised_in.parts
    # torch raises the errors of worker processes again: then it is the class that tells
    is_ours |= type(error).__module__.startswith("datamodules.")
    is_of_a_file = isinstance(error, OSError) and error.filename is not None
    is_of_a_setting = type(error).__name__ == "MisconfigurationException"  # its import would take seconds
    return is_of_a_setting or is_of_a_file or (is_ours and isinstance(error, ValueError | OSError))


if __name__ == "__main__":  # `torchrun -m experiments.cli`
    console()

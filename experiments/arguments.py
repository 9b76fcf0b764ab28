"""What happens to the arguments of a command before LightningCLI sees them.

- `base: parent.yaml` in an experiment file names its parent; a file holds only what differs.
- A value given for a key that is linked to another is refused. LightningCLI would drop it without a word.
- `--resume RUN` becomes a run's configuration, newest checkpoint and folder. `--resume auto` finds the run by the
  experiment's name and begins one if there is none, `must` insists that there is one.
- `--bundle FOLDER` becomes the experiment, the tokenizer and the weights that lie in it.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from lightning.pytorch.utilities import rank_zero_info

from experiments.messages import did_you_mean
from experiments.runs import newest_checkpoint, newest_run

# A value is written once: the source decides the target, for every class that has such an argument.
LINKS = (
    ("data.init_args.num_frames", "model.init_args.num_frames"),
    ("data.init_args.resolution", "model.init_args.resolution"),
    ("seed_everything", "data.init_args.seed"),
    ("seed_everything", "model.init_args.seed"),
)


def expanded_configs(path: Path, children: tuple[Path, ...] = ()) -> list[Path]:
    """The file itself, preceded by the files that its `base` key names, the oldest first."""
    path = path.resolve()
    if path in children:
        raise ValueError("`base` goes in a circle: " + " -> ".join(str(p) for p in (*children, path)))
    if not path.is_file():
        asked_by = f" (the base of {children[-1]})" if children else ""
        known = [file.name for file in path.parent.glob("*.yaml")]
        raise FileNotFoundError(f"No experiment file {path}{asked_by}.{did_you_mean(path.name, known)}")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no experiment: expected keys such as `model:` and `data:`.")
    base = content.get("base") or []
    parents = [base] if isinstance(base, str) else base
    return [file for parent in parents for file in expanded_configs(path.parent / parent, (*children, path))] + [path]


def option_values(args: Sequence[str], name: str) -> list[tuple[int, int, str]]:
    """Occurrences of `--name VALUE` and `--name=VALUE`: first position, number of words, value."""
    found = []
    for i, word in enumerate(args):
        if word == f"--{name}" and i + 1 < len(args):
            found.append((i, 2, args[i + 1]))
        elif word.startswith(f"--{name}="):
            found.append((i, 1, word.split("=", 1)[1]))
    return found


def resumed(args: list[str]) -> list[str]:
    """Replace `--resume RUN` by the run's configuration, its newest checkpoint and its folder.

    `--resume auto` and `must` take the newest run of the experiment that has a checkpoint. The experiment is given as
    for a new run, and it counts: what differs in the model from the checkpoint is refused later.
    """
    for position, words, value in option_values(args, "resume"):
        rest = args[:position] + args[position + words :]
        if value in ("auto", "must", "never"):
            run_folder = None if value == "never" else newest_run(*run_place(rest))
            if run_folder is None and value == "must":
                root, name = run_place(rest)
                raise FileNotFoundError(
                    f"--resume must: no run of {name} in {root} has a checkpoint. --resume auto would begin one."
                )
            if run_folder is None:
                rank_zero_info("A new run begins.")
                return resumed(rest)
            config = []
        else:
            run_folder = Path(value)
            if len(run_folder.parts) < 3:  # named from within runs/ or deeper: its parents say what it is called
                run_folder = run_folder.resolve()
            config = [f"--config={run_folder / 'config.yaml'}"]
        newest = newest_checkpoint(run_folder)
        if not (run_folder / "config.yaml").is_file() or newest is None:
            raise FileNotFoundError(
                f"{run_folder} is no run to resume: expected config.yaml and checkpoints/*.ckpt in it "
                f"(--resume runs/<experiment>/version_<n>)."
            )
        args[position : position + words] = [
            *config,
            f"--ckpt_path={newest}",
            f"--run_root={run_folder.parent.parent}",
            f"--run_name={run_folder.parent.name}",
            f"--run_version={run_folder.name}",
        ]
        rank_zero_info(f"Resuming {run_folder} from {newest.name}.")
        return resumed(args)
    return args


def bundled(args: list[str]) -> list[str]:
    """Replace `--bundle FOLDER` by its experiment, its tokenizer and its weights.

    Raises:
        FileNotFoundError: If the folder is no generator's bundle.
    """
    for position, words, value in option_values(args, "bundle"):
        folder = Path(value)
        if not (folder / "experiment.yaml").is_file():
            raise FileNotFoundError(
                f"{folder} is no bundle of a generator: it holds no experiment.yaml (`longtake export` makes bundles)."
            )
        return [
            *args[:position],
            f"--config={folder / 'experiment.yaml'}",
            f"--model.tokenizer={folder / 'tokenizer'}",
            f"--ckpt_path={folder}",
            *args[position + words :],
        ]
    return args


def run_place(args: Sequence[str]) -> tuple[Path, str]:
    """Folder of all runs and name of this one, as the arguments and the experiment's files say.

    Raises:
        ValueError: If nothing says what the run is called.
    """
    chains = [expanded_configs(Path(value)) for _, _, value in option_values(args, "config")]
    files = [file for chain in chains for file in chain]
    place: dict[str, str] = {"run_root": "runs"} | ({"run_name": chains[0][-1].stem} if chains else {})
    for name in ("run_root", "run_name"):
        said = [(yaml.safe_load(file.read_text()) or {}).get(name) for file in files]
        said += [value for _, _, value in option_values(args, name)]
        if known := [value for value in said if value is not None]:
            place[name] = known[-1]
    if "run_name" not in place:
        raise ValueError("--resume auto looks for a run by its experiment: give --config experiments/<name>.yaml.")
    return Path(place["run_root"]), place["run_name"]


def refuse_linked_values(args: Sequence[str], files: Sequence[Path]) -> None:
    """Refuse a value for a key that follows another; LightningCLI would drop it without a word."""
    for source, target in LINKS:
        section, name = target.split(".")[0], target.rsplit(".", 1)[1]
        flag = f"--{source.replace('init_args.', '')}"
        for option in (target, f"{section}.{name}"):
            if option_values(args, option):
                raise ValueError(f"--{option} follows {flag} and cannot be given by itself. Give {flag}.")
        for file in files:
            values = (yaml.safe_load(file.read_text()) or {}).get(section)
            if isinstance(values, dict) and (name in values or name in (values.get("init_args") or {})):
                raise ValueError(f"{file} sets {section}: {name}, which follows {flag} and cannot be given by itself.")


def prepared(args: Sequence[str]) -> list[str]:
    """Expand `--resume`, `--bundle` and `base:`, refuse linked values, name the run after its first experiment file."""
    args = bundled(resumed(["--config" if word == "-c" else word for word in args]))
    out: list[str] = []
    files: list[Path] = []
    positions = {i: (words, value) for i, words, value in option_values(args, "config")}
    i = 0
    while i < len(args):
        words, value = positions.get(i, (1, ""))
        if value:
            chain = expanded_configs(Path(value))
            if not files and not option_values(args, "run_name"):
                out += [f"--run_name={chain[-1].stem}"]
            files += chain
            out += [f"--config={file}" for file in chain]
        else:
            out.append(args[i])
        i += words
    refuse_linked_values(args, files)
    return out

"""What the stages share around the model: configuration, the run folder with its logs, and the curves.

    defaults of a dataclass  <  --config FILE.yaml  <  --name value          load_config
    lock, train.log, metrics.jsonl, TensorBoard, curves.png                   Run
    which checkpoint does a run go on from?                                   find_resume

This module imports neither torch nor transformers at its top: a mistyped flag is answered at once.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def process_rank() -> tuple[int, int]:
    """(rank, number of processes) as torchrun sets them; (0, 1) for a plain python."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*args, **kwargs):
    """print on rank 0 alone."""
    if process_rank()[0] == 0:
        print(*args, **kwargs, flush=True)


class ConfigError(SystemExit):
    """Something that the user has to mend (flags, YAML, missing files): its text is on stderr, the exit code is 2."""

    def __init__(self, text: str):
        super().__init__(2)
        self.text = text

    def __str__(self):
        return self.text


def fail(problems: list[str], title: str = "nothing was started") -> typing.NoReturn:
    """Print all problems as one message on stderr and leave with exit code 2."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{Path(sys.argv[0]).name or 'drive-vlm'}: {count}, {title}:"]
    lines += ["  - " + problem.replace("\n", "\n    ") for problem in problems]
    text = "\n".join(lines)
    if process_rank()[0] != 0:
        time.sleep(3)  # rank 0 most likely says the same; torchrun then ends this process before it speaks
    print(text, file=sys.stderr, flush=True)
    raise ConfigError(text)


# ---- configuration ---------------------------------------------------------------------------------------------------


def opt(default, help):
    """A config field with one line of help; lists, dataclasses and factories become default factories."""
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: copy.deepcopy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class DataConfig:
    """Data and base models"""

    data: str = opt("data/captions.json", "captions: a JSON, JSONL or BDD-X CSV file, or a folder of them (see README)")
    video_root: str = opt("data/videos", "folder that the rows' video paths are relative to")
    output_dir: str = opt("output/run", "run folder: everything that this run writes")
    vision_model: str = opt("google/siglip2-so400m-patch14-384", "SigLIP-style tower: a folder or a hub name")
    language_model: str = opt("Qwen/Qwen3-4B-Instruct-2507", "causal LM with a chat template: a folder or a hub name")
    num_frames: int = opt(16, "frames read from each clip, first and last included")
    max_text_tokens: int = opt(1024, "limit for question + answer + end token; longer answers are cut at a sentence")
    num_val_videos: int = opt(40, "clips held out for evaluation, with all their entries")
    split_seed: int = opt(42, "decides which clips are held out; must be the same in all stages")
    seed: int = opt(42, "decides the order, caption variants, augmentation, new weights and sampled answers")
    dtype: typing.Literal["bfloat16", "float32"] = opt("bfloat16", "frozen weights and autocast; trained ones are fp32")
    default_mode: typing.Literal["microscope", "copilot"] | None = opt(None, "mode of rows whose question is not known")
    frame_cache: str | None = opt("output/frame_cache", "folder of decoded frames, shared by all runs; none = no cache")
    num_workers: int = opt(4, "processes that read clips; 0 = read in the training process")

    def problems(self) -> list[str]:
        """Values of the right type that cannot work, one line each."""
        found = [f"{key} must be at least {low}, got {getattr(self, key)}"
                 for key, low in (("num_frames", 1), ("max_text_tokens", 8), ("num_val_videos", 0), ("num_workers", 0))
                 if getattr(self, key) < low]
        return found


@dataclass
class TrainConfig(DataConfig):
    """Training"""

    init_from: str | None = opt(None, "run or checkpoint folder of the stage before")
    resume: str = opt("none", "none | auto (go on from the last checkpoint) | a checkpoint folder")
    epochs: int = opt(1, "passes over the training entries")
    max_steps: int | None = opt(None, "optimizer steps; overrides epochs")
    learning_rate: float = opt(1e-4, "peak learning rate")
    lr_schedule: typing.Literal["cosine", "linear", "constant"] = opt("cosine", "shape after the warm-up")
    warmup: float = opt(0.03, "share of the steps over which the learning rate rises from 0")
    weight_decay: float = opt(0.0, "for the projector's matrices; biases, temporal embeddings and LoRA have none")
    max_grad_norm: float = opt(1.0, "gradients are clipped to this norm")
    per_device_batch_size: int = opt(1, "clips in one forward pass of one process")
    gradient_accumulation_steps: int = opt(1, "forward passes per optimizer step")
    activation_checkpointing: bool = opt(True, "recompute activations in the backward pass to save memory")
    eval_every: int = opt(50, "steps between two losses on the held-out clips (and one at the end)")
    sample_every: int = opt(100, "steps between two sets of answers about three held-out clips")
    sample_tokens: int = opt(256, "longest of these answers, in tokens")
    save_every: int = opt(100, "steps between two checkpoints (and one at the end)")
    keep_checkpoints: int = opt(2, "newest checkpoints that are kept")
    max_failed_share: float = opt(0.01, "stop once more than this share of the clips could not be read")

    def problems(self) -> list[str]:
        positive = ("epochs", "learning_rate", "max_grad_norm", "per_device_batch_size", "gradient_accumulation_steps",
                    "eval_every", "sample_every", "sample_tokens", "save_every", "keep_checkpoints")
        found = [f"{key} must be above 0, got {getattr(self, key)}" for key in positive if not getattr(self, key) > 0]
        if self.max_steps is not None and self.max_steps < 1:
            found.append(f"max_steps must be above 0 or none, got {self.max_steps}")
        found += [f"{key} must lie between 0 and 1, got {getattr(self, key)}"
                  for key in ("warmup", "max_failed_share") if not 0 <= getattr(self, key) <= 1]
        return super().problems() + found


def _unwrap(hint) -> tuple[object, bool]:
    """(type without None, is None allowed?)"""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kept = [t for t in typing.get_args(hint) if t is not type(None)]
        return kept[0], len(kept) < len(typing.get_args(hint))
    return hint, False


def _describe(hint) -> str:
    """A type as a user reads it: 'a whole number', 'bfloat16 or float32'."""
    plain, optional = _unwrap(hint)
    if typing.get_origin(plain) is typing.Literal:
        text = " or ".join(str(value) for value in typing.get_args(plain))
    elif typing.get_origin(plain) is list:
        text = "a list"
    else:
        text = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(plain, str(plain))
    return text + " or none" if optional else text


def _fields(cls, prefix="") -> dict[str, tuple]:
    """{dotted key: (type, help, dataclass that it stands in)} of all leaves, nested dataclasses unfolded."""
    hints, leaves = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        owner = next(c for c in reversed(cls.__mro__) if f.name in getattr(c, "__annotations__", {}))
        if dataclasses.is_dataclass(hints[f.name]):
            leaves.update(_fields(hints[f.name], f"{prefix}{f.name}."))
        else:
            leaves[prefix + f.name] = (hints[f.name], f.metadata.get("help", ""), owner)
    return leaves


def _short_names(cls) -> dict[str, str]:
    """{"detector": "detector.weights"}: a plain value given for a nested dataclass sets its first field."""
    hints = typing.get_type_hints(cls)
    return {f.name: f"{f.name}.{dataclasses.fields(hints[f.name])[0].name}"
            for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])}


def _nearest(key, valid) -> str:
    initials = [name for name in valid if key == "".join(word[:1] for word in name.split("_"))]  # lr: learning_rate
    close = initials or difflib.get_close_matches(key, list(valid), n=1, cutoff=0.0)
    return f" (did you mean {close[0]!r}?)"


def _read_yaml(path: Path, problems: list[str]) -> dict:
    """The mapping in a YAML file; a problem line and {} if there is none."""
    import yaml
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except OSError:
        problems.append(f"config file {path} not found (relative paths start at {Path.cwd()})")
        return {}
    except yaml.YAMLError as error:
        problems.append(f"{path} is not valid YAML: {error}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path}: expected lines of 'key: value'")
        return {}
    return content


def _flatten(tree: dict, nested: dict[str, str], prefix="") -> dict[str, object]:
    """{"detector": {"weights": "x"}} or {"detector": "x"} -> {"detector.weights": "x"}."""
    flat = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(_flatten(value, nested, dotted + "."))
        else:
            flat[nested.get(dotted, dotted)] = value
    return flat


def _assign(config, values: dict, where: str, leaves: dict, skip, problems: list[str]):
    """Put `values` into the OmegaConf object, which checks the types; unknown keys and wrong types become problems."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ValidationError

    mark = "--" if where == "command line" else ""
    for key, value in values.items():
        if key.split(".")[0] in skip and key not in leaves:
            continue
        if key not in leaves:
            problems.append(f"{where}: unknown key {mark}{key}{_nearest(key, leaves)}")
            continue
        hint = leaves[key][0]
        if mark and _unwrap(hint)[1] and str(value).lower() in ("none", "null"):
            value = None
        try:
            OmegaConf.update(config, key, value)
        except ValidationError:
            problems.append(f"{where}: {mark}{key} must be {_describe(hint)}, got {value!r}")


def _parse_flags(argv: list[str], leaves: dict, nested: dict, problems: list[str]) -> tuple[dict, list[str]]:
    """({dotted key: text or list}, unknown arguments); a flag may be spelt with - or _."""
    spelt = []
    for arg in argv:
        name, equals, value = arg.partition("=")
        spelt.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if arg.startswith("--") else arg)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for key, (hint, _, _) in leaves.items():
        kind = _unwrap(hint)[0]
        if kind is bool:
            parser.add_argument("--" + key, dest=key, nargs="?", const="true", default=argparse.SUPPRESS)
        elif typing.get_origin(kind) is list:
            parser.add_argument("--" + key, dest=key, nargs="+", default=argparse.SUPPRESS)
        else:
            parser.add_argument("--" + key, dest=key, default=argparse.SUPPRESS)
    for short, key in nested.items():
        parser.add_argument("--" + short, dest=key, default=argparse.SUPPRESS)
    parser.add_argument("--config", default=argparse.SUPPRESS)
    try:
        known, unknown = parser.parse_known_args(spelt)
    except argparse.ArgumentError as error:
        problems.append(f"command line: {str(error).removeprefix('argument ')}")
        return {}, []
    return vars(known), unknown


def _title(cls) -> str:
    """First line of the docstring; the name where dataclass() wrote the docstring."""
    doc = (cls.__doc__ or "").strip()
    return cls.__name__ if not doc or doc.startswith(cls.__name__ + "(") else doc.splitlines()[0].rstrip(".:")


def _print_help(description, config, leaves, default_config):
    """One line a field, grouped by the dataclass it stands in, with the value that holds without further flags."""
    from omegaconf import OmegaConf

    print((description or "").strip())
    print(f"\n  {'--config FILE':38} YAML file with the keys below; flags override it [{default_config}]")
    group = None
    for key, (hint, text, owner) in leaves.items():
        if owner is not group:
            group = owner
            print(f"\n{_title(owner)}:")
        plain = _unwrap(hint)[0]
        kind = "" if typing.get_origin(plain) else plain.__name__.upper()
        if typing.get_origin(plain) is typing.Literal:
            kind = "|".join(typing.get_args(plain))
        value = OmegaConf.select(config, key)
        shown = " ".join(map(str, value)) or "none" if OmegaConf.is_list(value) else "none" if value is None else value
        print(f"  {f'--{key} {kind}'.strip():38} {text} [{shown}]")


def load_config(cls, argv=None, *, default_config=None, also=(), description=None):
    """An instance of the dataclass `cls`: its defaults < the YAML file (`--config`) < flags (`--name value`).

    `default_config` is a path relative to the repository. Keys that only the dataclasses in `also` know may stand in
    the same YAML file and are left alone. A method `cls.problems() -> list[str]` adds checks of the values.
    All problems come in one message on stderr with exit code 2 (ConfigError); `--help` lists every key.
    """
    from omegaconf import OmegaConf

    argv = sys.argv[1:] if argv is None else [str(arg) for arg in argv]
    leaves, nested, problems = _fields(cls), _short_names(cls), []
    flags, unknown = _parse_flags([a for a in argv if a not in ("-h", "--help")], leaves, nested, problems)
    skip = {key.split(".")[0] for other in also for key in _fields(other)}

    config = OmegaConf.structured(cls)
    path = flags.pop("config", None) or (ROOT / default_config if default_config else None)
    if path is not None:
        path = Path(os.path.relpath(path)) if Path(path).is_relative_to(Path.cwd()) else Path(path)
        _assign(config, _flatten(_read_yaml(path, problems), nested), str(path), leaves, skip, problems)
    if "-h" in argv or "--help" in argv:
        _print_help(description, config, leaves, default_config)
        raise SystemExit(0)
    _assign(config, flags, "command line", leaves, (), problems)
    for before, arg in zip(["", *unknown], unknown, strict=False):
        if arg.startswith("--"):
            name = arg.partition("=")[0]
            problems.append(f"command line: unknown flag {name}{_nearest(name[2:], [*leaves, *nested, 'config'])}")
        elif not before.startswith("--"):  # else it is the unknown flag's value
            problems.append(f"command line: {arg!r} belongs to no flag")
    if not problems:
        result = OmegaConf.to_object(config)
        problems += result.problems() if hasattr(result, "problems") else []
    if problems:
        fail(problems)
    return result


# ---- inputs ----------------------------------------------------------------------------------------------------------


def git_commit() -> str:
    """The commit of this checkout, with '+changes' where tracked files differ; 'unknown' outside git."""

    def git(*args):
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def model_problem(key: str, name: str) -> str | None:
    """What is wrong with a base model's folder or hub name, as far as the disk can tell."""
    folder = Path(name)
    if folder.is_dir():
        return None if (folder / "config.json").is_file() else f"{key}: {name} holds no config.json"
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1 or folder.parent.is_dir():
        return f"{key}: no folder {name}"
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        return f"{key}: {name} is not on this machine and HF_HUB_OFFLINE forbids to download it"
    return None


def _init_problems(config, stage: int) -> list[str]:
    """Does `init_from` hold the result of the stage before, of the same frames and base models?"""
    before = stage - 1
    if stage == 1:
        return ["init_from: stage 1 starts from the base models and takes none"] if config.init_from else []
    if not config.init_from:
        return [f"init_from: stage {stage} starts from stage {before}'s run folder: --init_from output/stage{before}"]
    folders = [Path(config.init_from), Path(config.init_from) / "model"]
    meta = next((f / "drivevlm.json" for f in folders if (f / "drivevlm.json").is_file()), None)
    if meta is None:
        return [f"init_from: no drivevlm.json in {folders[0]} or {folders[1]} (has stage {before} finished?)"]
    content = json.loads(meta.read_text(encoding="utf-8"))
    if content["stage"] != before:
        return [f"init_from: {meta.parent} is of stage {content['stage']}; stage {stage} starts from stage {before}"]
    found = []
    if content["num_frames"] != config.num_frames:
        found.append(f"num_frames: {config.num_frames}, but {meta.parent} was trained with {content['num_frames']}")
    for key in ("vision_model", "language_model"):
        old, new = content[key]["name"], getattr(config, key)
        moved = Path(old).is_absolute() and not Path(old).exists()  # then the new name says where it lies now
        if Path(old).resolve() != Path(new).resolve() and not moved:
            found.append(f"{key}: {new}, but {meta.parent} was trained with {old}")
    return found


def _entry_problems(config, entries, modes) -> list[str]:
    """Modes that are missing, too few clips for the split, clips that are not there."""
    from dataset import DataError, resolve_video

    found, paths = [], {}
    missing_modes = set(modes) - {entry.mode for entry in entries}
    if missing_modes:
        found.append(f"data: {config.data} has no {' and no '.join(sorted(missing_modes))} entries")
    for entry in entries:
        if entry.video not in paths:
            try:
                paths[entry.video] = resolve_video(config.video_root, entry.video)
            except DataError as error:
                found.append(f"data: {error}")
                paths[entry.video] = None
    if len(paths) <= config.num_val_videos:
        found.append(f"num_val_videos: {config.num_val_videos} of {len(paths)} clips held out leaves none to train on")
    missing = [str(path) for path in paths.values() if path is not None and not path.is_file()]
    if len(missing) > getattr(config, "max_failed_share", 0.0) * len(paths):
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        found.append(f"video_root: {len(missing)} of {len(paths)} clips are missing: {names}")
    return found


def check_inputs(config, *, stage=None, models=("vision_model", "language_model"), modes=(), read_entries=True,
                 more=()):
    """Everything that a run can miss, in one message before any model is loaded; returns the data file's entries.

    `stage` (1, 2, 3) adds the check of `init_from`; `modes` must all occur in the data; `read_entries=False` looks at
    paths alone and returns []; `more` are problems that the caller has found itself. ConfigError (exit 2) if any.
    """
    problems, entries = list(more), []
    problems += [p for key in models if (p := model_problem(key, getattr(config, key)))]
    problems += _init_problems(config, stage) if stage is not None else []
    has_videos = Path(config.video_root).is_dir()
    if not has_videos:
        problems.append(f"video_root: no folder {config.video_root} (the folder that the rows' paths start from)")
    if not Path(config.data).exists():
        problems.append(f"data: no file or folder {config.data} (one row a clip: "
                        '{"video": "a.mov", "microscope": ["..."], "copilot": ["..."]})')
    elif read_entries:
        from dataset import DataError, load_entries

        try:
            entries = load_entries(config.data, config.default_mode)
        except DataError as error:
            problems.append(f"data: {error}")
        problems += _entry_problems(config, entries, modes) if entries and has_videos else []
    if problems:
        fail(problems)
    return entries


# ---- the run folder --------------------------------------------------------------------------------------------------


def _write(path: Path, text: str):
    """Write a text file under a temporary name, then rename: a reader sees all of it or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Run:
    """One run folder, held by one run: rank 0 locks it at once and writes; on other ranks all calls do nothing.

        config.yaml  train.log  metrics.jsonl  curves.png  runs/ (TensorBoard)  checkpoints/step-000010/  model/

    Use as a context manager. A second run on the folder leaves with a ConfigError. `start` opens the logs, which lets
    find_resume refuse before anything in the folder has changed.
    """

    def __init__(self, folder):
        from filelock import FileLock, Timeout

        self.folder = Path(folder)
        self.checkpoints, self.model_folder = self.folder / "checkpoints", self.folder / "model"
        self.main = process_rank()[0] == 0
        self._row, self._writer, self._log = {}, None, None
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                fail([f"output_dir: another run is writing to {self.folder}; wait for it or give another --output_dir"])

    @property
    def finished(self) -> bool:
        """Is the stage's result there? `model/` is written last."""
        return (self.model_folder / "drivevlm.json").is_file()

    def start(self, config, step: int = 0):
        """Save the resolved config and open the logs; entries after `step`, the resumed checkpoint's, are dropped."""
        if not self.main:
            return
        from omegaconf import OmegaConf
        from torch.utils.tensorboard import SummaryWriter

        resolved = OmegaConf.to_yaml(OmegaConf.structured(config))
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        processes = process_rank()[1]
        _write(self.folder / "config.yaml", f"# {command}\n# commit {git_commit()}, processes {processes}\n{resolved}")
        metrics = self.folder / "metrics.jsonl"
        kept = [row for row in read_metrics(metrics) if row["step"] <= step]
        _write(metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self._log = open(self.folder / "train.log", "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._writer = SummaryWriter(str(self.folder / "runs"), purge_step=step + 1 if step else None)
        self.text("config", step, resolved, show=False)

    def say(self, text: str):
        """A line for the console and train.log."""
        if not self.main:
            return
        print(text, flush=True)
        if self._log is not None:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self._log.write("".join(f"{stamp} | {line}\n" for line in text.splitlines()))
            self._log.flush()

    def log(self, step: int, values: dict, line: str | None = None):
        """Numbers of one step for metrics.jsonl and TensorBoard, and a `line` for the console.

        Several calls for one step make one row of metrics.jsonl. TensorBoard's tags: 'eval_x' -> eval/x, 'a/b' as it
        is, any other -> train/x. None and numbers that are not finite become null.
        """
        if not self.main:
            return
        if self._row.get("step") != step:
            self.flush()
            self._row = {"step": step}
        for key, value in values.items():
            finite = value is not None and math.isfinite(value)
            self._row[key] = value if finite else None
            tag = key if "/" in key else f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            if finite:
                self._writer.add_scalar(tag, value, step)
        if line:
            self.say(line)

    def text(self, tag: str, step: int, text: str, show: bool = True):
        """A text for TensorBoard and, if `show`, for the console and train.log."""
        if not self.main:
            return
        self._writer.add_text(tag, "    " + text.replace("\n", "\n    "), step)
        if show:
            self.say(text)

    def flush(self):
        """Write the row of the present step to metrics.jsonl."""
        if self.main and self._row:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(self._row) + "\n")
            self._row = {}
            self._writer.flush()

    def curves(self, panels=None):
        """Draw curves.png anew from metrics.jsonl."""
        self.flush()
        if self.main:
            plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png", panels)

    @contextlib.contextmanager
    def checkpoint(self, step: int, keep: int, barrier=lambda: None, **counters):
        """Give a temporary folder; once left, it becomes checkpoints/step-000010, and only the newest `keep` stay.

        Every process enters, `barrier` makes them wait for each other. `counters` go into run.json, with the number of
        processes and the commit. After an error inside, nothing that looks like a checkpoint is left.
        """
        self.flush()
        final = self.checkpoints / f"step-{step:06d}"
        temporary = final.with_name(f".{final.name}")
        if self.main:
            self.checkpoints.mkdir(exist_ok=True)
            for leftover in self.checkpoints.glob(".*"):
                shutil.rmtree(leftover)
            temporary.mkdir()
            state = {"num_processes": process_rank()[1], "commit": git_commit(), **counters}
            _write(temporary / "run.json", json.dumps(state, indent=2) + "\n")
        barrier()
        yield temporary
        barrier()
        if self.main:
            temporary.rename(final)
            old = sorted(self.checkpoints.glob("step-[0-9]*"), key=checkpoint_step)[:-keep]
            for folder in old:  # renamed first: a half-deleted folder must not look like a checkpoint
                shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}")))

    def close(self):
        """Write what is left and let go of the folder."""
        if not self.main:
            return
        self.flush()
        if self._writer is not None:
            self._writer.close()
            self._log.close()
            self._writer = self._log = None
        self._lock.release()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None and not issubclass(kind, ConfigError):
            text = f"stopped by {kind.__name__}: {error}".rstrip(": ")
            if self._log is not None:
                self.say(f"{text}\ngo on from the last checkpoint with --resume auto")
            else:  # another rank may be the one that knows the cause
                print(f"rank {process_rank()[0]}: {text}", file=sys.stderr, flush=True)
        self.close()


def last_checkpoint(folder) -> Path | None:
    """The newest complete checkpoint under a run folder's `checkpoints/`."""
    return max(Path(folder, "checkpoints").glob("step-[0-9]*"), key=checkpoint_step, default=None)


def checkpoint_step(checkpoint) -> int:
    """checkpoints/step-000010 -> 10"""
    return int(Path(checkpoint).name.removeprefix("step-"))


def config_differences(config, folder) -> list[str]:
    """Keys whose values differ from those in `folder`/config.yaml; resume and output_dir may."""
    from omegaconf import OmegaConf

    path = Path(folder) / "config.yaml"
    if not path.is_file():
        return [f"{path} is missing"]
    old = _flatten(OmegaConf.to_container(OmegaConf.load(path)), {})
    new = _flatten(OmegaConf.to_container(OmegaConf.structured(config)), {})
    keys = [key for key in {**new, **old} if key not in ("resume", "output_dir")]
    return [f"{key}: was {old.get(key, 'not set')}, now {new.get(key, 'not set')}"
            for key in keys if old.get(key) != new.get(key)]


def find_resume(run: Run, resume: str, config) -> Path | None:
    """The checkpoint that this run goes on from, None for a fresh start; ConfigError where the folder forbids it.

    none: the folder must hold no checkpoints and no model. auto: its newest checkpoint, if the config is the same.
    A path: that checkpoint (or a run folder's newest); another config is allowed there, and said.
    """
    newest = last_checkpoint(run.folder)
    if resume == "none":
        if newest or run.finished:
            what = f"checkpoints up to {newest.name}" if newest else "a finished model"
            fail([f"output_dir: {run.folder} already holds {what}; go on with --resume auto, "
                  "or give another --output_dir, or remove the folder"])
        return None
    if resume == "auto":
        checkpoint, source = newest, run.folder
        if checkpoint is None:
            return None
    else:
        given = Path(resume)
        checkpoint = given if given.name.startswith("step-") and given.is_dir() else last_checkpoint(given)
        if checkpoint is None:
            fail([f"resume: {resume} is neither none, auto, a checkpoint (.../step-000010) nor a run folder"])
        source = checkpoint.resolve().parent.parent
        if source == run.folder.resolve() and (run.finished or newest.name != checkpoint.name):
            fail([f"resume: {run.folder} has gone on past {checkpoint.name}; give another --output_dir to branch off"])
    differences = config_differences(config, source)
    processes = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))["num_processes"]
    if processes != process_rank()[1]:
        differences.append(f"processes: was {processes}, now {process_rank()[1]}")
    if differences and resume == "auto":
        fail([*differences], title=f"{source} was started with another configuration, --resume auto cannot go on "
                                   f"(--resume {checkpoint} --output_dir NEW can)")
    for difference in differences:
        print0(f"resume: {difference}")
    return checkpoint


# ---- curves ----------------------------------------------------------------------------------------------------------

PANELS = {
    "loss": ["loss", "eval_loss", "eval_loss_microscope", "eval_loss_copilot"],
    "learning rate": ["learning_rate"],
    "gradient norm": ["grad_norm"],
    "tokens / s": ["tokens_per_second"],
}
COLOURS = ["#2563eb", "#ea580c", "#16a34a", "#9333ea", "#64748b"]


def read_metrics(path) -> list[dict]:
    """Rows of metrics.jsonl; [] where there is none. A last line that was cut by a kill is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def _smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average without the bias towards the start."""
    result, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(mean / norm)
    return result


def _draw_panel(axis, title: str, curves: dict[str, list[tuple]]):
    """One panel: {key: [(step, value), ..]}; many noisy values are drawn faintly under their moving average."""
    for colour, (key, points) in zip(COLOURS * len(curves), curves.items(), strict=False):
        steps, values = zip(*points, strict=True)
        name = key.replace("eval_loss", "held-out").replace("_", " ")
        if key.startswith("eval_"):
            axis.plot(steps, values, "o-", color=colour, markersize=3.5, linewidth=1.2, label=name)
            continue
        noisy = len(values) > 30 and not key.startswith("learning_rate")
        axis.plot(steps, values, color=colour, alpha=0.25 if noisy else 1.0, linewidth=1 if noisy else 1.6,
                  label=None if noisy else name)
        if noisy:  # averaged over about a twentieth of the run
            smooth = _smooth(values, 1 - 1 / max(5, len(values) / 20))
            axis.plot(steps, smooth, color=colour, linewidth=1.8, label=name)
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axis.legend(fontsize=8, frameon=False)


def plot_curves(metrics, picture, panels: dict[str, list[str]] | None = None):
    """Draw metrics.jsonl as a grid of panels, {title: keys of one panel}; panels without any value are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, picture = read_metrics(metrics), Path(picture)
    series = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and value is not None:
                series.setdefault(key, []).append((row["step"], value))
    panels = {t: [k for k in keys if k in series] for t, keys in (panels or PANELS).items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    if not panels:
        return
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 3.1 * lines), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(axis, title, {key: series[key] for key in keys})
    figure.suptitle(str(Path(metrics).parent), fontsize=9, color="#64748b", x=0.01, ha="left")
    temporary = picture.with_name(f".{picture.name}.{os.getpid()}.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, picture)

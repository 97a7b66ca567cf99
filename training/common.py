"""What every program needs before anything heavy is imported: its configuration, its errors, small files.

    config = load_config(Stage1Config, argv, default_config="configs/stage1.yaml")    defaults < YAML < flags
    fail(problems)                                                                    one message, exit code 2
    run_main(main)                                                                    user errors without a traceback

Importing this imports neither torch nor another module of this project, so `--help` and a mistyped flag are answered at
once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def process_rank() -> tuple[int, int]:
    """(rank, number of processes) as torchrun sets them; (0, 1) under plain python."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*args, **kwargs):
    """print, on rank 0 only."""
    if process_rank()[0] == 0:
        print(*args, **kwargs, flush=True)


# ---- errors ----------------------------------------------------------------------------------------------------------


class DriveVLMError(Exception):
    """Base of the errors that a user can fix (bad rows, clips, models, evidence); `run_main` prints them, exit 1."""


class StopRun(SystemExit):
    """Ends the program and prints `text`."""

    exit_code = 1

    def __init__(self, text: str):
        super().__init__(self.exit_code)
        self.text = text

    def __str__(self):
        return self.text


class ConfigError(StopRun):
    """A user error (bad flag, YAML or missing file) that `fail` has printed; exit code 2."""

    exit_code = 2


class TrainingError(StopRun):
    """Training cannot continue (a loss that is not finite, too many unreadable clips); exit code 1."""


def fail(problems: list[str], title: str = "nothing was started") -> typing.NoReturn:
    """Print all problems as one message on stderr and exit with code 2 (ConfigError)."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{Path(sys.argv[0]).name or 'drive-vlm'}: {count}, {title}:"]
    lines += ["  - " + problem.replace("\n", "\n    ") for problem in problems]
    text = "\n".join(lines)
    if process_rank()[0] != 0:
        time.sleep(3)  # give rank 0 time to print first: torchrun ends the other ranks once one has failed
    print(text, file=sys.stderr, flush=True)
    raise ConfigError(text)


def check_gpus():
    """Fail if torchrun has started more processes on this machine than it has GPUs."""
    import torch

    processes, cards = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < cards < processes:
        fail([f"{processes} processes for {cards} GPU{'s' * (cards > 1)}: start torchrun with --nproc_per_node "
              f"{cards}, or hide the GPUs (CUDA_VISIBLE_DEVICES=\"\") to compute on the CPU"])


def write_failure(error: Exception) -> str | None:
    """Why the system could not write, if that is what `error` says; safetensors and torch hide it in their own."""
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
    text = str(error)
    if "(os error " in text:  # safetensors: "Error while serializing: I/O error: No space left on device (os error 28)"
        return text.rpartition("I/O error: ")[2]
    return f"{text} (is the disk full?)" if "inline_container.cc" in text else None  # torch.save


def run_main(main):
    """Run a script's `main()` and exit with what it returns; a DriveVLMError is one line on stderr and exit code 1.

    So is a full disk.
    """
    script = Path(sys.argv[0]).stem
    with reader_may_leave():
        try:
            sys.exit(main())
        except DriveVLMError as error:
            sys.exit(f"{script}: {error}")
        except KeyboardInterrupt:
            print(f"\n{script}: stopped by Ctrl-C", file=sys.stderr, flush=True)
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            reason = write_failure(error) or ""
            if os.strerror(errno.ENOSPC) not in reason and os.strerror(errno.EDQUOT) not in reason:
                raise
            sys.exit(f"{script}: cannot write {getattr(error, 'filename', None) or 'a file'}: {reason}")


@contextlib.contextmanager
def reader_may_leave():
    """`program | head` closes the pipe that we print into: no traceback for that, but the exit code of SIGPIPE."""
    try:
        yield
    except BrokenPipeError:
        if not _output_is_closed():
            raise  # some other pipe
        sys.exit(128 + signal.SIGPIPE)
    finally:
        _output_is_closed()


def _output_is_closed():
    """True if nobody reads our standard output any more; what is left in its buffer is then dropped."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are reported even if nothing is asked for
        closed = bool(poll.poll(0))
    except (OSError, ValueError):  # not a file, as in a notebook
        return False
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


# ---- configuration ---------------------------------------------------------------------------------------------------


def load_config(cls, argv=None, *, default_config=None, description=None):
    """An instance of the dataclass `cls`: its defaults < the YAML file (`--config FILE`) < flags (`--name value`).

    `default_config` is a path relative to the repository. The YAML file may hold keys of other programs
    (`cls.every_key()`), which are ignored. `cls.problems()` checks values. Unknown keys, wrong types and bad values
    come in one message on stderr with exit code 2 (ConfigError). `--help` lists every key.
    """
    from omegaconf import OmegaConf

    if argv is None:
        sys.excepthook = _quiet_ctrl_c  # while torch is imported, before `run_main`
    argv = sys.argv[1:] if argv is None else [str(arg) for arg in argv]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=ROOT / default_config if default_config else None)
    known, argv = first.parse_known_args(argv)
    config, problems = OmegaConf.structured(cls), []
    if known.config:
        _read_yaml(config, cls, Path(known.config), problems)
    if {"-h", "--help"} & set(argv):
        import tyro

        about = f"{description or ''}\n--config FILE reads a YAML file with these keys (default: {default_config})."
        with reader_may_leave():
            tyro.cli(cls, args=["--help"], default=OmegaConf.to_object(config), description=about, use_underscores=True)
    for name, values in _split_flags(argv):
        if problem := _read_flag(config, name, values):
            problems.append(f"command line: {problem}")
    config = OmegaConf.to_object(config)
    problems = problems or [f"command line: --{text}" for text in impossible_values(dataclasses.asdict(config))]
    if problems := problems or config.problems():
        fail(problems)
    return config


def _quiet_ctrl_c(kind, error, trace):
    """Ctrl-C prints no traceback; anything else does."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def _read_yaml(config, cls, path, problems):
    """Set the keys of `config` (of OmegaConf) that a YAML file gives; what is wrong with it is added to `problems`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    content = {}
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(content, dict):
            raise ValueError("expected lines of 'key: value'")
    except OSError:
        problems.append(f"config file {path} not found (relative paths start at {Path.cwd()})")
    except (YAMLError, ValueError, OmegaConfBaseException) as error:
        problems.append(f"{path} is not a valid YAML file of keys: {error}")
        content = {}
    for key, value in content.items():
        if key not in cls.every_key():
            problems.append(f"{path}: unknown key {key}{_nearest(str(key), _keys(config))}")
        elif key in cls.__dataclass_fields__:
            try:
                _set_value(config, key, value)
            except (ValueError, OmegaConfBaseException) as error:
                problems.append(f"{path}: {key}: {str(error).splitlines()[0]}")
    problems += [f"{path}: {text}" for text in impossible_values(OmegaConf.to_container(config))]


def _split_flags(argv):
    """["--a", "1", "2", "--b-c=3"] -> [("a", ["1", "2"]), ("b_c", ["3"])]; a value without a flag has the name ""."""
    flags = []
    for arg in argv:
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif flags:
            flags[-1][1].append(arg)
        else:
            flags.append(("", [arg]))
    return flags


def _read_flag(config, name, values) -> str | None:
    """Set the key of `config` (of OmegaConf) that a flag gives, `--detector.weights x.pt` and `--no_augment` too;
    returns what is wrong with it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    keys, positive = _keys(config), name.removeprefix("no_")
    if name not in keys and positive in keys and isinstance(OmegaConf.select(config, positive), bool) and not values:
        name, values = positive, ["false"]
    if name not in keys:
        return f"unknown flag --{name}{_nearest(name, keys)}" if name else f"{values[0]!r} belongs to no flag"
    now = OmegaConf.select(config, name)
    values = values or (["true"] if isinstance(now, bool) else [])
    pairs = OmegaConf.is_dict(now) and len(values) > 1 and len(values) % 2 == 0  # --mode_weights copilot 2 microscope 1
    if not OmegaConf.is_list(now) and not pairs and len(values) != 1:
        return f"{values[1]!r} belongs to no flag" if values else f"--{name}: the value is missing"
    try:
        value = values if OmegaConf.is_list(now) else values[0]
        if pairs:
            value = dict(zip(values[::2], values[1::2], strict=True))
        elif OmegaConf.is_dict(now) and value.startswith("{"):
            value = OmegaConf.to_container(OmegaConf.create(value))
        _set_value(config, name, value)
    except (YAMLError, ValueError, OmegaConfBaseException) as error:
        return f"--{name}: {str(error).splitlines()[0]}"


def _set_value(config, key, value):
    """Set a key of `config` (of OmegaConf), which checks the type, to what a YAML file or a flag says."""
    from omegaconf import OmegaConf

    types_of = typing.get_type_hints(OmegaConf.get_type(config))
    if str(value).lower() in ("none", "null") and types.NoneType in typing.get_args(types_of.get(key)):
        value = None
    if "${" in str(value) or "'???'" in str([value]):  # OmegaConf's reference, and its "missing"
        raise ValueError(f"{value!r} refers to another key, which does not work here; write the value itself")
    nested = dataclasses.is_dataclass(types_of.get(key))
    if nested and isinstance(value, str):
        value = {"weights": value}  # detector: FILE is detector: {weights: FILE}
    OmegaConf.update(config, key, value, merge=nested)


def impossible_values(tree: dict, prefix="") -> list[str]:
    """Values that no program can work with: numbers that are not finite, seeds below 0, references to other keys."""
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += impossible_values(value, f"{prefix}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(f"{prefix}{key} must be a finite number, got {value}")
        elif isinstance(value, str) and "${" in value:
            found.append(f"{prefix}{key}: {value!r} refers to another key, which does not work here; "
                         "write the value itself")
        elif key in ("seed", "split_seed") and not 0 <= value < 2**63:
            found.append(f"{key} must be at least 0 and below 2**63, got {value}")
    return found


def _keys(config):
    """Names of the config's keys, those of nested settings and the entries of tables as detector.weights."""
    keys = list(config)
    for name, value in config.items():
        keys += [f"{name}.{key}" for key in (value if hasattr(value, "items") else ())]
    return keys


def _nearest(key, keys):
    valid = {"lr": "learning_rate", **{name: name for name in keys}}
    return f" (did you mean {valid[difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]]!r}?)"


# ---- small things that several programs share ------------------------------------------------------------------------


def is_other_base(recorded, name):
    """True if `name` is another base model than the recorded one: not the same, nor where that one is now.

    A folder has moved if the recorded path is gone, or if the last part of its path is the same.
    """
    moved = Path(recorded).is_absolute() and not Path(recorded).exists() or Path(recorded).name == Path(name).name
    return Path(recorded).resolve() != Path(name).resolve() and not moved


def base_model_differences(config, meta, folder) -> list[str]:
    """One line for each base model that `config` names and the checkpoint in `folder` was not trained with. meta: the
    content of its drivevlm.json."""
    found = []
    for key in ("vision_model", "language_model"):
        given, recorded = getattr(config, key), meta[key]["name"]
        if given and is_other_base(recorded, given):
            found.append(f"{key}: {given}, but {folder} was trained with {recorded}")
    return found


@functools.cache
def git_commit() -> str:
    """The commit of this checkout, with '+changes' where tracked files differ; 'unknown' outside git."""

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` that is renamed to it at the end: a reader sees the whole file or none.

    After an error inside, the temporary file is removed and `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str):
    """`text` as a file, complete or absent."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path, value, **style):
    """`value` as a JSON file, complete or absent."""
    write_text(path, json.dumps(value, ensure_ascii=False, **style) + "\n")


def read_jsonl(path) -> list[dict]:
    """Objects of a JSONL file; [] where there is none. An incomplete last line, left by a killed run, is ignored."""
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def file_sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cpu_count() -> int:
    """Cores that this process may use; all of the machine's where the system cannot say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def content_sha256(path) -> str:
    """The hash of a file, or of all files in a folder with their names."""
    if Path(path).is_file():
        return file_sha256(path)
    lines = [f"{file.relative_to(path).as_posix()} {file_sha256(file)}"
             for file in sorted(Path(path).rglob("*")) if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def stable_seed(*parts) -> int:
    """A 63-bit seed from anything that prints, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1

"""One run's folder: the lock, the logs, the checkpoints, which checkpoint a run continues from, and the curves.

    config.yaml  train.log  metrics.jsonl  curves.png  runs/ (TensorBoard)  checkpoints/step-000010/  model/

With `report_to: trackio` or `wandb` there is no runs/, but run_id.txt, the run's name there; and wandb's own folder.

A checkpoint is model/ (a checkpoint folder), optimizer.pt and run.json: order of clips, learning rate and dropout are
functions of (seed, step, rank), so there is no other state. run.json also lists size and hash of every other file, and
a checkpoint is compared with that list before a run continues from it.
"""

import contextlib
import dataclasses
import errno
import html
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

from training.common import (
    ConfigError,
    TrainingError,
    fail,
    file_sha256,
    git_commit,
    is_other_base,
    print0,
    process_rank,
    read_jsonl,
    replacing,
    write_failure,
    write_json,
    write_text,
)


class RunFolder:
    """A run folder, used by one run at a time: rank 0 locks it and writes; on other ranks every call does nothing.

    Use as a context manager. A second run on the folder exits with a ConfigError. `start` opens the logs, so that
    `find_resume` can refuse before anything in the folder has changed.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.checkpoints, self.model_folder = self.folder / "checkpoints", self.folder / "model"
        self.main = process_rank()[0] == 0
        self._row, self._damaged, self._warned = {}, [], set()
        self._tracker = self._log = self._thread_hook = None
        self._report_to = "none"
        if self.main:
            self._take_lock()

    def _take_lock(self):
        """The lock is the system's, so a killed run leaves none; the file's text only tells who holds it."""
        from filelock import FileLock, Timeout

        path = self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path)
            self._lock.acquire(timeout=0)
            if path.read_text(encoding="utf-8")[:3] in ("", "pid"):  # else filelock's own, where there are no OS locks
                path.write_text(f"pid {os.getpid()} on host {socket.gethostname()}, since {now()}\n", encoding="utf-8")
        except Timeout:
            holder = path.read_text(encoding="utf-8").strip().replace("\n", " ") or "its process is not known"
            fail([f"output_dir: another run ({holder}) is writing to {self.folder}; wait for it, end it, "
                  "or give another --output_dir"])
        except OSError as error:
            fail([f"output_dir: cannot write {path}: {write_failure(error)}"])

    @property
    def finished(self) -> bool:
        """True if the stage's result is there: `model/` is written last."""
        return (self.model_folder / "drivevlm.json").is_file()

    # ---- logs

    def start(self, config, checkpoint=None):
        """Save the resolved config and open the logs; entries after `checkpoint` (all, if None) are dropped."""
        if not self.main:
            return
        from omegaconf import OmegaConf

        resolved = OmegaConf.to_yaml(OmegaConf.structured(config))
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        processes = process_rank()[1]
        header = f"# {command}\n# commit {git_commit()}, processes {processes}\n"
        step = checkpoint_step(checkpoint) if checkpoint else -1
        with writing(self.folder):
            for damaged in self._damaged:  # the run saves these steps again
                damaged.rename(damaged.with_name(f"{damaged.name}-damaged-{time.time_ns()}"))
            write_text(self.folder / "config.yaml", header + resolved)
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                kept = [row for row in read_jsonl(self.folder / name) if row["step"] <= step]
                if (self.folder / name).is_file():
                    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
                    write_text(self.folder / name, "".join(lines))
        with self._may_fail("train.log"):
            self._log = open(self.folder / "train.log", "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._start_tracker(config, checkpoint, step + 1)
        if self._report_to == "tensorboard":  # the others have a place of their own for it
            self.log_text("config", max(step, 0), resolved)

    def _start_tracker(self, config, checkpoint, first_step):
        """Start what `report_to` names; where that fails, the run goes on without it."""
        self._report_to = config.report_to
        if config.report_to == "none":
            return
        self._thread_hook, threading.excepthook = threading.excepthook, self._quiet_writer
        run_id = None if config.report_to == "tensorboard" else self._run_id(checkpoint)
        with self._tracking():
            tracker = make_tracker(config, self.folder, run_id, first_step)
            tracker.start()
            self._tracker = tracker

    def _run_id(self, checkpoint):
        """The run's name for trackio and wandb. A resumed run goes on under the name that it began with."""
        path = self.folder / "run_id.txt"
        if checkpoint is None or not path.is_file():
            name = re.sub("[^A-Za-z0-9_-]", "-", self.folder.resolve().name)[:40]
            with writing(path):
                write_text(path, f"{name}-{uuid.uuid4().hex[:8]}\n")  # other users have an output/stage1 too
        return path.read_text(encoding="utf-8").strip()

    @contextlib.contextmanager
    def _may_fail(self, name):
        """Around a write that a run can do without: an OSError becomes one warning per file."""
        try:
            yield
        except OSError as error:
            self._warn_once(f"write {self.folder / name}", error)

    @contextlib.contextmanager
    def _tracking(self):
        """Around calls of the tracker: whatever it raises (it may be a service that is down) becomes one warning."""
        try:
            yield
        except Exception as error:
            self._warn_once(f"write {self.folder / 'runs'}" if self._report_to == "tensorboard" else
                            f"report to {self._report_to}", error)

    def _warn_once(self, what, error):
        if what not in self._warned:
            self._warned.add(what)
            reason = " ".join((write_failure(error) or f"{type(error).__name__}: {error}").split())
            with contextlib.suppress(OSError):  # standard error may be on the same full disk
                print(f"warning: cannot {what}: {reason}; the run goes on without it", file=sys.stderr, flush=True)

    def _quiet_writer(self, error):
        """TensorBoard writes in a thread of its own, and raises the error in ours as well: no traceback for that."""
        if not (issubclass(error.exc_type, OSError) and "AsyncWriter" in type(error.thread).__name__):
            self._thread_hook(error)

    def print(self, text: str):
        """A line for the console and train.log."""
        if not self.main:
            return
        with self._may_fail("the console"):
            print(text, flush=True)
        if self._log is not None:
            with self._may_fail("train.log"):
                self._log.write("".join(f"{now()} | {line}\n" for line in text.splitlines()))
                self._log.flush()

    def log_scalars(self, step: int, values: dict, line: str | None = None):
        """Numbers of one step for metrics.jsonl and the tracker, and a `line` for the console.

        Several calls for one step make one row of metrics.jsonl. The tracker's names: 'eval_x' -> eval/x, 'a/b' as it
        is, any other -> train/x. None and numbers that are not finite become null.
        """
        if not self.main:
            return
        if self._row.get("step") != step:
            self.flush()
            self._row = {"step": step}
        tracked = {}
        for key, value in values.items():
            finite = value is not None and math.isfinite(value)
            self._row[key] = value if finite else None
            tag = key if "/" in key else f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            if finite:
                tracked[tag] = value
        if tracked and self._tracker is not None:
            with self._tracking():
                self._tracker.log(tracked, step=step)
        if line:
            self.print(line)

    def log_text(self, tag: str, step: int, text: str):
        """A text for the tracker."""
        if self._tracker is not None:
            with self._tracking():
                self._tracker.log({tag: tracker_text(self._report_to, text)}, step=step)

    def log_rollouts(self, records: list[dict]):
        """Append stage 3's sampled answers to rollouts.jsonl."""
        if self.main:
            self._append("rollouts.jsonl", records)

    def _append(self, name, records):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with writing(self.folder / name), open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(text)

    def flush(self):
        """Write the current step's row to metrics.jsonl."""
        if not self._row:
            return
        row, self._row = self._row, {}  # forgotten first: a row that cannot be written is not tried again
        self._append("metrics.jsonl", [row])

    def draw_curves(self, panels):
        """Draw curves.png from metrics.jsonl; see plot_curves."""
        self.flush()
        if self.main:
            with self._may_fail("curves.png"):
                plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png", panels)

    # ---- checkpoints

    @contextlib.contextmanager
    def checkpoint(self, step: int, keep: int, barrier=lambda: None, **state):
        """Yield a temporary folder that becomes checkpoints/step-000010 on exit; only the newest `keep` are kept, and
        the best, which `state` may name (stage3/held_out.py).

        Every process enters; `barrier` makes them wait for each other. `state` goes into run.json, with the number of
        processes and the commit. After an error inside, nothing that looks like a checkpoint is left.
        """
        self.flush()
        final = self.checkpoints / f"step-{step:06d}"
        temporary = final.with_name(f".{final.name}")
        try:
            if self.main:
                with writing(final):
                    self.checkpoints.mkdir(exist_ok=True)
                    for leftover in step_folders(self.checkpoints, prefix=".step-"):  # of saves that were killed
                        shutil.rmtree(leftover)
                    temporary.mkdir()
            barrier()
            with writing(final):
                yield temporary
            barrier()
            if self.main and not final.exists():  # it exists if this run saved it before, with the same weights
                with writing(final):
                    run = {"num_processes": process_rank()[1], "commit": git_commit(), **state}
                    complete_checkpoint(temporary, final, run)
        finally:
            if self.main:
                shutil.rmtree(temporary, ignore_errors=True)
        best = (state.get("evaluations") or {}).get("best")
        if self.main:
            for folder in step_folders(self.checkpoints)[:-keep]:
                if best is None or checkpoint_step(folder) != best["step"]:
                    # renamed first: a half-deleted folder must not look like a checkpoint
                    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}")))

    def find_resume(self, config) -> Path | None:
        """The checkpoint that `config.resume` continues from, None for a fresh start; ConfigError if that is refused.

        none: the folder must hold no checkpoints and no model. auto: its newest sound checkpoint, if the config is the
        same. A path: that checkpoint (or a run folder's newest); another config is allowed there, and printed, except
        for the keys that a checkpoint fixes. The number of processes must be the checkpoint's: it decides the sums.
        """
        newest, resume = last_checkpoint(self.folder), config.resume
        if resume == "none":
            self._refuse_used_folder(newest)
            return None
        if resume == "auto":
            checkpoint, source = self._newest_sound_checkpoint(), self.folder
            if checkpoint is None:
                return None
        else:
            checkpoint, source = self._checkpoint_to_branch_from(Path(resume), newest)
        state = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
        if "files" not in state:
            print0(f"resume: {checkpoint} is of an older version and does not list its files: it was not verified")
        self._compare_settings(config, checkpoint, source, state)
        return checkpoint

    def _refuse_used_folder(self, newest):
        if newest or self.finished:
            what = f"checkpoints up to {newest.name}" if newest else "a finished model"
            fail([f"output_dir: {self.folder} already holds {what}; continue it with --resume auto, "
                  "or give another --output_dir, or remove the folder"])

    def _compare_settings(self, config, checkpoint, source, state):
        """Refuse differences that --resume does not allow, all in one message; print those that it applies."""
        differences = config_differences(config, source)
        lines = {key: f"{key}: was {old}, now {new}" for key, (old, new) in differences.items()}
        fixed = [lines[key] for key, (old, new) in differences.items() if is_fixed(key, old, new)]
        was, processes = state["num_processes"], process_rank()[1]
        if was != processes:
            start = f"torchrun --nproc_per_node {was}" if was > 1 else "python, without torchrun"
            fixed.append(f"processes: was {was}, now {processes}; continue with {was} ({start}): "
                         "another number would not give the same run")
        if config.resume == "auto" and (differences or fixed):
            for key in {"dtype", "video_reader"} & set(lines):  # what their `auto` means depends on the machine
                lines[key] += f" (to continue as on the machine before: --{key} {differences[key][0]})"
            hint = "" if fixed else f" (--resume {checkpoint} --output_dir NEW can)"
            refused = [line for line in lines.values() if line not in fixed] + fixed
            fail(refused, title=f"{source} was started with another configuration, --resume auto cannot continue{hint}")
        if fixed:
            fail(fixed, title=f"{checkpoint} can only be continued with the values that it was made with")
        for key, line in lines.items():
            unused = key == "init_from" and "reference_sha256" not in state  # only stage 3 reads it again
            print0(f"resume: {line}: {'not used: the weights are in the checkpoint' if unused else 'applied'}")

    def _newest_sound_checkpoint(self):
        """None if there is no checkpoint at all. Damaged ones are passed over and printed; `start` sets them aside."""
        damage, self._damaged = [], []
        for checkpoint in reversed(step_folders(self.checkpoints)):
            problems = checkpoint_problems(checkpoint)
            if not problems:
                if damage:
                    print0("\n".join(f"resume: {line}" for line in damage))
                    print0(f"resume: continuing from the one before, {checkpoint}")
                return checkpoint
            damage.append(f"{checkpoint} is damaged: {'; '.join(problems)}")
            self._damaged.append(checkpoint)
        if damage and not self.finished:
            fail([*damage, "no sound checkpoint is left: start again with another --output_dir, or remove the folder"])
        return None

    def _checkpoint_to_branch_from(self, given, newest):
        is_checkpoint = given.is_dir() and re.fullmatch("step-[0-9]+", given.name)
        checkpoint = given if is_checkpoint else last_checkpoint(given)
        if checkpoint is None:
            fail([f"resume: {given} is neither none, auto, a checkpoint (.../step-000010) nor a run folder"])
        source = checkpoint.resolve().parent.parent
        if source == self.folder.resolve() and (self.finished or newest.name != checkpoint.name):
            fail([f"resume: {self.folder} is already past {checkpoint.name}; give another --output_dir to branch off"])
        if source != self.folder.resolve():
            self._refuse_used_folder(newest)
        if problems := checkpoint_problems(checkpoint):
            fail([f"resume: {checkpoint} is damaged: {'; '.join(problems)}; give another checkpoint"])
        return checkpoint, source

    # ---- the end

    def close(self):
        """Close the logs and release the folder."""
        if not self.main:
            return
        with self._tracking():
            if self._tracker is not None:
                self._tracker.finish()
        with self._may_fail("train.log"):
            if self._log is not None:
                self._log.close()
        if self._thread_hook is not None:
            threading.excepthook, self._thread_hook = self._thread_hook, None
        self._tracker = self._log = None
        self._lock.release()  # last: until here another run must not touch the files

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        problem = error
        try:
            self.flush()
        except TrainingError as failure:
            problem = error or failure
        if problem is not None and not isinstance(problem, ConfigError):
            text = f"stopped by {type(problem).__name__}: {problem}".rstrip(": ")
            if self._log is not None:
                self.print(f"{text}\ncontinue from the last checkpoint with --resume auto")
            else:  # the cause may have been printed by another rank
                print(f"rank {process_rank()[0]}: {text}", file=sys.stderr, flush=True)
        self.close()
        if problem is not error:
            raise problem


@contextlib.contextmanager
def writing(path):
    """Around writes that a run cannot do without: if one fails, a TrainingError names `path` and the reason."""
    try:
        yield
    except Exception as error:
        if reason := write_failure(error):
            raise TrainingError(f"cannot write {path}: {reason}") from error
        raise


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


# ---- trackers: what `report_to` names --------------------------------------------------------------------------------

PROJECT = "drive-vlm"  # what trackio and wandb list the runs under


def tracker_problems(report_to: str) -> list[str]:
    """What keeps a tracker from starting: a library that is not installed, a login that it would ask for."""
    if report_to == "none":
        return []
    other = "none" if report_to == "tensorboard" else "tensorboard"
    spec = importlib.util.find_spec(report_to)
    if spec is None or spec.origin is None:  # without origin: a folder of that name, such as wandb leaves behind
        return [f"report_to: {report_to} is not installed: pip install {report_to}, or report_to: {other}"]
    return _login_problems() if report_to == "wandb" and process_rank()[0] == 0 else []


def _login_problems():
    """wandb.init would ask for a key in the terminal, and the run would wait there."""
    try:
        import wandb

        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
            return []
        if "prompt" not in inspect.signature(wandb.login).parameters:
            return [f"report_to: wandb {wandb.__version__} cannot say whether it has a key: pip install -U wandb, "
                    "or WANDB_MODE=offline"]
        has_key = wandb.login(prompt=False, verify=False)
    except Exception as error:  # an installation that is broken, a key that cannot be one
        return [f"report_to: wandb cannot be used: {type(error).__name__}: {error}"]
    return [] if has_key else [
        "report_to: wandb has no key: wandb login, or WANDB_MODE=offline, or report_to: tensorboard"]


def make_tracker(config, folder, run_id, first_step):
    """accelerate's tracker, not started yet. TensorBoard drops what it has of `first_step` and later.

    The others cannot: of the steps that a resumed run repeats, wandb keeps the first numbers, trackio both.
    """
    from accelerate import PartialState, tracking

    PartialState()  # the trackers need it; it is there already wherever there is an Accelerator
    if config.report_to == "tensorboard":  # it writes to `logging_dir`/`run_name`
        return tracking.TensorBoardTracker("runs", logging_dir=str(folder), purge_step=first_step)
    options = {"name": run_id, "resume": "allow", "config": dataclasses.asdict(config)}
    if config.report_to == "trackio":
        return tracking.TrackioTracker(PROJECT, **options)
    return tracking.WandBTracker(PROJECT, id=run_id, dir=str(folder), **options)


def tracker_text(report_to: str, text: str):
    """A text as the tracker shows it, character by character: it may hold what looks like markup."""
    if report_to == "wandb":
        import wandb

        return wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
    block = "    " + text.replace("\n", "\n    ")  # Markdown's code block
    if report_to == "trackio":
        import trackio

        return trackio.Markdown(block)
    return block


# ---- checkpoints on disk ---------------------------------------------------------------------------------------------


def step_folders(folder, prefix="step-") -> list[Path]:
    """Folders named exactly step-<digits>, oldest first; whatever else lies beside them is not ours."""
    found = [path for path in Path(folder).glob(f"{prefix}*")
             if re.fullmatch(re.escape(prefix) + "[0-9]+", path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def last_checkpoint(folder) -> Path | None:
    """The newest checkpoint under a run folder's `checkpoints/`."""
    return next(reversed(step_folders(Path(folder, "checkpoints"))), None)


def checkpoint_step(checkpoint) -> int:
    """checkpoints/step-000010 -> 10"""
    return int(Path(checkpoint).name.removeprefix(".").removeprefix("step-"))


def complete_checkpoint(temporary, final, state):
    """Add run.json to a folder that holds all else, and give it its name once everything is on the disk."""
    write_json(temporary / "run.json", {**state, "files": list_files(temporary)}, indent=2)
    sync_to_disk(temporary)
    temporary.rename(final)
    sync_to_disk(final.parent, subfolders=False)


def list_files(folder) -> dict[str, dict]:
    """{relative path: {"bytes", "sha256"}} of all files in a folder."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in paths}


def checkpoint_problems(checkpoint) -> list[str]:
    """What is damaged in a checkpoint, compared with the list of files in its run.json; [] where nothing is.

    Checkpoints of older versions have no such list: their files only have to be there. Under torchrun every rank
    verifies for itself, so that all come to the same answer without talking: they read the same files, about one
    gigabyte for the real models, which takes a few seconds once per start.
    """
    try:
        state = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
        files = state.get("files", dict.fromkeys(("optimizer.pt", "model/drivevlm.json")))
        state["num_processes"]
    except FileNotFoundError:
        return ["run.json is missing"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return [f"run.json cannot be read ({type(error).__name__}: {error})"]
    found = []
    for name, saved in files.items():
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif saved and path.stat().st_size != saved["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {saved['bytes']}")
        elif saved and file_sha256(path) != saved["sha256"]:
            found.append(f"{name}: sha256 differs")
    return found


def sync_to_disk(folder, subfolders=True):
    """Wait until a folder's entries, and with `subfolders` all that is in it, are on the disk.

    Without it a rename can reach the disk before what it names: after a power cut, a checkpoint of empty files.
    """
    for path in [*(sorted(Path(folder).rglob("*"), reverse=True) if subfolders else []), Path(folder)]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do it for folders
                raise
        finally:
            os.close(descriptor)


# ---- another configuration than the checkpoint's ---------------------------------------------------------------------

# What a checkpoint's weights and optimizer state were computed with. The model is built from the checkpoint, so other
# values would be ignored (pooling, time stamps, LoRA's) or would fit the weights by chance only (base models, frames).
FIXED_KEYS = ("vision_model", "language_model", "num_frames", "pooling", "time_stamps", "lora_r", "lora_alpha",
              "lora_dropout")

FREE_KEYS = ("resume", "output_dir", "report_to")  # change nothing in the result, so a resumed run may change them


def is_fixed(key: str, old, new) -> bool:
    """True if a checkpoint cannot be continued with this change. A base model may have moved."""
    if key not in FIXED_KEYS or "not set" in (old, new):  # the key of another stage or version
        return False
    return is_other_base(old, new) if key in ("vision_model", "language_model") else True


def config_differences(config, folder) -> dict[str, tuple]:
    """{key: (old, new)} of the values that differ from `folder`/config.yaml, except FREE_KEYS."""
    from omegaconf import OmegaConf

    path = Path(folder) / "config.yaml"
    if not path.is_file():
        fail([f"resume: {path} is missing; it says what the checkpoints were made with, so put it back"])
    old = _dotted(OmegaConf.to_container(OmegaConf.load(path)))
    new = _dotted(dataclasses.asdict(config))
    if "time_stamps" in new:
        old.setdefault("time_stamps", False)  # runs from before there was the key have none
    pairs = {key: (old.get(key, "not set"), new.get(key, "not set")) for key in {**new, **old}}
    return {key: pair for key, pair in pairs.items() if key not in FREE_KEYS and pair[0] != pair[1]}


def _dotted(tree: dict, prefix="") -> dict[str, object]:
    """{"detector": {"weights": "x"}} -> {"detector.weights": "x"}."""
    flat = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# ---- curves ----------------------------------------------------------------------------------------------------------

COLOURS = ["#2563eb", "#ea580c", "#16a34a", "#9333ea", "#64748b"]


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


def plot_curves(metrics, picture, panels: dict[str, list[str]]):
    """Draw metrics.jsonl as a grid of panels, {title: keys of one panel}; panels without any value are left out.

    A line marks the last `best_step` that is logged.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series = {}
    for row in read_jsonl(metrics):
        for key, value in row.items():
            if key != "step" and value is not None:
                series.setdefault(key, []).append((row["step"], value))
    shown = {}
    for title, keys in panels.items():
        curves = {key: series[key] for key in keys if key in series}
        if curves:
            shown[title] = curves
    if not shown:
        return
    columns = min(2, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 3.1 * lines), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(shown):]:
        axis.set_visible(False)
    for axis, (title, curves) in zip(axes.flat, shown.items(), strict=False):
        _draw_panel(axis, title, curves)
        for _, best in series.get("best_step", [])[-1:]:
            axis.axvline(best, color="#64748b", linestyle=":", linewidth=1.2)
            if axis is axes.flat[0]:
                axis.set_title(f"dotted: the best step, {best}", loc="right", fontsize=8, color="#64748b")
    figure.suptitle(str(Path(metrics).parent), fontsize=9, color="#64748b", x=0.01, ha="left")
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)

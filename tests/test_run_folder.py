"""Run folder, resume rules, missing inputs, and curves."""

import errno
import hashlib
import importlib.machinery
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import images_of

from training import loop
from training.common import ConfigError, TrainingError, read_jsonl
from training.config import TrainKeys
from training.run_folder import RunFolder, _smooth, list_files, plot_curves, sync_to_disk, tracker_problems

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.curves


@dataclass
class Detector:
    weights: str = "yolov8x.pt"
    image_size: int = 1280


@dataclass
class Config(TrainKeys):
    learning_rate: float = 1e-3
    pooling: int = 3
    lora_r: int = 4
    lora_alpha: int = 8
    lora_dropout: float = 0.1
    detector: Detector = field(default_factory=Detector)


# ---- run folder ------------------------------------------------------------------------------------------------------


def config_in(folder, **changes):
    return Config(output_dir=str(folder), **changes)


def fake_checkpoint(folder, step, processes=1, **state):
    path = Path(folder) / "checkpoints" / f"step-{step:06d}"
    (path / "model").mkdir(parents=True)
    for name in ("optimizer.pt", "model/drivevlm.json", "model/projector.safetensors"):
        (path / name).write_text(f"{name} of step {step}")
    state = {"num_processes": processes, "files": list_files(path), **state}
    (path / "run.json").write_text(json.dumps(state))
    return path


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_second_run_on_a_folder_is_refused_in_this_and_another_process(tmp_path):
    code = f"from training.run_folder import RunFolder\nwith RunFolder({str(tmp_path)!r}): pass"
    with RunFolder(tmp_path):
        for _ in range(2):  # a refused run must not spoil what the file says
            with pytest.raises(ConfigError) as caught:
                RunFolder(tmp_path)
            assert re.search(rf"another run \(pid {os.getpid()} on host {socket.gethostname()}, since "
                             r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\) is writing to", str(caught.value))
        other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert other.returncode == 2 and f"another run (pid {os.getpid()}" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path):
        raise ZeroDivisionError
    RunFolder(tmp_path).close()


def test_a_lock_file_without_a_holder_refuses_nobody(tmp_path):
    for text in ("", "pid 1 on host x, since 2020-01-01 00:00:00\n", "something else"):
        (tmp_path / ".lock").write_text(text)
        with RunFolder(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith("some" if text[:4] == "some" else f"pid {os.getpid()}")


def test_the_folder_is_locked_until_its_last_file_is_written(tmp_path, monkeypatch):
    seen = []

    def locked(what):
        with pytest.raises(ConfigError, match="another run"):
            RunFolder(tmp_path)
        seen.append(what)

    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path))
        run.log_scalars(1, {"loss": 1.0})
        append, close = run._append, run._tracker.finish
        monkeypatch.setattr(run, "_append", lambda *args: (locked(args[0]), append(*args)))
        monkeypatch.setattr(run._tracker, "finish", lambda: (locked("TensorBoard"), close()))
    assert seen == ["metrics.jsonl", "TensorBoard"]
    RunFolder(tmp_path).close()


def test_a_run_writes_config_metrics_log_tensorboard_and_curves(tmp_path, capsys):
    config = config_in(tmp_path, seed=5)
    with RunFolder(tmp_path) as run:
        run.start(config)
        for step in range(1, 41):
            norm = float("inf") if step == 3 else 1.0
            run.log_scalars(step, {"loss": 1 / step, "grad_norm": norm}, line=f"line {step}")
        run.log_scalars(40, {"eval_loss": 0.5, "reward/total": 1.0})
        run.log_text("answers/copilot", 40, "a red car")
        run.draw_curves({"loss": ["loss", "eval_loss"]})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[2]["grad_norm"] is None and rows[39]["eval_loss"] == 0.5 and rows[39]["loss"] == 1 / 40
    log = (tmp_path / "train.log").read_text()
    assert "| line 40" in log and "line 40" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "runs").glob("events*"))
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("# ") and "# commit " in text and yaml.safe_load(text)["seed"] == 5


def test_other_ranks_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with RunFolder(tmp_path / "run") as run:
        run.start(config_in(tmp_path))
        run.log_scalars(1, {"loss": 1.0}, line="x")
        run.log_text("a", 1, "x")
        run.log_rollouts([{"step": 1}])
        run.draw_curves({"loss": ["loss"]})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_resumed_logs_drop_what_came_after_the_checkpoint(tmp_path):
    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path))
        for step in (1, 2, 3, 4):
            run.log_scalars(step, {"loss": 1.0})
            run.log_rollouts([{"step": step}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing this line
    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path), fake_checkpoint(tmp_path, 2))
        run.log_scalars(3, {"loss": 2.0})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert [row["step"] for row in read_jsonl(tmp_path / "rollouts.jsonl")] == [1, 2]
    with RunFolder(tmp_path) as run:  # a fresh start keeps nothing, not even step 0
        run.start(config_in(tmp_path))
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_checkpoints_are_complete_or_absent_and_old_ones_are_removed(tmp_path):
    with RunFolder(tmp_path) as run:
        for step in (2, 4, 6):
            with run.checkpoint(step, keep=2, failed_clips=[]) as folder:
                (folder / "weights").write_text(str(step))
        with pytest.raises(ZeroDivisionError), run.checkpoint(8, keep=2):
            raise ZeroDivisionError
        assert names(run.checkpoints) == ["step-000004", "step-000006"]
        with run.checkpoint(10, keep=1):
            pass
        assert [p.name for p in run.checkpoints.iterdir()] == ["step-000010"]
        assert json.loads((run.checkpoints / "step-000010" / "run.json").read_text())["num_processes"] == 1


def test_a_save_waits_for_all_ranks_and_removes_the_old_only_after_the_new_is_complete(tmp_path, monkeypatch):
    seen, rmtree = [], shutil.rmtree

    def watched(path, **options):
        seen.append(f"delete {Path(path).name} beside {' '.join(names(run.checkpoints))}")
        rmtree(path, **options)

    with RunFolder(tmp_path) as run:
        fake_checkpoint(tmp_path, 2)
        monkeypatch.setattr(shutil, "rmtree", watched)
        with run.checkpoint(4, keep=1, barrier=lambda: seen.append(f"wait, {' '.join(names(run.checkpoints))}")):
            seen.append("body")
    assert seen == [
        "wait, .step-000004 step-000002", "body", "wait, .step-000004 step-000002",
        "delete .step-000004 beside step-000002 step-000004",  # what is left of a save that failed: nothing here
        "delete .step-000002 beside .step-000002 step-000004"]


def test_a_checkpoint_lists_its_files_and_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def watched(descriptor):
        synced.append(str(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path / "checkpoints")))
        fsync(descriptor)

    with RunFolder(tmp_path) as run:
        monkeypatch.setattr(os, "fsync", watched)
        with run.checkpoint(4, keep=1) as folder:
            (folder / "model").mkdir()
            (folder / "model" / "weights").write_text("abc")
            (folder / "optimizer.pt").write_text("")
    inside = [".", "model", "model/weights", "optimizer.pt", "run.json"]
    assert sorted(synced[:-1]) == sorted(str(Path(".step-000004", name)) for name in inside) and synced[-1] == "."
    files = json.loads((run.checkpoints / "step-000004" / "run.json").read_text())["files"]
    assert files == {"model/weights": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
                     "optimizer.pt": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}}


def test_only_step_folders_are_checkpoints_and_nothing_else_is_deleted(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for name in ("step-000002-good", ".step-000001", ".mine", "step-last", "step-"):
        (checkpoints / name).mkdir(parents=True)
    for name in (".DS_Store", "step-000099", ".step-000098", "notes.txt"):
        (checkpoints / name).write_text("")
    with RunFolder(tmp_path) as run:
        assert run.find_resume(config_in(tmp_path, resume="none")) is None
        assert run.find_resume(config_in(tmp_path, resume="auto")) is None
        for step in (3, 4):
            with run.checkpoint(step, keep=1):
                pass
    assert names(checkpoints) == [".DS_Store", ".mine", ".step-000098", "notes.txt", "step-", "step-000002-good",
                                  "step-000004", "step-000099", "step-last"]  # .step-000001: of a save that was killed


DAMAGE = {  # what was done to a checkpoint: (how, what is said)
    "missing": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "cut": (lambda folder: (folder / "optimizer.pt").write_text(""), "optimizer.pt has 0 bytes instead of 23"),
    "changed": (lambda folder: (folder / "optimizer.pt").write_text("optimizer.pt of step 21"),
                "optimizer.pt: sha256 differs"),
    "no run.json": (lambda folder: (folder / "run.json").unlink(), "run.json is missing"),
    "half a run.json": (lambda folder: (folder / "run.json").write_text('{"num'), "run.json cannot be read"),
    "another run.json": (lambda folder: (folder / "run.json").write_text("[]"), "run.json cannot be read"),
    "empty run.json": (lambda folder: (folder / "run.json").write_text("{}"), "run.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(kind, tmp_path, capsys):
    damage, words = DAMAGE[kind]
    config = config_in(tmp_path / "run", resume="auto")
    with RunFolder(tmp_path / "run") as run:
        run.start(config)
        first, second = fake_checkpoint(run.folder, 10), fake_checkpoint(run.folder, 20)
        damage(second)
        assert run.find_resume(config) == first
        said = capsys.readouterr().out
        assert f"{second} is damaged: {words}" in said and f"the one before, {first}" in said
    for path in (second, run.folder):
        with RunFolder(tmp_path / "new") as new, pytest.raises(ConfigError, match=f"{second} is damaged: {words}"):
            new.find_resume(config_in(new.folder, resume=str(path)))
    with RunFolder(run.folder) as run:  # it is set aside: the new one of its step must not be taken for saved before
        run.start(config, run.find_resume(config))
        with run.checkpoint(20, keep=1) as folder:
            (folder / "optimizer.pt").write_text("new")
        aside, newest = sorted(run.checkpoints.iterdir(), key=lambda path: len(path.name), reverse=True)
        assert aside.name.startswith("step-000020-damaged-") and (newest / "optimizer.pt").read_text() == "new"


def test_a_run_without_any_sound_checkpoint_is_not_silently_started_again(tmp_path):
    config = config_in(tmp_path, resume="auto")
    with RunFolder(tmp_path) as run:
        run.start(config)
        for step in (10, 20):
            (fake_checkpoint(tmp_path, step) / "optimizer.pt").unlink()
        with pytest.raises(ConfigError) as caught:
            run.find_resume(config)
        for word in ("step-000010 is damaged", "step-000020 is damaged", "no sound checkpoint is left"):
            assert word in str(caught.value)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "drivevlm.json").write_text("{}")
        assert run.find_resume(config) is None  # a finished run needs none


def test_other_ranks_come_to_the_same_checkpoint(tmp_path, monkeypatch, capsys):
    config = config_in(tmp_path, resume="auto")
    with RunFolder(tmp_path) as run:
        run.start(config)
    first = fake_checkpoint(tmp_path, 10, processes=2)
    (fake_checkpoint(tmp_path, 20, processes=2) / "optimizer.pt").write_text("x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    capsys.readouterr()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with RunFolder(tmp_path) as run:
            assert run.find_resume(config) == first
        assert ("is damaged" in capsys.readouterr().out) == (rank == "0")  # said once


def test_checkpoints_of_older_versions_are_accepted_with_a_note(tmp_path, capsys):
    config = config_in(tmp_path, resume="auto")
    with RunFolder(tmp_path) as run:
        run.start(config)
        checkpoint = fake_checkpoint(tmp_path, 10)
        (checkpoint / "run.json").write_text('{"num_processes": 1}')
        assert run.find_resume(config) == checkpoint
        assert f"{checkpoint} is of an older version" in capsys.readouterr().out
        (checkpoint / "optimizer.pt").unlink()
        with pytest.raises(ConfigError, match="optimizer.pt is missing"):
            run.find_resume(config)


def test_resume_none_refuses_a_used_folder(tmp_path):
    with RunFolder(tmp_path) as run:
        assert run.find_resume(config_in(tmp_path, resume="none")) is None
        fake_checkpoint(tmp_path, 10)
        with pytest.raises(ConfigError, match="--resume auto"):
            run.find_resume(config_in(tmp_path, resume="none"))


def test_resume_auto_takes_the_newest_checkpoint_and_lists_differences(tmp_path):
    config = config_in(tmp_path, resume="auto")
    with RunFolder(tmp_path) as run:
        assert run.find_resume(config) is None
        run.start(config)
        fake_checkpoint(tmp_path, 10)
        newest = fake_checkpoint(tmp_path, 20)
        (tmp_path / "checkpoints" / ".step-000030").mkdir()
        assert run.find_resume(config) == newest
        other = config_in(tmp_path, learning_rate=2.0, detector=Detector(image_size=64), resume="auto")
        with pytest.raises(ConfigError) as caught:
            run.find_resume(other)
        assert "learning_rate: was 0.001, now 2.0" in str(caught.value)
        assert "detector.image_size: was 1280, now 64" in str(caught.value) and "resume:" not in str(caught.value)


@pytest.mark.parametrize("was, now, start", [(2, 1, "torchrun --nproc_per_node 2"), (1, 2, "without torchrun")])
def test_a_resume_needs_the_same_number_of_processes(was, now, start, tmp_path, monkeypatch):
    with RunFolder(tmp_path / "run") as run:
        run.start(config_in(run.folder))
        checkpoint = fake_checkpoint(run.folder, 10, processes=was)
    monkeypatch.setenv("WORLD_SIZE", str(now))
    for folder, resume in ((tmp_path / "run", "auto"), (tmp_path / "new", checkpoint)):
        with RunFolder(folder) as run, pytest.raises(ConfigError) as caught:
            run.find_resume(config_in(folder, resume=str(resume)))
        assert f"processes: was {was}, now {now}" in str(caught.value) and start in str(caught.value)
        assert "--output_dir NEW can" not in str(caught.value)


@pytest.fixture
def old_run(tmp_path):
    """A run folder with checkpoints of steps 10 and 20."""
    with RunFolder(tmp_path / "old") as run:
        run.start(config_in(run.folder, vision_model="org/tower", language_model=str(tmp_path / "gone" / "llm")))
    fake_checkpoint(run.folder, 10), fake_checkpoint(run.folder, 20)
    return run.folder


def resume_in(folder, checkpoint, **changes):
    """What find_resume says to `--resume checkpoint --output_dir folder`, with the settings of `old_run`."""
    bases = {"vision_model": "org/tower", "language_model": str(Path(folder).parent / "gone" / "llm")}
    with RunFolder(folder) as run:
        return run.find_resume(config_in(folder, resume=str(checkpoint), **(bases | changes)))


def test_resume_from_a_path_applies_another_config_and_says_so(old_run, tmp_path, capsys):
    first = old_run / "checkpoints" / "step-000010"
    changes = {"max_steps": 99, "learning_rate": 0.002, "dtype": "float32", "init_from": "elsewhere",
               "detector": Detector(image_size=64)}
    assert resume_in(tmp_path / "new", first, **changes) == first
    assert capsys.readouterr().out.splitlines() == [
        "resume: init_from: was None, now elsewhere: not used: the weights are in the checkpoint",
        "resume: dtype: was auto, now float32: applied",
        "resume: max_steps: was None, now 99: applied",
        "resume: learning_rate: was 0.001, now 0.002: applied",
        "resume: detector.image_size: was 1280, now 64: applied"]
    stage3 = fake_checkpoint(old_run, 30, reference_sha256="0")  # the KL's reference policy is read from init_from
    resume_in(tmp_path / "new", stage3, init_from="elsewhere")
    assert capsys.readouterr().out == "resume: init_from: was None, now elsewhere: applied\n"


def test_a_resume_on_another_kind_of_machine_says_what_to_do(tmp_path):
    with RunFolder(tmp_path / "run") as run:
        run.start(config_in(run.folder, dtype="bfloat16", video_reader="decord"))
    fake_checkpoint(run.folder, 10)
    with pytest.raises(ConfigError) as caught, RunFolder(tmp_path / "run") as run:
        run.find_resume(config_in(run.folder, resume="auto", dtype="float32", video_reader="pyav"))
    for key, old, new in (("dtype", "bfloat16", "float32"), ("video_reader", "decord", "pyav")):
        line = f"{key}: was {old}, now {new} (to continue as on the machine before: --{key} {old})"
        assert line in str(caught.value)


def test_what_a_checkpoint_fixes_is_refused_in_one_message(old_run, tmp_path):
    (tmp_path / "gone" / "llm").mkdir(parents=True)
    changes = {"vision_model": "org/other", "language_model": "org/llm-2", "num_frames": 8, "pooling": 9, "lora_r": 5,
               "lora_alpha": 9, "lora_dropout": 0.2, "learning_rate": 0.5}
    with pytest.raises(ConfigError) as caught:
        resume_in(tmp_path / "new", old_run, **changes)
    assert "7 problems" in str(caught.value) and "learning_rate" not in str(caught.value)
    for key in set(changes) - {"learning_rate"}:
        assert f"  - {key}: was " in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        resume_in(old_run, "auto", lora_r=5)
    assert "--output_dir NEW can" not in str(caught.value)


def test_base_models_may_have_moved(old_run, tmp_path, capsys):
    newest = old_run / "checkpoints" / "step-000020"
    assert resume_in(tmp_path / "new", old_run, vision_model="/models/tower", language_model="/models/other") == newest
    assert "language_model: was" in capsys.readouterr().out  # the old folder is gone, so the new one may be it
    with pytest.raises(ConfigError, match="vision_model: was org/tower, now /models/other"):
        resume_in(tmp_path / "new", old_run, vision_model="/models/other")  # a hub name is not a folder that is gone


def test_keys_of_another_version_are_not_fixed(old_run, tmp_path):
    text = (old_run / "config.yaml").read_text()
    (old_run / "config.yaml").write_text(text.replace("pooling: 3\n", ""))
    assert resume_in(tmp_path / "new", old_run)


def test_a_run_from_before_time_stamps_has_none(old_run, tmp_path):
    text = (old_run / "config.yaml").read_text()
    assert "time_stamps: false\n" in text
    (old_run / "config.yaml").write_text(text.replace("time_stamps: false\n", ""))
    assert resume_in(old_run, "auto") == resume_in(tmp_path / "new", old_run)
    with pytest.raises(ConfigError, match="time_stamps: was False, now True"):
        resume_in(tmp_path / "new", old_run, time_stamps=True)


def test_resume_from_a_path_needs_the_config_of_the_checkpoint(old_run, tmp_path):
    (old_run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="config.yaml is missing"):
        resume_in(tmp_path / "new", old_run)


def test_resume_from_a_path_may_branch_off_into_an_empty_folder_only(old_run, tmp_path):
    first, last = (old_run / "checkpoints" / name for name in ("step-000010", "step-000020"))
    new = tmp_path / "new"
    assert resume_in(new, first) == first and resume_in(new, old_run) == last and resume_in(old_run, last) == last
    with pytest.raises(ConfigError, match="neither none, auto"):
        resume_in(new, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="branch off"):
        resume_in(old_run, first)
    fake_checkpoint(new, 5)
    with pytest.raises(ConfigError, match="holds checkpoints up to step-000005; continue it with --resume auto"):
        resume_in(new, last)
    shutil.rmtree(new / "checkpoints")
    for folder in (new, old_run):
        (folder / "model").mkdir()
        (folder / "model" / "drivevlm.json").write_text("{}")
    with pytest.raises(ConfigError, match="already holds a finished model"):
        resume_in(new, last)
    with pytest.raises(ConfigError, match="branch off"):
        resume_in(old_run, last)


# ---- trackers --------------------------------------------------------------------------------------------------------


class FakeLibrary(types.ModuleType):
    """wandb or trackio, as far as accelerate and we call them; `calls` holds what they were told."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="a file")
        self.calls, self.key, self.mode = [], True, "online"

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))

    def setup(self):
        return types.SimpleNamespace(settings=self)

    def login(self, prompt=True, verify=True):
        assert not prompt and not verify  # else it asks in the terminal, or waits for its server
        return self.key

    def Html(self, text, inject):  # noqa: N802 - wandb's name
        return f"Html {text}"

    def Markdown(self, text):  # noqa: N802 - trackio's name
        return f"Markdown {text}"


@pytest.fixture
def library(monkeypatch):
    """library(name) installs a fake one."""

    def install(name):
        monkeypatch.setitem(sys.modules, name, FakeLibrary(name))
        return sys.modules[name]

    return install


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "runs")).Reload()


def test_tensorboard_has_curves_texts_and_config_in_runs_and_drops_what_is_done_again(tmp_path):
    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path))
        for step in (1, 2, 3):
            run.log_scalars(step, {"loss": 0.5, "eval_loss": 4, "reward/total": 1.0, "grad_norm": float("nan")})
            run.log_text("answers/copilot", step, "a red\n<b>car</b>")
    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path), fake_checkpoint(tmp_path, 1))
        run.log_scalars(2, {"loss": 0.25})
    found = events(tmp_path)
    assert not [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert sorted(found.Tags()["scalars"]) == ["eval/loss", "reward/total", "train/loss"]
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert [event.step for event in found.Scalars("eval/loss")] == [1]
    answer, text = (found.Tensors(f"{tag}/text_summary")[0].tensor_proto for tag in ("answers/copilot", "config"))
    assert answer.string_val[0] == b"    a red\n    <b>car</b>" and b"    seed: 42\n" in text.string_val[0]
    assert "run_id.txt" not in names(tmp_path)


@pytest.mark.parametrize("name, text", [
    ("trackio", "Markdown     a red\n    <b>car</b>"), ("wandb", "Html <pre>a red\n&lt;b&gt;car&lt;/b&gt;</pre>")])
def test_trackio_and_wandb_get_names_numbers_and_texts(name, text, tmp_path, library):
    fake, folder = library(name), tmp_path / "stage 1"
    with RunFolder(folder) as run:
        run.start(config_in(folder, report_to=name, seed=5))
        run.log_scalars(1, {"loss": 0.5, "eval_loss": 4.0, "reward/total": 1.0, "grad_norm": float("nan")})
        run.log_scalars(2, {"loss": None})
        run.log_text("answers/copilot", 2, "a red\n<b>car</b>")
        run.draw_curves({"loss": ["loss"]})
    (_, options), *logged = fake.calls
    run_id = (folder / "run_id.txt").read_text().strip()
    assert options["project"] == "drive-vlm" and options["resume"] == "allow" and options["config"]["seed"] == 5
    assert options["name"] == run_id and re.fullmatch("stage-1-[0-9a-f]{8}", run_id)
    assert name == "trackio" or (options["id"], options["dir"]) == (run_id, str(folder))
    assert logged == [("log", 1, {"train/loss": 0.5, "eval/loss": 4.0, "reward/total": 1.0}),
                      ("log", 2, {"answers/copilot": text}), ("finish",)]
    assert names(folder) == [".lock", "config.yaml", "curves.png", "metrics.jsonl", "run_id.txt", "train.log"]
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2]


def test_report_to_none_leaves_numbers_log_and_curves(tmp_path):
    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path, report_to="none"))
        run.log_scalars(1, {"loss": 0.5}, line="a line")
        run.log_text("answers/copilot", 1, "a red car")
        run.draw_curves({"loss": ["loss"]})
    assert names(tmp_path) == [".lock", "config.yaml", "curves.png", "metrics.jsonl", "train.log"]
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    assert "a line" in (tmp_path / "train.log").read_text()


def test_only_rank_0_reports(tmp_path, monkeypatch, library):
    fake = library("wandb")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    fake.key = False
    assert tracker_problems("wandb") == []  # rank 0 says it
    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path, report_to="wandb"))
        run.log_scalars(1, {"loss": 1.0})
        run.log_text("a", 1, "x")
    assert fake.calls == [] and names(tmp_path) == []


def test_a_resumed_run_keeps_its_name_at_the_tracker_and_a_new_one_gets_another(tmp_path, library):
    fake = library("wandb")
    checkpoint, elsewhere = fake_checkpoint(tmp_path / "run", 1), tmp_path / "elsewhere"
    for folder, resumed in ((tmp_path / "run", None), (tmp_path / "run", checkpoint), (elsewhere, checkpoint),
                            (tmp_path / "run", None)):
        with RunFolder(folder) as run:
            run.start(config_in(folder, report_to="wandb"), resumed)
    first, resumed, branch, again = (call[1]["id"] for call in fake.calls if call[0] == "init")
    assert first == resumed and len({first, branch, again}) == 3


def test_a_resumed_run_may_report_to_something_else(tmp_path):
    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path))
    checkpoint = fake_checkpoint(tmp_path, 10)
    with RunFolder(tmp_path) as run:
        assert run.find_resume(config_in(tmp_path, resume="auto", report_to="none")) == checkpoint


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
@pytest.mark.parametrize("breaks", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(name, breaks, tmp_path, library, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("the service\nis down")

    if name == "tensorboard":
        from accelerate.tracking import TensorBoardTracker
        monkeypatch.setattr(TensorBoardTracker, breaks, broken)
    else:
        setattr(library(name), {"start": "init"}.get(breaks, breaks), broken)
    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path, report_to=name))
        for step in (1, 2, 3):
            run.log_scalars(step, {"loss": 1.0}, line="a line")
            run.log_text("a", step, "b")
        assert (run._tracker is None) == (breaks == "start")
    out, err = capsys.readouterr()
    what = f"write {tmp_path / 'runs'}" if name == "tensorboard" else f"report to {name}"
    assert err == f"warning: cannot {what}: RuntimeError: the service is down; the run goes on without it\n"
    assert out.count("a line") == 3 and len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_a_library_that_is_not_installed_is_among_all_problems_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "AutoTokenizer", None)
    for name, other in (("wandb", "tensorboard"), ("trackio", "tensorboard"), ("tensorboard", "none")):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        config = config_in(tmp_path, report_to=name, data=str(tmp_path / "no.json"), video_root=str(tmp_path))
        with pytest.raises(ConfigError) as caught:
            loop.load_inputs(config, stage=1)
        said = str(caught.value)
        assert f"  - report_to: {name} is not installed: pip install {name}, or report_to: {other}\n" in said
        assert "no.json" in said
    assert tracker_problems("none") == []


def test_a_folder_that_wandb_left_behind_is_not_the_library(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "wandb is not installed" in tracker_problems("wandb")[0]


def test_wandb_asks_for_nothing(library, monkeypatch):
    fake = library("wandb")
    assert tracker_problems("wandb") == []
    fake.key = False
    assert tracker_problems("wandb") == [
        "report_to: wandb has no key: wandb login, or WANDB_MODE=offline, or report_to: tensorboard"]
    monkeypatch.setattr(fake, "login", lambda anonymous=None: True, raising=False)
    fake.__version__ = "0.20"
    assert tracker_problems("wandb") == [
        "report_to: wandb 0.20 cannot say whether it has a key: pip install -U wandb, or WANDB_MODE=offline"]

    def short(prompt, verify):
        raise ValueError("a key has 40 characters")

    monkeypatch.setattr(fake, "login", short)
    assert tracker_problems("wandb") == ["report_to: wandb cannot be used: ValueError: a key has 40 characters"]
    for fake.mode in ("offline", "disabled"):
        assert tracker_problems("wandb") == []


# ---- disks that are full ---------------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_open(monkeypatch, name):
    """Opening the run folder's file `name` for writing gives a file on a full disk."""
    real = open

    def opening(path, mode="r", **options):
        file = real(path, mode, **options)
        if Path(path).name == name and mode != "r":
            file.close()
            file = io.TextIOWrapper(io.BufferedWriter(FullDisk()), write_through=True)
        return file

    monkeypatch.setattr("builtins.open", opening)


class FullDisk(io.RawIOBase):
    writable = lambda self: True  # noqa: E731
    write = full


def test_a_save_on_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    def raises(error):
        raise error

    hidden = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")  # as torch.save does
    rust = Exception("Error while serializing: I/O error: No space left on device (os error 28)")  # safetensors
    def torch_into_a_file():
        try:
            full()
        except OSError:
            raises(RuntimeError("unexpected pos 704 vs 598"))

    no_space = "No space left on device"
    for cause, words in ((full, no_space), (torch_into_a_file, no_space), (lambda: raises(rust), no_space),
                         (lambda: raises(hidden), r"unexpected pos 576 vs 534 \(is the disk full\?\)")):
        with pytest.raises(TrainingError, match=rf"cannot write .*checkpoints/step-000004: .*{words}") as caught:
            with RunFolder(tmp_path) as run:
                run.start(config_in(tmp_path))
                shutil.rmtree(run.checkpoints, ignore_errors=True)
                with run.checkpoint(2, keep=1) as folder:
                    (folder / "optimizer.pt").write_text("2")
                with run.checkpoint(4, keep=1) as folder:
                    (folder / "half").write_text("")
                    cause()
        assert caught.value.code == 1 and "cannot write" in capsys.readouterr().out
        assert names(run.checkpoints) == ["step-000002"] and "cannot write" in (tmp_path / "train.log").read_text()
    for module, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename")):
        with RunFolder(tmp_path) as run, monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(TrainingError, match="No space"), run.checkpoint(4, keep=1) as folder:
                (folder / "half").write_text("")
        assert names(run.checkpoints) == ["step-000002"], name


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_results_that_cannot_be_written_end_the_run(name, tmp_path, monkeypatch, capsys):
    with pytest.raises(TrainingError, match=f"cannot write {tmp_path}/{name}: No space left on device"):
        with RunFolder(tmp_path) as run:
            run.start(config_in(tmp_path))
            full_open(monkeypatch, name)
            run.log_scalars(1, {"loss": 1.0})
            run.log_rollouts([{"step": 1}])
    assert f"stopped by TrainingError: cannot write {tmp_path}/{name}" in capsys.readouterr().out
    monkeypatch.undo()
    RunFolder(tmp_path).close()  # the lock is free


def test_logs_that_cannot_be_written_are_a_warning_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.run_folder.plot_curves", full)
    full_open(monkeypatch, "train.log")
    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path))
        monkeypatch.setattr(run._tracker.writer, "add_scalar", full)
        monkeypatch.setattr(run._tracker.writer, "add_text", full)
        monkeypatch.setattr(run._tracker.writer, "flush", full)
        for step in (1, 2, 3):
            run.log_scalars(step, {"loss": 1.0}, line="a line")
            run.log_text("a", step, "b")
            run.draw_curves({"loss": ["loss"]})
        monkeypatch.setattr(run._tracker.writer, "close", full)
    out, err = capsys.readouterr()
    assert out.count("a line") == 3 and len(read_jsonl(tmp_path / "metrics.jsonl")) == 3
    assert sorted(err.splitlines()) == [
        f"warning: cannot write {tmp_path / name}: No space left on device; the run goes on without it"
        for name in ("curves.png", "runs", "train.log")]


def test_a_console_that_is_gone_does_not_end_a_run(tmp_path, monkeypatch):
    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path))
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(FullDisk()), write_through=True))
        run.print("a line")
    assert "a line" in (tmp_path / "train.log").read_text()


def test_logs_that_cannot_be_opened_are_a_warning_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", full)
    (tmp_path / "train.log").mkdir()
    with RunFolder(tmp_path) as run:
        run.start(config_in(tmp_path))
        run.log_scalars(1, {"loss": 1.0}, line="a line")
        run.log_text("a", 1, "b")
    assert capsys.readouterr().err.count("warning: cannot write") == 2
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


ON_A_SMALL_DISK = """
import os, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from types import SimpleNamespace
import torch
from test_run_folder import Config
from training import loop
from training.common import run_main
from training.run_folder import RunFolder, checkpoint_problems

def fill():
    with open("full", "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return

def save_model(folder, stage):
    folder.mkdir()
    (folder / "drivevlm.json").write_text("x")

model, sound = SimpleNamespace(save_checkpoint=save_model), SimpleNamespace(reasons=set())
alone = SimpleNamespace(wait_for_everyone=lambda: None)

def main():
    with RunFolder("run") as run:
        run.start(Config(output_dir="run"))
        for step, size in ((1, 1000), (2, 1000), (3, 10**6)):
            if step == 3 and {kind!r} == "logs":
                fill()
            run.log_scalars(step, {{f"number {{i}}": 1.0 for i in range(size // 100)}}, line=f"step {{step}}")
            optimizer = SimpleNamespace(state_dict=lambda: torch.zeros(size))
            loop.save_checkpoint(SimpleNamespace(keep_checkpoints=1), run, alone, model, optimizer, step, 1, sound)

try:
    run_main(main)
finally:
    print("left:", os.listdir("run/checkpoints"), checkpoint_problems(Path("run/checkpoints/step-000002")))
"""


def test_a_result_that_cannot_be_written_ends_the_run_in_one_line(tmp_path):
    run = types.SimpleNamespace(model_folder=tmp_path / "model")
    with pytest.raises(TrainingError, match=f"cannot write {tmp_path}/model: No space left"):
        loop.save_result(run, types.SimpleNamespace(save_checkpoint=full), stage=1)


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir: cannot write .*file/.lock: Not a directory|File exists"):
        RunFolder(tmp_path / "file")
    with pytest.raises(TrainingError, match=f"cannot write {tmp_path}: No space left"), RunFolder(tmp_path) as run:
        monkeypatch.setattr("training.run_folder.write_text", full)
        run.start(config_in(tmp_path))


def test_folders_that_cannot_be_synchronised_are_let_go_but_nothing_else(tmp_path, monkeypatch):
    def failing(number):
        def fsync(descriptor):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(os, "fsync", fsync)

    failing(errno.EINVAL)
    descriptors = len(os.listdir("/dev/fd"))
    sync_to_disk(tmp_path)
    assert len(os.listdir("/dev/fd")) == descriptors
    failing(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        sync_to_disk(tmp_path)


@pytest.mark.parametrize("kind, words", [("torch", "run/checkpoints/step-000003: No space left"),
                                         ("logs", "run/metrics.jsonl: No space left")])
def test_a_real_full_disk(kind, words, tmp_path):
    disk, script = tmp_path / "disk", tmp_path / "on_a_small_disk.py"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    script.write_text(ON_A_SMALL_DISK.format(root=str(ROOT), kind=kind))
    command = f"{mount} && cd {disk} && exec {sys.executable} {script}"
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", command], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in said, said
    assert f"cannot write {words}" in said and "left: ['step-000002'] []" in said, said


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_all_that_is_missing_is_in_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    config = config_in(tmp_path, data=str(tmp_path / "no.json"), video_root=str(tmp_path / "no"),
                       val_data=str(tmp_path / "no_val.json"), vision_model=str(tmp_path / "empty"),
                       language_model="./no-model", init_from=None)
    with pytest.raises(ConfigError) as caught:
        loop.load_inputs(config, stage=2, problems=["one of the caller's"])
    text = str(caught.value)
    assert "7 problems" in text
    for word in ("no.json", "no_val.json", "video_root: no folder", "holds no config.json",
                 "no such folder: ./no-model", "--init_from output/stage1", "one of the caller's"):
        assert word in text


def write_stage1(folder):
    """A folder that looks like stage 1's result, as far as can be seen before a model is loaded."""
    (folder / "stage1" / "model").mkdir(parents=True)
    bases = {"vision_model": {"name": "org/tower"}, "language_model": {"name": "/gone/llm"}}
    meta = {"stage": 1, "num_frames": 16, "tokens_per_frame": 81, "dtype": "bfloat16", "placeholder": "<x>"} | bases
    (folder / "stage1" / "model" / "drivevlm.json").write_text(json.dumps(meta))
    for name in ("projector.safetensors", "tokenizer_config.json"):
        (folder / "stage1" / "model" / name).write_text("{}")


@pytest.mark.parametrize("name, stage, changes, word", [
    (None, 1, {}, None), ("stage1", 2, {}, None), ("stage1/model", 2, {}, None), ("stage1", 1, {}, "takes none"),
    ("stage1", 3, {}, "it holds stage 1, but stage 2 is needed"), (None, 2, {}, "starts from stage 1's run folder"),
    ("nowhere", 2, {}, "no checkpoint folder at"), ("stage1", 2, {"num_frames": 8}, "num_frames: 8"),
    ("stage1", 2, {"vision_model": "org/other"}, "vision_model: org/other, but"),
    ("stage1", 2, {"language_model": "moved/here"}, None),  # the old folder no longer exists
])
def test_init_from_must_be_the_stage_before(name, stage, changes, word, tmp_path):
    write_stage1(tmp_path)
    values = {"init_from": name and str(tmp_path / name), "num_frames": 16, "vision_model": "org/tower",
              "language_model": "/gone/llm"}
    problems = loop._init_from_problems(config_in(tmp_path, **(values | changes)), stage)
    assert problems == [] if word is None else word in problems[0]


def test_an_unfinished_stage_before_is_refused_with_what_is_missing(tmp_path):
    write_stage1(tmp_path)
    (tmp_path / "stage1" / "model" / "projector.safetensors").unlink()
    problems = loop._init_from_problems(config_in(tmp_path, init_from=str(tmp_path / "stage1")), 2)
    assert "projector.safetensors is missing" in problems[0] and "has stage 1 finished?" in problems[0]


def test_entries_are_checked_too(tiny, tmp_path):
    def check(rows, modes=(), num_val_videos=1, **changes):
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        settings = {"video_root": str(tiny.videos), "vision_model": str(tiny.vision), "language_model": str(tiny.llm)}
        config = config_in(tmp_path, data=str(tmp_path / "rows.json"), num_val_videos=num_val_videos,
                           **(settings | changes))
        return loop.load_inputs(config, stage=1, modes=modes)

    both = {"microscope": ["A car."], "copilot": ["Car."]}
    train, held_out = check([{"video": "car.mp4"} | both, {"video": "bus.mp4"} | both], ("microscope", "copilot"))
    assert len(train) == len(held_out) == 2
    assert check([{"video": "car.mp4"} | both, {"video": "bus.mp4"} | both], max_failed_share=0)  # none is missing
    for rows, word in (
        ([{"video": "car.mp4"} | both, {"video": "gone.mp4"} | both], "1 of 2 clips are missing"),
        ([{"video": "car.mp4", "microscope": ["x"]}, {"video": "bus.mp4", "microscope": ["x"]}], "no copilot entries"),
        ([{"video": "car.mp4"} | both], "none left to train on"),
        ([{"video": "../car.mp4"} | both, {"video": "bus.mp4"} | both], "../car.mp4"),
        ([{"clip": "car.mp4"}], "clip"),
    ):
        with pytest.raises(ConfigError) as caught:
            check(rows, modes=("microscope", "copilot"))
        assert word in str(caught.value), str(caught.value)
    images_of(tiny.videos / "car.mp4", tmp_path / "videos" / "car")
    images_of(tiny.videos / "bus.mp4", tmp_path / "videos" / "bus")
    rows = [{"video": "car"} | both, {"video": "bus"} | both]
    train, held_out = check(rows, num_val_videos=1, video_root=str(tmp_path / "videos"))
    assert len(train) == len(held_out) == 2
    (tmp_path / "videos" / "empty").mkdir()
    with pytest.raises(ConfigError, match="1 of 3 clips are missing"):
        check([*rows, {"video": "empty"} | both], video_root=str(tmp_path / "videos"))


def test_held_out_clips_may_have_a_file_of_their_own(tiny, tmp_path):
    both = {"microscope": ["A car."], "copilot": ["Car."]}
    (tmp_path / "val.json").write_text(json.dumps([{"video": "walk.mp4"} | both]))
    (tmp_path / "rows.json").write_text(json.dumps([{"video": "car.mp4"} | both, {"video": "bus.mp4"} | both]))
    config = config_in(tmp_path, data=str(tmp_path / "rows.json"), val_data=str(tmp_path / "val.json"),
                       video_root=str(tiny.videos), vision_model=str(tiny.vision), language_model=str(tiny.llm))
    train, held_out = loop.load_inputs(config, stage=1)
    assert {e.video for e in train} == {"car.mp4", "bus.mp4"} and {e.video for e in held_out} == {"walk.mp4"}
    (tmp_path / "val.json").write_text(json.dumps([{"video": "./bus.mp4"} | both]))
    with pytest.raises(ConfigError, match=r"val_data: 1 of its clips are also in .*rows.json: ./bus.mp4"):
        loop.load_inputs(config, stage=1)


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_curves_are_drawn_for_panels_with_values_only(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null, "kl": 0.1}\n')
    plot_curves(metrics, tmp_path / "a.png", {"loss": ["loss"], "rate": ["learning_rate"]})
    plot_curves(metrics, tmp_path / "b.png", {"KL": ["kl"], "reward": ["reward"]})
    plot_curves(tmp_path / "none.jsonl", tmp_path / "c.png", {"loss": ["loss"]})
    assert (tmp_path / "a.png").is_file() and (tmp_path / "b.png").is_file() and not (tmp_path / "c.png").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "metrics.jsonl"]


def test_curves_mark_the_last_best_step(tmp_path, monkeypatch):
    import matplotlib.axes

    marks, metrics = [], tmp_path / "metrics.jsonl"
    monkeypatch.setattr(matplotlib.axes.Axes, "axvline", lambda axis, x, **_: marks.append(x))
    metrics.write_text('{"step": 2, "loss": 2.0, "best_step": 2}\n{"step": 4, "loss": 1.0, "best_step": 4, "kl": 1}\n')
    plot_curves(metrics, tmp_path / "a.png", {"loss": ["loss"], "KL": ["kl"]})
    assert marks == [4, 4] and not matplotlib.pyplot.get_fignums()  # the figure is closed


def test_only_what_tensorboards_writer_says_of_its_files_is_no_traceback(tmp_path):
    run, shown = RunFolder(tmp_path), []
    run._thread_hook = shown.append
    writer, other = type("_AsyncWriterThread", (), {})(), object()
    errors = [types.SimpleNamespace(exc_type=kind, thread=thread)
              for kind in (OSError, PermissionError, ValueError) for thread in (writer, other)]
    for error in errors:
        run._quiet_writer(error)
    assert shown == [errors[i] for i in (1, 3, 4, 5)]
    run.close()


def test_smoothing_is_not_biased_towards_the_start():
    assert _smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])

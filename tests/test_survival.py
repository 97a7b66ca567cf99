"""What a run survives, and what it refuses: signals, other data, clips that were trained on, rewards that fail."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_stage3 import run_stage3, stage2  # noqa: F401 - a fixture
from test_stages import deterministic, files, flags, stage1
from test_stages import stage2 as train2

import train_stage1_ddp
from dataset import load_entries, split_by_video
from evaluate import evaluate
from model import DriveVLM, read_clips
from stage3.grpo_reward_func import Reward
from training import loop
from training.common import ConfigError, TrainingError, read_jsonl, run_main
from training.config import EvaluateConfig, Stage1Config
from training.run_folder import last_checkpoint

ROOT = Path(__file__).resolve().parents[1]


# ---- which clips were trained on, which were held out ----------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    """A finished stage 1."""
    return stage1(tiny, tmp_path_factory.mktemp("survival") / "stage1", max_steps=2)


def test_a_checkpoint_says_which_clips_it_was_trained_on_and_which_were_held_out(one, tiny, tmp_path):
    train, held_out = split_by_video(load_entries(tiny.data), 2, 42)
    clips = {"trained": sorted({e.video for e in train}), "held_out": sorted({e.video for e in held_out})}
    assert read_clips(one) == clips == read_clips(one / "checkpoints" / "step-000002" / "model")
    two = train2(tiny, tmp_path / "two", one, max_steps=1)
    assert read_clips(two) == clips
    model = DriveVLM.from_checkpoint(one)
    (entry,) = [e for e in train if e.mode == "copilot"][:1]
    moved = [e for e in train if e.video != entry.video]
    loop.record_clips(Stage1Config(video_root=str(tiny.videos)), model, moved, held_out)
    assert model.clips == clips  # what an earlier stage was trained on stays trained on


def test_the_next_stage_refuses_to_hold_out_what_was_trained_on(one, tiny, tmp_path):
    trained = read_clips(one)["trained"]
    with pytest.raises(ConfigError, match="clips that would be held out here were trained on by .*stage1") as error:
        train2(tiny, tmp_path / "two", one, split_seed=1, num_val_videos=3)
    assert any(clip in str(error.value) for clip in trained) and not (tmp_path / "two").exists()


def test_evaluation_refuses_clips_that_a_checkpoint_was_trained_on(one, tiny, tmp_path, capsys):
    config = EvaluateConfig(
        data=str(tiny.data), video_root=str(tiny.videos), checkpoint=[f"stage1={one}"], num_val_videos=3, split_seed=1,
        output_dir=str(tmp_path / "out"), truth="no.json", dtype="float32")
    with pytest.raises(ConfigError, match="were trained on by"):
        evaluate(config)
    config.num_val_videos, config.split_seed = 2, 42
    with pytest.raises(ConfigError) as error:
        evaluate(config)
    assert "were trained on" not in str(error.value)


def test_a_resume_refuses_other_clips(one, tiny, tmp_path):
    rows = json.loads(tiny.data.read_text())
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    folder = stage1(tiny, tmp_path / "run", max_steps=2, data=data)
    (folder / "model" / "drivevlm.json").unlink()  # as if it had been killed before the end
    trained = read_clips(folder / "checkpoints" / "step-000002" / "model")["trained"]
    data.write_text(json.dumps([row for row in rows if row["video"] != trained[0]] + [{**rows[0], "video": "new.mp4"}]))
    (tiny.videos / "new.mp4").write_bytes((tiny.videos / trained[0]).read_bytes())
    try:
        with pytest.raises(ConfigError, match="continues on the same data only|were trained on by"):
            stage1(tiny, folder, "--resume=auto", max_steps=2, data=data)
    finally:
        (tiny.videos / "new.mp4").unlink()
    data.write_text(json.dumps(rows))
    stage1(tiny, folder, "--resume=auto", max_steps=2, data=data)
    assert (folder / "model" / "drivevlm.json").is_file()


# ---- signals ---------------------------------------------------------------------------------------------------------


def endless(tiny, folder, **changes):
    """Flags of a run that only a signal ends."""
    return flags(tiny, folder, max_steps=100_000, save_every=100_000, eval_every=100_000, sample_every=100_000,
                 warmup=0, lr_schedule="constant", **changes)


def wait_for_steps(folder, running):
    limit = time.monotonic() + 120
    while len(read_jsonl(folder / "metrics.jsonl")) < 4 and running() and time.monotonic() < limit:
        time.sleep(0.05)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_exits_with_its_code(tiny, tmp_path, number, code):
    """The program in a process that is forked from this one, which has imported all that is slow."""

    def program():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(tmp_path / "log", "w", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            run_main(lambda: train_stage1_ddp.main(endless(tiny, tmp_path / "run")))

    run = multiprocessing.get_context("fork").Process(target=program, daemon=True)
    run.start()
    wait_for_steps(tmp_path / "run", run.is_alive)
    os.kill(run.pid, number)
    run.join(60)
    out = (tmp_path / "log").read_text()
    assert run.exitcode == code, out
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint.name == f"step-{rows[-1]['step']:06d}" and (checkpoint / "optimizer.pt").is_file()
    assert "finishing this step" in out and "--resume auto" in out and "Traceback" not in out
    with open(tmp_path / "run" / ".lock") as lock:  # the folder is free again
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_stopped_by_a_signal_continues_to_the_same_bytes(tiny, tmp_path, monkeypatch):
    whole = stage1(tiny, tmp_path / "whole")
    log_step = loop.log_step

    def with_signal(run, step, *args):
        log_step(run, step, *args)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(loop.Interrupted) as stopped:
        patch.setattr(loop, "log_step", with_signal)
        stage1(tiny, tmp_path / "run")
    assert stopped.value.code == 143 and last_checkpoint(tmp_path / "run").name == "step-000003"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # handlers are as before
    stage1(tiny, tmp_path / "run", "--resume=auto")
    assert files(tmp_path / "run" / "model") == files(whole / "model")
    assert deterministic(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == deterministic(
        read_jsonl(whole / "metrics.jsonl"))


def test_two_processes_stop_together_and_leave_nothing_running(tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = endless(tiny, tmp_path / "run", gradient_accumulation_steps=1)
    run = subprocess.Popen([*command, "train_stage1_ddp.py", *argv], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    wait_for_steps(tmp_path / "run", lambda: run.poll() is None)
    os.killpg(run.pid, signal.SIGTERM)
    out, _ = run.communicate(timeout=90)
    assert run.returncode != 0 and "finishing this step" in out, out
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert last_checkpoint(tmp_path / "run").name == f"step-{rows[-1]['step']:06d}"
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path / "run") not in processes


def test_a_second_signal_exits_at_once():
    code = ("import os, signal, time\nfrom training.loop import StopSignals\n"
            "with StopSignals():\n    os.kill(os.getpid(), signal.SIGTERM)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
            "    time.sleep(60)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 143 and "once more exits at once" in done.stdout


# ---- rewards that fail -----------------------------------------------------------------------------------------------


def broken(caption, evidence, mode, reference=None):
    if caption != "A car ahead.":  # the probe before training
        raise KeyError("no such class")
    return Reward(0.5, 0.5, 0.5, 0.5, 0.5)


def not_finite(caption, evidence, mode, reference=None):
    return Reward(0.5 if caption == "A car ahead." else float("nan"), 0.5, 0.5, 0.5, 0.5)


@pytest.mark.parametrize("name, word", [("broken", "KeyError: 'no such class'"), ("not_finite", "reward is nan, on")])
def test_a_reward_that_fails_ends_the_run_and_names_the_answer(stage2, tmp_path, name, word):  # noqa: F811
    with pytest.raises(TrainingError, match=word) as error:
        run_stage3(stage2, tmp_path / "run", "--reward", f"test_survival:{name}")
    assert "#microscope" in str(error.value) or "#copilot" in str(error.value)

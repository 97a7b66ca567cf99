"""The demo's runner: finished parts are not done again, cut-off ones continue, changed ones are redone.

    python -m pytest tests/test_demo.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo import results, results_page
from demo import run as demo
from demo.pictures import readme_table
from training.common import load_config
from training.config import (
    CheckConfig,
    DetectConfig,
    EvaluateConfig,
    Stage1Config,
    Stage2Config,
    Stage3Config,
)

ROOT = Path(__file__).resolve().parents[1]
WRITE = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(parents=True, exist_ok=True); " \
        "f = p / 'log'; f.write_text((f.read_text() if f.exists() else '') + ' '.join(sys.argv[2:]) + '|')"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Two parts in their own folder; the second trains and has a YAML configuration."""
    monkeypatch.setattr(demo, "OUT", tmp_path / "out")
    config = tmp_path / "b.yaml"
    config.write_text("x: 1")
    return [
        demo.Part("a", "part a", [sys.executable, "-c", WRITE, str(tmp_path / "out/a"), "made"], tmp_path / "out/a", 1),
        demo.Part("b", "part b", [sys.executable, "-c", WRITE, str(tmp_path / "out/b"), str(config)],
                  tmp_path / "out/b", 1, trains=True),
    ]


def logs(parts):
    return [(part.folder / "log").read_text().split("|")[:-1] for part in parts]


def test_finished_parts_are_not_done_again(parts, capsys):
    demo.run_parts(parts)
    first = logs(parts)
    demo.run_parts(parts)
    assert logs(parts) == first
    assert capsys.readouterr().out.count("done before") == 2
    assert first[1][0].endswith("--resume auto")


def test_a_cut_off_part_continues_in_its_folder(parts):
    demo.run_parts(parts)
    stamp = demo.OUT / ".done" / "b.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "seconds": None}))  # started but not finished
    demo.run_parts(parts)
    assert [len(log) for log in logs(parts)] == [1, 2]  # what b had written was kept


def test_a_changed_config_redoes_its_part_and_what_follows(parts, tmp_path):
    demo.run_parts(parts)
    (tmp_path / "b.yaml").write_text("x: 2")
    demo.run_parts(parts)
    assert [len(log) for log in logs(parts)] == [1, 1]  # b again, in an empty folder; a untouched
    parts[0].command[-1] = "otherwise"
    demo.run_parts(parts)
    assert [log[0].split()[-1] for log in logs(parts)][0] == "otherwise"
    assert [len(log) for log in logs(parts)] == [1, 1]


def test_a_failing_part_stops_with_its_command(parts):
    parts[0].command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(SystemExit, match="'part a' failed with exit code 3"):
        demo.run_parts(parts)
    assert not parts[1].folder.exists()


def test_the_demo_runs_every_script_on_its_demo_config():
    parts = demo.demo_parts()
    commands = [" ".join(part.command) for part in parts]
    for script in ("demo.world", "check_dataset.py", "train_stage1_ddp.py", "train_stage2.py", "train_stage3.py",
                   "stage3.detect_objects", "evaluate.py"):
        assert any(script in command for command in commands), script
    for command in commands:
        for config in re.findall(r"\S+\.yaml", command):
            assert (ROOT / config).is_file(), config
    assert "--nproc_per_node 2" in commands[3]
    assert demo.environment()["CUDA_VISIBLE_DEVICES"] == ""  # two processes, and the same numbers, with any GPU


PROGRAMS = {"train_stage1_ddp.py": Stage1Config, "train_stage2.py": Stage2Config, "train_stage3.py": Stage3Config,
            "evaluate.py": EvaluateConfig, "check_dataset.py": CheckConfig, "stage3.detect_objects": DetectConfig}


@pytest.mark.parametrize("part", results.all_parts(), ids=lambda part: part.name)
def test_every_command_of_the_results_is_understood(part):
    """Its flags, by the program itself; what a part needs comes before it."""
    parts = results.all_parts()
    names = [other.name for other in parts]
    assert names.count(part.name) == 1
    assert all(names.index(needed) < names.index(part.name) for needed in part.needs)
    assert sum(other.folder == part.folder for other in parts) == 1
    for program, cls in PROGRAMS.items():
        if program in part.command:
            flags = part.command[part.command.index(program) + 1 :]
            written = Path(flags[flags.index("--config") + 1])
            if demo.OUT in written.parents:  # by a part before it, from the demo's own
                flags[flags.index("--config") + 1] = "configs/demo/stage3.yaml"
            load_config(cls, flags)  # a flag that does not exist, or a value that cannot work, ends here


def test_parts_depend_on_what_they_need_alone(parts):
    third = demo.Part("c", "part c", ["c"], parts[0].folder, 1, needs=("a",))
    before = demo.marks_of([*parts, third])
    parts[1].command.append("--other")
    after = demo.marks_of([*parts, third])
    assert before["b"] != after["b"] and before["c"] == after["c"] and before["a"] == after["a"]
    parts[0].command.append("--other")
    assert demo.marks_of([*parts, third])["c"] != after["c"]


def test_parts_run_at_once_as_soon_as_what_they_need_is_done(tmp_path, monkeypatch, capsys):
    """a and b wait for each other, so both must run at a time; c needs both. Run again, nothing runs."""
    monkeypatch.setattr(demo, "OUT", tmp_path / "out")
    meet = ("import pathlib, sys, time; own, other = map(pathlib.Path, sys.argv[1:]); own.mkdir(parents=True)\n"
            "end = time.time() + 30\nwhile not other.exists(): assert time.time() < end; time.sleep(0.05)")
    folders = {name: tmp_path / "out" / name for name in "abc"}
    begin = [sys.executable, "-c", WRITE, str(tmp_path / "out" / "start")]
    parts = [demo.Part("start", "start", begin, tmp_path / "out" / "start", 1)]
    for own, other, needs in (("a", "b", "start"), ("b", "a", "start"), ("c", "a", ("a", "b"))):
        command = [sys.executable, "-c", meet, str(folders[own]), str(folders[other])]
        parts.append(demo.Part(own, f"part {own}", command, folders[own], 1,
                               needs=(needs,) if isinstance(needs, str) else needs))
    demo.run_at_once(parts, 2)
    said = capsys.readouterr().out
    assert said.count("took") == 4 and said.index("part c") > max(said.index(f"part {name}: took") for name in "ab")
    demo.run_at_once(parts, 2)
    assert capsys.readouterr().out == ""
    parts[3].command = [sys.executable, "-c", "print('gone'); raise SystemExit(3)"]
    with pytest.raises(SystemExit, match="'part c' failed with exit code 3. Its output: .*c.log"):
        demo.run_at_once(parts, 2)
    assert (tmp_path / "out" / "logs" / "c.log").read_text() == "gone\n"


def metrics_of_a_run(systems, value):
    keys = [*results_page.COLUMNS, "order"]
    block = dict.fromkeys(keys, value) | {"interval": {key: [value - 0.1, value + 0.1] for key in keys}}
    block |= {"mentions": 3, "claims": 3, "traps_there": 3, "traps_absent": 3, "nll_tokens": 3, "order_pairs": 0}
    modes = {"microscope": block, "copilot": block}
    change = {key: [0.1, -0.2, 0.3] for key in keys} | {"recall": [-0.2, -0.3, -0.1]}
    pairs = [{"before": name, "after": "stage3", "microscope": change, "copilot": change} for name in systems]
    pairs.append({"before": "stage2", "after": "new", "microscope": change, "copilot": change})
    systems = dict.fromkeys(systems, modes | {"mode_accuracy": 1.0, "mode_accuracy_unseen": 1 - value})
    asked = {"copilot": {"Short?": {"asked": 600, "right": 9, "broken": 2}, "In brief?": {"asked": 4, "right": 1,
                                                                                        "broken": 1}}}
    return {"systems": systems, "differences": pairs, "agreed": {"systems": systems},
            "unseen_wordings": dict.fromkeys(systems, asked),
            "words_in_range": {mode: [1, 9] for mode in modes}}


def test_no_part_writes_into_the_folder_of_another():
    """A part whose configuration has changed removes its folder before it starts."""
    folders = [part.folder for part in results.all_parts()]
    assert len(set(folders)) == len(folders)
    assert not [(inner, outer) for inner in folders for outer in folders if outer in inner.parents]


def test_the_results_page_holds_what_was_run_and_names_what_was_not(tmp_path, monkeypatch):
    for module in (demo, results):
        monkeypatch.setattr(module, "OUT", tmp_path)
    for module in (results, results_page):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results_page, "DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()

    def put(name, *run):
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics_of_a_run(*run)))

    names = list(results_page.SYSTEMS)
    put("seed42/table", names, 0.2)
    put("seed1/table", names, 0.4)
    page = results_page.write_page([42, 1, 2]).read_text()
    assert "Not run yet: the table of seed 2, look, ablations, faults, over." in page
    assert "0.30 (0.20–0.40)" in page  # mean and range of the two seeds
    assert "| recall | **-0.200 [-0.300, -0.100]** | **-0.200 [-0.300, -0.100]** |" in page  # worse in both
    assert "| CHAIRi | +0.100 [-0.200, +0.300] |" in page
    assert "| **stage 3 (GRPO)** | 1.000 (1.000–1.000) | 0.700 (0.600–0.800) | 6 of 1,208 |" in page
    assert "still watched" not in page and "to learn about claims" not in page
    put("faults", ["stage2", *(f"dose{dose}" for dose in (0, 5, 15, 30)), "blind_person"], 0.1)
    put("ablations", ["stage2", "stage3"], 0.1)
    put("look", ["prior", "stage1", "stage2", "stage3", "blank", "stage3/blank"], 0.1)
    put("over", ["stage2", *(f"step{step}" for step in range(35, 281, 35))], 0.1)
    first = {f"eval_{key}_{mode}": 0.25 for key in ("reward", "gap_swapped", "gap_blank")
             for mode in ("microscope", "copilot")}
    log = [first | {"step": step, "kl": 0.1, "eval_reward_microscope": 0.5 - abs(step - 70) / 100}
           for step in range(0, 281, 35)]
    for name, gap in (("over", 0.25), ("stage3", 0.25), ("fixed_text", 0.12)):
        folder = results.folder_of(42, name)
        (folder / "checkpoints" / "step-000280").mkdir(parents=True)
        state = json.dumps({"evaluations": {"first": first}})
        (folder / "checkpoints" / "step-000280" / "run.json").write_text(state)
        rows = [json.dumps(row | {"eval_gap_swapped_microscope": gap}) for row in log]
        (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    verdicts = {1: ["supported", "contradicted", "unknown"], 36: ["supported"] * 3, 70: ["contradicted"]}
    claims = {step: [["car colour red", verdict, 2, 5] for verdict in said] for step, said in verdicts.items()}
    lines = [json.dumps({"step": step, "claims": said}) for step, said in claims.items()]
    for folder in (results.folder_of(seed, name) for seed in (42, 1) for name in ("stage3", "new")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    page = results_page.write_page([42, 1]).read_text()
    assert "| stage 3, on new clips | 50.0% → 25.0% | 50.0% → 25.0% |" in page
    assert "Not run yet" not in page and "highest at step 70" in page
    assert page.count("| stage 3, seed 42 | 0 | ") == 1
    assert "| stage 3, seed 42 | 70 | 0.50 | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 |  |" in page
    assert "| fixed_text | 70 | 0.50 | 0.12 | 0.25 | 0.25 | 0.25 | 0.25 | stop |" in page
    for figure in ("tradeoff", "faults", "over"):
        assert (tmp_path / "docs" / f"results_{figure}.png").stat().st_size > 5000
    assert "| order" not in page.split("## Placebos")[1]


def test_the_readme_table_shows_a_dash_where_a_number_means_nothing():
    block = {"recall": 0.5, "chair_i": 0.25, "wrong_claims": 0.75, "order": 0.0, "trap_told": 1.0, "mentions": 3,
             "claims": 4, "order_pairs": 0, "traps_there": 2,
             "interval": {"recall": [0.4, 0.6], "chair_i": [0.2, 0.4], "wrong_claims": [0.7, 0.9],
                          "order": [0.0, 0.0], "trap_told": [1.0, 1.0]}}
    copilot = {**block, "order_pairs": 2, "claims": 0, "traps_there": 0}
    row = readme_table({"systems": {"blank": {"microscope": block, "copilot": copilot}}})
    assert row.splitlines()[-1] == ("| blank | 0.50 ± 0.10 | 0.25 ± 0.10 | 1.00 ± 0.00 | 0.75 ± 0.10 | – | "
                                    "0.50 ± 0.10 | 0.25 ± 0.10 | – | – | 0.00 ± 0.00 |")


# ---- Ctrl-C, and the estimate of the time left -----------------------------------------------------------------------

SAVES = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    time.sleep(4)
    (folder / "saved").write_text("")
    sys.exit(130)
signal.signal(signal.SIGINT, save)
(folder / "ready").write_text("")
time.sleep(60)
"""

RUNS = """
import sys
from pathlib import Path
from demo import run
folder = Path(sys.argv[1])
run.OUT = folder / "out"
run.run_parts([run.Part("a", "part a", [sys.executable, "-c", sys.argv[2], str(folder)], folder / "out/a", 1)])
"""


@pytest.mark.parametrize("signals, saved", [(1, True), (2, False)])
def test_ctrl_c_waits_until_the_part_has_saved_and_a_second_one_does_not(signals, saved, tmp_path):
    runner = subprocess.Popen([sys.executable, "-c", RUNS, str(tmp_path), SAVES], cwd=ROOT, start_new_session=True,
                              stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "ready")
    for _ in range(signals):
        os.killpg(runner.pid, signal.SIGINT)  # as a terminal does: to the runner and the part
        time.sleep(1)  # Popen.wait itself swallows a second one in the first quarter of a second
    _, said = runner.communicate(timeout=30)
    assert runner.returncode == 130 and "Traceback" not in said
    assert "Run the same command again: it continues here." in said
    assert (tmp_path / "saved").exists() == saved
    assert json.loads((tmp_path / "out" / ".done" / "a.json").read_text())["seconds"] is None


def wait_for(path):
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_programs_end_without_a_traceback_on_ctrl_c():
    """In the work itself, and while torch is still being imported."""
    work = "from training.common import run_main\ndef main(): raise KeyboardInterrupt\nrun_main(main)"
    imports = ("import sys; sys.argv = ['x']; from training.common import load_config; from training.config import *; "
               "load_config(CheckConfig); raise KeyboardInterrupt")
    for code, codes in ((work, [130]), (imports, [130, -2])):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in codes and "Traceback" not in done.stderr, done.stderr


def test_torchrun_ends_without_a_traceback_on_ctrl_c(tmp_path):
    (tmp_path / "script.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'ready')!r}).write_text('')\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "demo.torchrun", "--standalone", "--nproc_per_node", "1",
               str(tmp_path / "script.py")]
    runner = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "ready")
    os.kill(runner.pid, signal.SIGINT)
    _, said = runner.communicate(timeout=60)
    assert runner.returncode == 130 and "SignalException" not in said


def test_the_time_left_follows_the_pace_of_the_parts_so_far(parts, monkeypatch, capsys):
    """A machine of half the speed: known once one part has run."""
    times = iter([20.0, 0.0])
    monkeypatch.setattr(demo, "run_part", lambda part, mark: next(times))
    parts[0].seconds, parts[1].seconds = 10, 100
    demo.run_parts(parts)
    assert re.findall(r"about (.*?) left", capsys.readouterr().out) == ["1 min 50 s", "3 min 20 s"]

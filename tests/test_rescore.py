"""Stored rollouts under another reward: numbers worked out by hand."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from stage3 import rescore
from stage3.grpo import group_advantages
from stage3.rollout import reference_text
from training.common import ConfigError, DriveVLMError

EVIDENCE = {"present": ["car"], "unknown": [], "salient": ["car"], "seen": {"car": [0.0, 0.5]}}


@dataclasses.dataclass
class Parts:
    length: float
    letter: float


def by_length(caption, evidence, mode, reference):
    """More words, more reward; and a part that knows evidence and reference."""
    if reference != "A car ahead.":  # the trial call before anything is read
        assert evidence.seen["car"] == (0.0, 0.5) and reference == "A car." and mode in ("microscope", "copilot")
    return Parts(len(caption.split()) / 10, float("z" in caption))


def records(step, slot, mode, rewards, texts):
    mean = sum(rewards) / len(rewards)
    return [{"step": step, "slot": slot, "k": k, "id": f"car#{mode}", "video": "car.mp4", "mode": mode, "text": text,
             "reward": reward, "advantage": reward - mean, "evidence": EVIDENCE}
            for k, (reward, text) in enumerate(zip(rewards, texts, strict=True))]


@pytest.fixture
def run(tmp_path):
    """A run folder: a Microscope group whose order turns around, and a Copilot group that dies."""
    folder = tmp_path / "run"
    folder.mkdir()
    row = {"video": "car.mp4", "microscope": ["A car."], "copilot": ["A car."]}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    rows = records(1, 0, "microscope", [0.9, 0.5, 0.5], ["one", "one two", "one two three"])
    rows += records(1, 1, "copilot", [0.2, 0.4, 0.6], ["a b", "b c", "c d"])
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"data": str(tmp_path / "data.json"), "num_val_videos": 0, "reward": "test_rescore:by_length",
              "reward_weights": {"length": 1.0, "letter": 0.0}, "std_floor": 0.0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_what_an_answers_language_is_worth_and_all_its_captions_count(run):
    """The stored factor multiplies the new reward, and all captions of the entry are the reference."""
    rows = [json.loads(line) | {"language": 0.5} for line in (run / "rollouts.jsonl").read_text().splitlines()]
    config = SimpleNamespace(reward_weights={"length": 1.0, "letter": 0.0}, advantage_scale="group", std_floor=0.0)
    scored = rescore.rescore(rows, {"car#microscope": "A car.", "car#copilot": "A car."}, by_length, config)
    assert [row["new_reward"] for row in scored[:3]] == pytest.approx([0.05, 0.1, 0.15])
    assert reference_text(SimpleNamespace(captions=("A car.", "One car."))) == "A car.\nOne car."


def test_what_another_reward_changes(run, capsys):
    before = {file: file.read_bytes() for file in run.iterdir()}
    assert rescore.main([run]) == 0
    said = capsys.readouterr().out
    lines = {line[:24].strip(): line[24:].split() for line in said.splitlines()}
    assert lines["answers"] == ["3", "3"] and lines["groups"] == ["1", "1"]
    assert lines["reward"] == ["0.6333", "0.4000"] and lines["new reward"] == ["0.2000", "0.2000"]
    assert lines["dead groups"] == ["0", "0"] and lines["new dead groups"] == ["0", "1"]
    assert lines["pairs reversed"] == ["100.0%", "0.0%"]  # the two pairs that differed; of Copilot, all became equal
    assert lines["best answer changed"] == ["100.0%", "0.0%"]
    assert lines["advantage changes sign"] == ["66.7%", "0.0%"]  # the middle one is now the mean
    assert "car#microscope: reward 0.900 -> 0.100, advantage +0.27 -> -1.00" in said
    assert {file: file.read_bytes() for file in run.iterdir()} == before


def settings(std_floor):
    return SimpleNamespace(reward_weights={"length": 1.0}, advantage_scale="group", std_floor=std_floor, data="")


def test_new_advantages_are_those_of_training(run):
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    config = settings(0.05)
    scored = rescore.rescore(rows, {"car#microscope": "A car.", "car#copilot": "A car."}, by_length, config)
    expected = group_advantages(torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64), "group", 0.05)[0].tolist()
    assert [row["new_advantage"] for row in scored[:3]] == expected and scored[0]["new_reward"] == 0.1


def test_a_batch_is_all_groups_of_a_mode_in_one_step():
    rows = records(1, 0, "copilot", [0.1, 0.2], ["a", "a b"]) + records(1, 1, "copilot", [0.1, 0.2], ["a", "a b c d"])
    rows += records(2, 0, "copilot", [0.1, 0.2], ["a", "a b c d e f g"])
    config = settings(0.0)
    config.advantage_scale = "batch"
    scored = rescore.rescore(rows, {"car#copilot": "A car."}, by_length, config)
    first = group_advantages(torch.tensor([[0.1, 0.2], [0.1, 0.4]], dtype=torch.float64), "batch").flatten().tolist()
    second = group_advantages(torch.tensor([[0.1, 0.7]], dtype=torch.float64), "batch").flatten().tolist()
    assert [row["new_advantage"] for row in scored] == first + second


def test_the_same_reward_changes_nothing(run, capsys):
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    config = settings(0.0)
    references = {"car#microscope": "A car.", "car#copilot": "A car."}
    scored = rescore.rescore(rows, references, by_length, config)
    kept = [row | {"reward": row["new_reward"], "advantage": row["new_advantage"]} for row in scored]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert rescore.main([run]) == 0
    assert "No advantage changes." in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["nowhere"], "usage: python -m stage3.rescore RUN_FOLDER"), ([], "usage: "),
    (["RUN", "--reward", "nowhere:f"], "No module named 'nowhere'"),
    (["RUN", "--reward_weights.other", "1"], "unknown flag --reward_weights.other"),
    (["RUN", "--data", "none.json"], "data: "),
])
def test_wrong_arguments(flags, words, run, capsys):
    with pytest.raises(ConfigError):
        rescore.main([str(run) if flag == "RUN" else flag for flag in flags])
    assert words in capsys.readouterr().err


def test_a_caption_that_is_gone_is_an_error(run, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"video": "bus.mp4", "microscope": ["A."], "copilot": ["B."]}]))
    with pytest.raises(DriveVLMError, match="has no caption of car#microscope any more"):
        rescore.main([run])

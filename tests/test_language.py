"""Language judged by the NLL under stage 2: the statistic, the factor, and broken text in the trainer's own pass.

Run: `python -m pytest tests/test_language.py -q`
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dataset import MODES, Entry, encode_prompt
from model import DriveVLM
from stage3.grpo import Group, load_reference, policy_logps, reference_logps
from stage3.grpo_reward_func import Evidence, physics_aware_reward
from stage3.language import judge_language, language_factor, usual_nll, worst_nll
from stage3.rollout import Completion, Rollout, compute_advantages
from training.common import TrainingError

BASE = Path(__file__).resolve().parents[1] / "demo" / "base"
SOUND = ("At first, a white car ahead brakes, so the ego vehicle slows down. Then, the traffic light ahead turns red "
         "and the ego vehicle brakes to a halt.")
OTHERS = ("At first, a red bus ahead pulls over to the right, so the ego vehicle drives around it.",
          "Then, the traffic light ahead turns green, so the ego vehicle accelerates.")
BROKEN = {
    "a word dropped": SOUND.replace("ego vehicle slows", "ego slows"),
    "a word doubled": SOUND.replace("light", "light light"),
    "two words swapped": SOUND.replace("turns red", "red turns"),
    "shuffled": " ".join(sorted(SOUND.split())),
}


def test_the_worst_tokens_count():
    """Three worst of 1, 2, 3, 4: 3; of one token: itself; what is masked is not looked at."""
    logps = torch.tensor([[-1.0, -4.0, -2.0, -3.0], [-5.0, -9.0, -9.0, -9.0], [-1.0, -2.0, -9.0, -9.0]])
    mask = torch.tensor([[True] * 4, [True, False, False, False], [True, True, False, False]])
    assert worst_nll(logps, mask).tolist() == [3.0, 5.0, 1.5]


def test_the_factor_falls_from_one_to_zero_over_once_the_usual_range():
    assert [language_factor(worst, 4.0) for worst in (0.0, 4.0, 5.0, 6.0, 8.0, 90.0)] == [1, 1, 0.75, 0.5, 0, 0]
    assert language_factor(0.0, 0.0) == 1 and language_factor(1.0, 0.0) == 0


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy world's language model, its adapter taught three texts as by stage 2, and judge_language's config."""
    model = DriveVLM.from_base(BASE / "vision", BASE / "language", num_frames=2, dtype="float32", seed=1)
    model.add_lora(r=4, alpha=8, dropout=0.0, seed=2)
    model.set_trainable("lora")
    config = SimpleNamespace(
        per_device_batch_size=2, temperature=1.0, shared_prefix=True, judge_language=True, seed=3, beta=0.02,
        modes=["microscope"], num_generations=4, mask_truncated=False, advantage_scale="group", std_floor=0.05,
        mode_weights={}, objective="grpo", sample_from="policy", wordings=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    lesson = [rollout_of(model, [SOUND, *OTHERS], [0.0] * 3)]
    for _ in range(40):
        logps, _, mask = policy_logps(config, model, lesson)
        (-logps[mask].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("language") / "stage2"
    model.save_checkpoint(folder, stage=2)
    load_reference(model, folder)
    return SimpleNamespace(model=model, config=config)


def rollout_of(model, texts, rewards):
    """A group of the given answers, as RolloutSampler.roll_out leaves it."""
    entry = Entry("clip#microscope", "clip.mp4", "microscope", MODES["microscope"], (SOUND,))
    ids = [[*model.tokenizer(text)["input_ids"], model.end_ids[0]] for text in texts]
    visual = torch.zeros(model.num_visual_tokens, model.head_weight.shape[1])
    records = [{"id": entry.id, "slot": 0, "mode": entry.mode, "reward": reward, "ended": True, "tokens": len(i)}
               for reward, i in zip(rewards, ids, strict=True)]
    group = Group(encode_prompt(model.tokenizer, entry.question, model.num_visual_tokens), visual, ids)
    completions = [Completion(i, True, text, [0.0] * len(i)) for i, text in zip(ids, texts, strict=True)]
    return Rollout(0, entry, group, completions, records)


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_text_of_true_words_is_paid_less_than_its_sound_form(toy, damage):
    """The reward function believes both alike; what the trainer's own pass says of the language decides."""
    config, model, (texts, rewards) = toy.config, toy.model, ((SOUND, BROKEN[damage]), (0.9, 0.91))
    usual = {"microscope": worst_of(toy, SOUND) * 1.2}
    rollout = rollout_of(model, texts, rewards)
    judge_language(config, model, [rollout], usual)
    sound, broken = rollout.records
    assert sound["language"] == 1.0 and sound["reward"] == 0.9
    assert broken["worst_nll"] > sound["worst_nll"] and broken["reward"] < 0.9 and broken["nll"] > sound["nll"]
    compute_advantages(SimpleNamespace(**vars(config) | {"num_generations": 2}), [rollout], rollout.records, 1)
    assert rollout.advantages[0] > 0 > rollout.advantages[1]


def worst_of(toy, text):
    rollout = rollout_of(toy.model, [text], [0.0])
    with torch.no_grad():
        logps, _, mask = policy_logps(toy.config, toy.model, [rollout])
    return worst_nll(logps, mask).item()


def test_a_true_text_stays_true_when_its_words_are_swapped_so_only_the_pass_can_tell():
    evidence = Evidence({"car", "traffic light"})
    sound, broken = (physics_aware_reward(text, evidence, "microscope", SOUND).total
                     for text in (SOUND, BROKEN["two words swapped"]))
    assert broken > sound - 0.05


def test_groups_whose_rewards_are_equal_cost_no_pass(toy, monkeypatch):
    seen = []
    monkeypatch.setattr("stage3.language.policy_logps", lambda config, model, batch: seen.append(batch))
    rollout = rollout_of(toy.model, [SOUND, SOUND], [0.5, 0.5])
    judge_language(toy.config, toy.model, [rollout], {"microscope": 1.0})
    assert not seen and rollout.ref_logps is None and rollout.records[0].keys() & {"nll", "language"} == set()


def test_without_a_usual_range_rewards_stay_and_the_kl_has_its_log_probs(toy):
    rollouts = [rollout_of(toy.model, [SOUND, SOUND[:40]], [0.1, 0.9]), rollout_of(toy.model, [SOUND[:20], "A car."],
                                                                                    [0.2, 0.3])]
    judge_language(toy.config, toy.model, rollouts, None)
    assert [record["reward"] for rollout in rollouts for record in rollout.records] == [0.1, 0.9, 0.2, 0.3]
    assert "language" not in rollouts[0].records[0] and rollouts[0].records[0]["nll"] > 0
    stored = reference_logps(toy.config, rollouts)  # [4, T], right padded over groups of different lengths
    with torch.no_grad():
        logps, _, mask = policy_logps(toy.config, toy.model, rollouts)
    torch.testing.assert_close(torch.where(mask, stored, 0.0), torch.where(mask, logps, 0.0))
    assert reference_logps(SimpleNamespace(objective="grpo", beta=0.0), rollouts) is None
    assert reference_logps(SimpleNamespace(objective="raft", beta=0.1), rollouts) is None
    preferred = reference_logps(SimpleNamespace(objective="dpo", beta=0.0), rollouts)
    torch.testing.assert_close(preferred, stored)


def test_an_nll_that_is_no_number_stops_the_run(toy, monkeypatch):
    def broken(config, model, batch):
        logps, entropy, mask = policy_logps(config, model, batch)
        return logps * float("nan"), entropy, mask

    monkeypatch.setattr("stage3.language.policy_logps", broken)
    with pytest.raises(TrainingError, match="clip#microscope is not a number"):
        judge_language(toy.config, toy.model, [rollout_of(toy.model, [SOUND, "A car."], [0.1, 0.2])], None)


def test_what_is_usual_is_measured_on_stage_2s_own_samples(toy):
    """The same for the same seed, in batches of any size; None where it is switched off."""
    visual = torch.zeros(toy.model.num_visual_tokens, toy.model.head_weight.shape[1])
    sampler = SimpleNamespace(limits={"microscope": 12}, prompts_per_rank=3,
                              read_clips=lambda asked: ({slot: visual for slot in asked}, []))
    prompts = [Entry(f"{i}#microscope", f"{i}.mp4", "microscope", MODES["microscope"], (SOUND,)) for i in range(9)]
    said = []
    usual = usual_nll(toy.config, toy.model, sampler, prompts, said.append)
    assert usual.keys() == {"microscope"} and usual["microscope"] > 0 and f"{usual['microscope']:.2f}" in said[0]
    sampler.prompts_per_rank = 8
    assert usual_nll(toy.config, toy.model, sampler, prompts, said.append) == usual
    off = SimpleNamespace(**vars(toy.config) | {"judge_language": False})
    assert usual_nll(off, toy.model, sampler, prompts) is None


def test_the_largest_sample_is_usual_unless_it_is_a_slip(toy, monkeypatch):
    """32 samples with a median of 3: the largest counts up to 7.5, however far out it is."""
    visual = torch.zeros(toy.model.num_visual_tokens, toy.model.head_weight.shape[1])
    sampler = SimpleNamespace(limits={"microscope": 3}, prompts_per_rank=8,
                              read_clips=lambda asked: ({slot: visual for slot in asked}, []))
    prompts = [Entry(f"{i}#microscope", f"{i}.mp4", "microscope", MODES["microscope"], (SOUND,)) for i in range(8)]
    for largest, usual in ((5.125, 5.12), (900.0, 7.5)):
        samples = iter([2.0] * 10 + [3.0] * 12 + [largest] + [4.0] * 9)
        monkeypatch.setattr("stage3.language.worst_nll", lambda logps, mask, left=samples: torch.tensor([next(left)]))
        assert usual_nll(toy.config, toy.model, sampler, prompts, lambda line: None) == {"microscope": usual}
        assert list(samples) == []  # 8 prompts, 4 answers to each

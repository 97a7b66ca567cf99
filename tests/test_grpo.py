"""GRPO's pure functions against tables worked out by hand, then sampling and training against plain versions.

Run: `python -m pytest tests/test_grpo.py -q`
"""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicLayer

import stage3.grpo
from dataset import MODES, PREFIX, Entry, VideoError, cached_frames, draw_question, encode_prompt
from model import (
    SPLIT_ATTENTION,
    DriveVLM,
    ModelError,
    adapter_hash,
    check_shared_prefix,
    decoding_attention,
    packed_positions,
)
from stage3 import rollout
from stage3.grpo import (
    LOSS_TYPES,
    Group,
    completion_logps,
    dpo_loss,
    group_advantages,
    grpo_loss,
    has_variance,
    load_reference,
    loss_share,
    mean_statistics,
    pack_groups,
    raft_loss,
    reference_policy,
    training_pass,
)
from stage3.rollout import (
    Rollout,
    VisualTokens,
    counted_answers,
    only_counted,
    prompts_of_step,
    sample_groups,
    sample_tokens,
)
from training.common import stable_seed

INF = float("inf")
NAN = float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


def test_advantages_by_group_are_as_worked_out_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    # group 1: mean 2, std 1; group 2: mean 1/3, std sqrt(((1/3)^2 * 2 + (2/3)^2) / 2) = 0.5773503
    std = 0.5773502691896258
    expected = [[-1 / 1.0001, 0.0, 1 / 1.0001], [-1 / 3 / (std + 1e-4), -1 / 3 / (std + 1e-4), 2 / 3 / (std + 1e-4)]]
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(expected, dtype=torch.float64))


def test_advantages_by_batch_and_none_are_as_worked_out_by_hand():
    rewards = torch.tensor([[1.0, 3.0], [2.0, 6.0]])
    # all four: mean 3, std sqrt((4 + 0 + 1 + 9) / 3)
    std = math.sqrt(14 / 3) + 1e-4
    differences = torch.tensor([[-1.0, 1.0], [-2.0, 2.0]])
    torch.testing.assert_close(group_advantages(rewards, scale="batch"), differences / std)
    torch.testing.assert_close(group_advantages(rewards, scale="none"), differences)


def test_a_std_floor_bounds_the_advantages_of_tiny_differences():
    rewards = torch.tensor([[0.500, 0.502], [0.0, 1.0]])
    advantages = group_advantages(rewards, std_floor=0.05)
    torch.testing.assert_close(advantages[0], torch.tensor([-0.001, 0.001]) / 0.0501, rtol=1e-4, atol=0)
    torch.testing.assert_close(advantages[1], torch.tensor([-0.5, 0.5]) / (math.sqrt(0.5) + 1e-4))
    assert group_advantages(rewards)[0, 1] > 0.6  # without the floor, a difference of 0.002 counts as much as any


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exact_zeros(scale, dtype):
    rewards = torch.tensor([[0.1] * 7, [0.7] * 6 + [0.8]], dtype=dtype)
    advantages = group_advantages(rewards, scale=scale)
    assert advantages.dtype == dtype
    assert (advantages[0] == 0).all() and (advantages[1] != 0).all()
    assert has_variance(rewards).tolist() == [False, True]


def test_integer_rewards_are_accepted():
    assert group_advantages(torch.tensor([[0, 1]])).dtype == torch.float32


@pytest.mark.parametrize(
    "rewards, scale, message",
    [
        (torch.zeros(3, 1), "group", "at least"),
        (torch.zeros(3), "group", "at least"),
        (torch.zeros(3, 2), "prompt", "group, batch or none"),
        (torch.tensor([[0.0, NAN]]), "group", "finite"),
        (torch.tensor([[0.0, INF]]), "none", "finite"),
    ],
)
def test_advantages_refuse_rewards_that_cannot_be_compared(rewards, scale, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, scale=scale)


# ---------------------------------------------------------------------------------------------------------------------
# Loss, worked out by hand: two rows, of three tokens and of one, ratios 1.5, 1.0, 0.5 and 2.0

RATIOS = torch.tensor([[1.5, 1.0, 0.5], [2.0, 9.9, 9.9]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
ADVANTAGES = torch.tensor([1.0, -2.0], dtype=torch.float64)
OLD = torch.full((2, 3), -1.0, dtype=torch.float64)
LOGPS = OLD + RATIOS.log()
# epsilon 0.2, A = 1: min(1.5, 1.2) = 1.2, 1.0, min(0.5, 0.8) = 0.5;  A = -2: min(-4.0, -2.4) = -4.0
PER_TOKEN = torch.tensor([[-1.2, -1.0, -0.5], [4.0, 0.0, 0.0]], dtype=torch.float64)
MEANS = {  # of the table above
    "grpo": (-2.7 / 3 + 4.0) / 2,
    "bnpo": (-2.7 + 4.0) / 4,
    "dr_grpo": (-2.7 + 4.0) / (2 * 10),
    "dapo": (-2.7 + 4.0) / 4,
}


@pytest.mark.parametrize("loss_type, expected", MEANS.items())
def test_losses_are_as_worked_out_by_hand(loss_type, expected):
    loss, stats = grpo_loss(
        LOGPS, ADVANTAGES, MASK, old_logps=OLD, loss_type=loss_type, max_completion_tokens=10, num_items=None
    )
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert stats["tokens"] == 4
    assert stats["ratio"].item() == pytest.approx(5.0 / 4)
    assert stats["clip_high"].item() == pytest.approx(1 / 4)  # 1.5 with A > 0
    assert stats["clip_low"].item() == 0.0  # 0.5 has A > 0, 2.0 has A < 0: neither is cut
    assert stats["kl"].item() == 0.0


def test_the_lower_and_the_upper_clip_bound_are_separate():
    def loss(advantage, ratio, low, high):
        logps = torch.tensor([[math.log(ratio)]])
        result = grpo_loss(
            logps, torch.tensor([advantage]), torch.ones(1, 1), old_logps=torch.zeros(1, 1),
            epsilon=low, epsilon_high=high,
        )
        return result[0].item(), result[1]["clip_low"].item(), result[1]["clip_high"].item()

    assert loss(1.0, 1.25, 0.2, 0.28) == pytest.approx((-1.25, 0, 0))
    assert loss(1.0, 1.25, 0.2, None) == pytest.approx((-1.2, 0, 1))
    assert loss(1.0, 1.40, 0.2, 0.28) == pytest.approx((-1.28, 0, 1))
    assert loss(-1.0, 0.70, 0.2, 0.28) == pytest.approx((0.8, 1, 0))
    assert loss(-1.0, 0.70, 0.4, 0.28) == pytest.approx((0.7, 0, 0))
    assert loss(-1.0, 3.00, 0.2, 0.28) == pytest.approx((3.0, 0, 0))  # never clipped on this side
    assert loss(0.5, 0.50, 0.2, 0.28) == pytest.approx((-0.25, 0, 0))  # nor on this one
    assert loss(0.0, 0.50, 0.2, 0.28) == pytest.approx((0.0, 0, 0)) == loss(0.0, 3.0, 0.2, 0.28)


@pytest.mark.parametrize("kl, values", [("k3", lambda d: math.exp(d) - d - 1), ("k2", lambda d: d * d / 2)])
@pytest.mark.parametrize("loss_type", MEANS)
def test_kl_is_added_to_every_counted_token(kl, values, loss_type):
    differences = torch.tensor([[0.3, -0.2, 0.0], [1.0, 50.0, -INF]], dtype=torch.float64)
    token_kl = [values(0.3), values(-0.2), 0.0, values(1.0)]
    rows = [-2.7 + 0.5 * sum(token_kl[:3]), 4.0 + 0.5 * token_kl[3]]
    expected = {
        "grpo": (rows[0] / 3 + rows[1]) / 2,
        "bnpo": sum(rows) / 4,
        "dr_grpo": sum(rows) / 20,
        "dapo": sum(rows) / 4,
    }[loss_type]
    loss, stats = grpo_loss(
        LOGPS, ADVANTAGES, MASK, old_logps=OLD, ref_logps=LOGPS + differences, beta=0.5, kl=kl,
        loss_type=loss_type, max_completion_tokens=10,
    )
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert stats["kl"].item() == pytest.approx(sum(token_kl) / 4, abs=1e-9)


def test_without_beta_the_kl_is_reported_but_not_in_the_loss():
    loss, stats = grpo_loss(LOGPS, ADVANTAGES, MASK, old_logps=OLD, ref_logps=LOGPS + 1.0, beta=0.0)
    assert loss.item() == pytest.approx(MEANS["dapo"])
    assert stats["kl"].item() == pytest.approx(math.e - 2)


def test_differences_of_log_probs_are_cut_at_20():
    one = torch.ones(1, 1)
    for difference, ratio in ((50.0, math.exp(20)), (19.9, math.exp(19.9)), (-50.0, math.exp(-20))):
        logps = torch.tensor([[difference]], dtype=torch.float64)
        _, stats = grpo_loss(logps, torch.tensor([1.0]), one, old_logps=torch.zeros(1, 1, dtype=torch.float64))
        assert stats["ratio"].item() == pytest.approx(ratio, rel=1e-9)


def test_any_beta_above_0_counts():
    loss, _ = grpo_loss(LOGPS, ADVANTAGES, MASK, old_logps=OLD, ref_logps=LOGPS + 1.0, beta=1.0)
    assert loss.item() == pytest.approx(MEANS["dapo"] + math.e - 2)


def test_passes_share_the_loss_as_worked_out_by_hand():
    """A pass of 4 of a step's 16 rows, in 5 passes."""
    shares = {loss_type: loss_share(loss_type, 4, 16, 5) for loss_type in LOSS_TYPES}
    assert shares == {"grpo": 0.25, "dr_grpo": 0.25, "dapo": 1.0, "bnpo": 0.2}


def test_statistics_of_a_step_are_means_over_tokens_and_inner_epochs(monkeypatch):
    """Two answers of 3 and 1 tokens: entropy 2, and 0.5 between the log-probs as sampled and in the training pass."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logps = torch.where(mask, -1.0, 0.0).requires_grad_()
    monkeypatch.setattr(stage3.grpo, "policy_logps", lambda *_: (logps, torch.where(mask, 2.0, 7.0), mask))
    answers = [SimpleNamespace(logps=[-1.5] * 3), SimpleNamespace(logps=[-0.5])]
    rollout = SimpleNamespace(entry=SimpleNamespace(mode="copilot"), completions=answers,
                              advantages=torch.tensor([1.0, -1.0]), kept=torch.tensor([True, True]))
    config = SimpleNamespace(beta=0.0, epsilon=0.2, epsilon_high=None, loss_type="dapo", kl="k3", inner_epochs=2,
                             objective="grpo", sample_from="policy")
    totals = SimpleNamespace(rows={"copilot": 2}, tokens={"copilot": 4}, passes={"copilot": 1},
                             weights={"copilot": 1.0})
    sums, old = dict.fromkeys(stage3.grpo.SUMS, 0.0), None
    for _ in range(2):
        _, old = training_pass(config, None, [rollout], {"copilot": 5}, old, totals, sums)
    assert sums["tokens"] == 8 and sums["entropy"] / 8 == 2.0
    assert sums["sampler_gap"] / 8 == pytest.approx(0.5)
    means = mean_statistics(config, sums)
    assert list(means) == ["kl", "clip", "clip_low", "clip_high", "entropy", "sampler_gap"] and means["entropy"] == 2.0


def test_statistics_of_dpo_are_means_over_pairs(monkeypatch):
    """One pair of Microscope with log-ratios 2 and -1, two of Copilot, fewer tokens, with 0 and 1, and with 1 and 0."""
    ratios = torch.tensor([2.0, -1.0, 0.0, 1.0, 1.0, 0.0])
    mask = torch.tensor([[True, True, True]] * 2 + [[True, False, False]] * 4)
    ref = torch.where(mask, -1.0, 0.0)
    logps = torch.where(mask, ref + (ratios / mask.sum(1))[:, None], 0.0).requires_grad_()
    monkeypatch.setattr(stage3.grpo, "policy_logps", lambda *_: (logps, torch.where(mask, 2.0, 7.0), mask))
    batch = []
    for row, mode in ((0, "microscope"), (2, "copilot"), (4, "copilot")):
        answers = [SimpleNamespace(logps=[0.0] * int(mask[row + k].sum())) for k in range(2)]
        batch.append(SimpleNamespace(entry=SimpleNamespace(mode=mode), completions=answers, ref_logps=ref[row:row + 2],
                                     advantages=torch.zeros(2), kept=torch.tensor([True, True])))
    config = SimpleNamespace(objective="dpo", dpo_beta=0.5, loss_type="dapo", sample_from="reference", inner_epochs=1)
    totals = SimpleNamespace(rows={"microscope": 2, "copilot": 4}, tokens={"microscope": 6, "copilot": 4},
                             passes={"microscope": 1, "copilot": 1}, weights={"microscope": 0.5, "copilot": 0.5})
    sums = dict.fromkeys(stage3.grpo.SUMS, 0.0)
    loss, _ = training_pass(config, None, batch, {"microscope": 5, "copilot": 5}, None, totals, sums)
    means = mean_statistics(config, sums)
    assert list(means) == ["dpo_accuracy", "dpo_margin", "dpo_chosen", "entropy"] and means["entropy"] == 2.0
    assert means["dpo_accuracy"] == pytest.approx(2 / 3)
    assert means["dpo_margin"] == pytest.approx(0.5 * (3 - 1 + 1) / 3)
    assert means["dpo_chosen"] == pytest.approx(0.5 * (2 + 0 + 1) / 3)
    first, second, third = (math.log(1 + math.exp(-0.5 * margin)) for margin in (3, -1, 1))
    assert loss == pytest.approx((first + (second + third) / 2) / 2)


def test_dapo_divides_by_num_items():
    loss, _ = grpo_loss(LOGPS, ADVANTAGES, MASK, old_logps=OLD, num_items=13)
    assert loss.item() == pytest.approx(1.3 / 13)
    loss, _ = grpo_loss(LOGPS, ADVANTAGES, MASK, old_logps=OLD, num_items=torch.tensor(13))
    assert loss.item() == pytest.approx(1.3 / 13)


def test_without_old_logps_the_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    logps = LOGPS.clone().requires_grad_()
    loss, stats = grpo_loss(logps, ADVANTAGES, MASK)
    assert loss.item() == pytest.approx((-3 + 2) / 4)
    assert stats["ratio"].item() == 1.0
    loss.backward()
    expected = torch.tensor([[-1.0, -1.0, -1.0], [2.0, 0.0, 0.0]], dtype=torch.float64) / 4
    torch.testing.assert_close(logps.grad, expected)


def test_gradients_of_clipped_and_masked_tokens_are_zero():
    logps = LOGPS.clone().requires_grad_()
    grpo_loss(logps, ADVANTAGES, MASK, old_logps=OLD)[0].backward()
    # the ratio is its own derivative by logp: -A w / 4 where not clipped
    expected = torch.tensor([[0.0, -1.0, -0.5], [4.0, 0.0, 0.0]], dtype=torch.float64) / 4
    torch.testing.assert_close(logps.grad, expected)


@pytest.mark.parametrize("bad", [-INF, INF, NAN, 1e38, -1e38])
@pytest.mark.parametrize("loss_type", MEANS)
def test_values_at_masked_positions_have_no_effect(bad, loss_type):
    def run(filler):
        fill = torch.where(MASK.bool(), 0.0, torch.tensor(filler))
        logps = (LOGPS + fill).requires_grad_()
        loss, stats = grpo_loss(
            logps, ADVANTAGES, MASK, old_logps=OLD + fill, ref_logps=LOGPS + fill, beta=0.1, loss_type=loss_type,
            max_completion_tokens=10,
        )
        loss.backward()
        return loss, logps.grad, stats["kl"]

    for clean, dirty in zip(run(0.0), run(bad), strict=True):
        torch.testing.assert_close(clean, dirty, rtol=0, atol=0)


@pytest.mark.parametrize("kl", ["k3", "k2"])
@pytest.mark.parametrize("policy", [-INF, -1e38, -1e4, -1.0])
@pytest.mark.parametrize("old", [-INF, -1e38, -1e4, -1.0])
@pytest.mark.parametrize("reference", [-INF, -1e38, -1e4, -1.0])
def test_infinite_and_huge_log_probs_never_give_inf_or_nan(policy, old, reference, kl):
    logps = torch.tensor([[policy, -1.0]], requires_grad=True)
    loss, stats = grpo_loss(
        logps, torch.tensor([1.0]), torch.ones(1, 2), old_logps=torch.tensor([[old, -1.0]]),
        ref_logps=torch.tensor([[reference, -1.0]]), beta=0.1, kl=kl,
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()
    assert all(math.isfinite(float(value)) for value in stats.values())


def test_two_infinite_log_probs_differ_by_0():
    logps = torch.tensor([[-INF, -INF]])
    loss, stats = grpo_loss(logps, torch.tensor([1.0]), torch.ones(1, 2), old_logps=logps, ref_logps=logps, beta=1.0)
    assert loss.item() == -1.0 and stats["kl"] == 0.0 and stats["ratio"] == 1.0


@pytest.mark.parametrize("where", ["logps", "old_logps", "ref_logps"])
def test_a_nan_at_a_counted_position_reaches_the_loss(where):
    inputs = {"logps": LOGPS.clone(), "old_logps": OLD.clone(), "ref_logps": LOGPS.clone()}
    inputs[where][0, 1] = NAN
    loss, _ = grpo_loss(inputs.pop("logps"), ADVANTAGES, MASK, beta=0.1, **inputs)
    assert torch.isnan(loss)


def test_an_empty_mask_gives_a_zero_loss_with_a_graph():
    for loss_type in MEANS:
        logps = LOGPS.clone().requires_grad_()
        loss, _ = grpo_loss(logps, ADVANTAGES, MASK * 0, loss_type=loss_type, max_completion_tokens=10)
        loss.backward()
        assert loss.item() == 0.0 and (logps.grad == 0).all()


def test_half_precision_inputs_are_computed_in_float32():
    loss, _ = grpo_loss(LOGPS.bfloat16(), ADVANTAGES.bfloat16(), MASK, old_logps=OLD.bfloat16())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(MEANS["dapo"], abs=2e-2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "ppo"}, "grpo, bnpo, dr_grpo, dapo"),
        ({"kl": "k1"}, "k3 or k2"),
        ({"beta": 0.1}, "ref_logps"),
        ({"loss_type": "dr_grpo"}, "max_completion_tokens"),
        ({"mask": torch.ones(2, 2)}, "must be"),
        ({"advantages": torch.ones(3)}, "must be"),
    ],
)
def test_the_loss_refuses_arguments_that_do_not_fit(options, message):
    arguments = {"logps": LOGPS, "advantages": ADVANTAGES, "mask": MASK, **options}
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# The objectives that GRPO is compared with: two answers of three tokens and of one; two pairs of answers

NLL = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.9, 9.9]], dtype=torch.float64)
RAFT_MEANS = {"grpo": (6 / 3 + 4) / 2, "bnpo": 10 / 4, "dr_grpo": 10 / (2 * 10), "dapo": 10 / 4}

PAIRS = torch.tensor([[[-0.5, -2.0], [-2.5, -1.0]], [[-3.0, 9.9], [-1.0, 9.9]]], dtype=torch.float64)
PAIRS_REF = torch.tensor([[[-2.0, -2.0], [-1.0, -2.0]], [[-2.0, 9.9], [-1.0, 9.9]]], dtype=torch.float64)
PAIRS_MASK = torch.tensor([[[1, 1], [1, 1]], [[1, 0], [1, 0]]])
# sums of (logp - ref): 1.5 and -0.5, so the first margin is 2; -1 and 0, so the second is -1
DPO_LOSS = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.5))) / 2  # beta 0.5


@pytest.mark.parametrize("loss_type, expected", RAFT_MEANS.items())
def test_raft_is_the_cross_entropy_as_worked_out_by_hand(loss_type, expected):
    logps = (-NLL).requires_grad_()
    loss, stats = raft_loss(logps, MASK, loss_type=loss_type, max_completion_tokens=10)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-9) and stats["tokens"] == 4
    weights = {"grpo": [[1 / 6] * 3, [1 / 2, 0, 0]], "dr_grpo": [[1 / 20] * 3, [1 / 20, 0, 0]]}
    expected = weights.get(loss_type, [[1 / 4] * 3, [1 / 4, 0, 0]])
    torch.testing.assert_close(logps.grad, -torch.tensor(expected, dtype=torch.float64))
    whole_step = raft_loss(logps, MASK, loss_type=loss_type, max_completion_tokens=10, num_items=20)[0].item()
    assert whole_step == pytest.approx(0.5 if loss_type == "dapo" else loss.item())


def test_raft_has_the_gradient_of_grpo_with_an_advantage_of_one():
    """Of answers that the policy itself has sampled: GRPO beyond it is what it does with the other answers."""
    grads = []
    for loss in (lambda x: raft_loss(x, MASK)[0], lambda x: grpo_loss(x, torch.ones(2), MASK)[0]):
        logps = (-NLL).requires_grad_()
        loss(logps).backward()
        grads.append(logps.grad)
    torch.testing.assert_close(*grads)


def test_dpo_is_as_worked_out_by_hand():
    logps = PAIRS.clone().requires_grad_()
    loss, stats = dpo_loss(logps, PAIRS_REF, PAIRS_MASK, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(DPO_LOSS, abs=1e-9)
    assert stats["pairs"] == 2 and stats["tokens"] == 6
    assert stats["dpo_margin"].item() == pytest.approx((1 - 0.5) / 2)
    assert stats["dpo_accuracy"].item() == 0.5
    assert stats["dpo_chosen"].item() == pytest.approx((0.75 - 0.5) / 2)
    first, second = (0.5 / (1 + math.exp(margin)) / 2 for margin in (1.0, -0.5))  # beta sigmoid(-margin) / pairs
    expected = [[[-first, -first], [first, first]], [[-second, 0], [second, 0]]]
    torch.testing.assert_close(logps.grad, torch.tensor(expected, dtype=torch.float64))


def test_dpo_of_a_policy_that_is_the_reference_is_log_2():
    loss, stats = dpo_loss(PAIRS, PAIRS, PAIRS_MASK, 0.1)
    assert loss.item() == pytest.approx(math.log(2)) and stats["dpo_margin"] == stats["dpo_accuracy"] == 0


def raft_of(logps, ref, mask):
    return raft_loss(logps.flatten(0, 1), mask.flatten(0, 1))[0]


def dpo_of(logps, ref, mask):
    return dpo_loss(logps, ref, mask, 0.5)[0]


@pytest.mark.parametrize("bad", [-INF, INF, NAN, 1e38, -1e38])
@pytest.mark.parametrize("loss_of", [raft_of, dpo_of])
def test_values_at_masked_positions_have_no_effect_on_raft_and_dpo(loss_of, bad):
    results = []
    for filler in (0.0, bad):
        fill = torch.where(PAIRS_MASK.bool(), 0.0, torch.tensor(filler))
        logps = (PAIRS + fill).requires_grad_()
        loss = loss_of(logps, PAIRS_REF + fill, PAIRS_MASK)
        loss.backward()
        results.append((loss, logps.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("policy", [-INF, -1e38, -1e4, -1.0])
@pytest.mark.parametrize("reference", [-INF, -1e38, -1e4, -1.0])
@pytest.mark.parametrize("loss_of", [raft_of, dpo_of])
def test_infinite_and_huge_log_probs_never_give_inf_or_nan_in_raft_and_dpo(loss_of, reference, policy):
    logps = torch.tensor([[[policy, -1.0], [-1.0, policy]]], requires_grad=True)
    loss = loss_of(logps, torch.tensor([[[reference, -1.0], [-1.0, reference]]]), torch.ones(1, 2, 2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("where, loss_of", [("logps", raft_of), ("logps", dpo_of), ("ref", dpo_of)])
def test_a_nan_at_a_counted_position_reaches_the_loss_of_raft_and_dpo(where, loss_of):
    inputs = {"logps": PAIRS.clone(), "ref": PAIRS_REF.clone(), "mask": PAIRS_MASK}
    inputs[where][0, 1, 0] = NAN
    assert torch.isnan(loss_of(**inputs))


def test_without_answers_raft_and_dpo_are_zero_with_a_graph():
    for loss_of in (raft_of, dpo_of):
        logps = PAIRS[:0].clone().requires_grad_()
        loss = loss_of(logps, PAIRS_REF[:0], PAIRS_MASK[:0])
        loss.backward()
        assert loss.item() == 0.0


def test_half_precision_inputs_of_raft_and_dpo_are_computed_in_float32():
    for loss_of in (raft_of, dpo_of):
        half = loss_of(PAIRS.bfloat16(), PAIRS_REF.bfloat16(), PAIRS_MASK)
        assert half.dtype == torch.float32 and half.item() == pytest.approx(
            loss_of(PAIRS, PAIRS_REF, PAIRS_MASK).item(), abs=2e-2)


def test_raft_and_dpo_refuse_arguments_that_do_not_fit():
    for options, message in (({"loss_type": "dpo"}, "grpo, bnpo, dr_grpo, dapo"),
                             ({"loss_type": "dr_grpo"}, "max_completion_tokens")):
        with pytest.raises(ValueError, match=message):
            raft_loss(LOGPS, MASK, **options)
    with pytest.raises(ValueError, match=r"\[N, T\], not \[2, 3\], \[2, 2\]"):
        raft_loss(LOGPS, MASK[:, :2])
    with pytest.raises(ValueError, match=r"\[N, 2, T\]"):
        dpo_loss(LOGPS, LOGPS, MASK, 0.1)
    with pytest.raises(ValueError, match=r"\[N, 2, T\]"):
        dpo_loss(PAIRS, PAIRS_REF[:, :1], PAIRS_MASK, 0.1)
    with pytest.raises(ValueError, match="beta must be above 0"):
        dpo_loss(PAIRS, PAIRS_REF, PAIRS_MASK, 0.0)


@pytest.mark.parametrize("objective, rewards, ended, counted", [
    ("raft", [0.1, 0.9, 0.9, 0.3], "1111", "0100"),  # the first of two equals
    ("raft", [0.1, 0.9, 0.5, 0.3], "1011", "0010"),  # the best that was not cut off
    ("raft", [0.2, 0.9, 0.2, 0.2], "1011", "0000"),  # which is below the group's mean
    ("raft", [0.1, 0.9, 0.5, 0.3], "0000", "0000"),
    ("dpo", [0.5, 0.9, 0.9, 0.1], "1111", "0101"),
    ("dpo", [0.1, 0.9, 0.1, 0.3], "1111", "0110"),  # the last of two equals
    ("dpo", [0.1, 0.9, 0.5, 0.3], "0011", "0011"),
    ("dpo", [0.2, 0.9, 0.2, 0.2], "1011", "0000"),  # a pair must differ
    ("dpo", [0.1, 0.9, 0.5, 0.3], "0100", "0000"),
    ("grpo", [0.1, 0.9, 0.5, 0.3], "0110", "0110"),
])
def test_which_answers_of_a_group_count(objective, rewards, ended, counted):
    config = SimpleNamespace(objective=objective, mask_truncated=True)
    advantages = group_advantages(torch.tensor([rewards], dtype=torch.float64))[0].tolist()
    records = [{"reward": reward, "ended": end == "1", "advantage": advantage}
               for reward, end, advantage in zip(rewards, ended, advantages, strict=True)]
    assert "".join(str(int(kept)) for kept in counted_answers(config, records)) == counted
    config.mask_truncated = False
    whole = counted_answers(config, [record | {"ended": True} for record in records])
    assert counted_answers(config, records) == whole


def test_a_rollout_of_counted_answers_holds_the_best_first():
    rollout = Rollout(
        0, None, Group([1, 2], torch.zeros(1, 1), [[3, 4, 5], [6], [7, 8]]), ["a", "b", "c"],
        [{"reward": 0.1}, {"reward": 0.5}, {"reward": 0.9}], advantages=torch.tensor([-1.0, 0.0, 1.0]),
        kept=torch.tensor([False, True, True]), ref_logps=torch.tensor([[-1.0, -2.0, -3.0], [-4, 0, 0], [-5, -6, 0]]))
    counted = only_counted(rollout)
    assert counted.group.completion_ids == [[7, 8], [6]] and counted.completions == ["c", "b"]
    assert counted.advantages.tolist() == [1.0, 0.0] and counted.kept.all()
    assert counted.ref_logps.tolist() == [[-5.0, -6.0], [-4.0, 0.0]]
    assert len(rollout.group.completion_ids) == 3  # what is logged stays whole
    rollout.ref_logps = None
    assert only_counted(rollout).ref_logps is None


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and training pass, on a random Qwen3 (2 layers, grouped heads) and a Llama with other control tokens

PROMPTS = ["Describe the video in detail.", "Summarize the driving scene concisely.", "What now?"]


@pytest.fixture(scope="module", params=["llm", "llm_plain"])
def model(request, tiny):
    """A float32 model whose adapter is not the identity; its end tokens are made likely, so that answers end."""
    return build(tiny, request.param)


def build(tiny, llm="llm", attention=SPLIT_ATTENTION, **where):
    model = DriveVLM.from_base(tiny.vision, getattr(tiny, llm), num_frames=2, seed=1, **{"dtype": "float32"} | where)
    model.add_lora(r=4, alpha=8, dropout=0.1, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.causal_lm.set_attn_implementation(attention)
    model.set_trainable("lora")
    model.set_lora_dropout(0.0)
    return model


def prompts_of(model, count=3):
    """Prompts of unequal lengths, and random visual tokens for the clips."""
    prompts = [encode_prompt(model.tokenizer, q, model.num_visual_tokens) for q in PROMPTS[:count]]
    generator = torch.Generator().manual_seed(4)
    width = model.head_weight.shape[1]
    return prompts, torch.randn(count, model.num_visual_tokens, width, generator=generator) * 0.1


def groups_of(model, lengths=((1, 5, 9), (7, 2, 2), (1, 1, 4))):
    prompts, visual = prompts_of(model, len(lengths))
    generator = torch.Generator().manual_seed(5)
    allowed = [i for i in range(len(model.tokenizer)) if i not in model.banned_ids.tolist()]
    draw = lambda n: [allowed[i] for i in torch.randint(len(allowed), (n,), generator=generator)]  # noqa: E731
    return [Group(p, v, [draw(n) for n in row]) for p, v, row in zip(prompts, visual, lengths, strict=True)]


def plain_logps(model, group, completion, temperature):
    """Log-probs from one unpadded row and the whole vocabulary, control tokens at -inf."""
    ids = torch.tensor([group.prompt_ids + completion])
    logits = model.llm(inputs_embeds=model.embed(ids, group.visual[None])).logits[0].float() / temperature
    logits[:, model.banned_ids] = -INF
    logps = logits.log_softmax(-1)[len(group.prompt_ids) - 1 : -1]  # [T, V]
    entropy = -(logps.exp() * logps.clamp(min=-1e9)).sum(-1)
    return logps.gather(1, torch.tensor(completion)[:, None])[:, 0], entropy


def adapter_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("attention", [SPLIT_ATTENTION, "sdpa", "eager"])
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_completion_logps_equal_a_plain_forward_of_each_completion(model, shared_prefix, attention, temperature):
    """Values, entropies and gradients to 1e-5, with ragged lengths (one token too) and padded rows."""
    model.causal_lm.set_attn_implementation(attention)
    groups = groups_of(model)
    weights = torch.randn(9, 9, generator=torch.Generator().manual_seed(6))
    expected, entropies = torch.zeros(9, 9), torch.zeros(9, 9)
    for row, (group, completion) in enumerate((g, c) for g in groups for c in g.completion_ids):
        logps, entropy = plain_logps(model, group, completion, temperature)
        expected[row, : len(completion)], entropies[row, : len(completion)] = logps, entropy.detach()
    by_the_book = adapter_gradients(model, (expected * weights).sum())

    logps, entropy, mask = completion_logps(model, groups, temperature=temperature, shared_prefix=shared_prefix)
    assert mask.sum(1).tolist() == [1, 5, 9, 7, 2, 2, 1, 1, 4]
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, entropies, atol=1e-5, rtol=1e-5)
    ours = adapter_gradients(model, (logps * weights).sum())
    assert ours.keys() == by_the_book.keys() and all(g.abs().max() > 0 for g in ours.values())
    for name in ours:
        torch.testing.assert_close(ours[name], by_the_book[name], atol=1e-5, rtol=1e-5, msg=name)
    model.causal_lm.set_attn_implementation(SPLIT_ATTENTION)


def test_the_clip_is_not_compared_with_the_answers_behind_it(model, monkeypatch):
    groups, masks = groups_of(model), []
    hidden_states = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda embeds, mask, positions: masks.append(mask.shape) or
                        hidden_states(embeds, mask, positions))
    completion_logps(model, groups)
    shortest = min(len(group.prompt_ids) for group in groups)
    (rows, _, queries, keys), = masks
    assert rows == 3 and queries == keys - shortest


def test_activation_checkpointing_changes_nothing(model):
    groups = groups_of(model)
    kept = adapter_gradients(model, completion_logps(model, groups)[0].sum())
    model.activation_checkpointing(True)
    again = adapter_gradients(model, completion_logps(model, groups)[0].sum())
    model.activation_checkpointing(False)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def graphs_made():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_blocks_change_nothing_but_rounding(tiny):
    """Gradients of the training pass; all blocks share the compiled code, and `generate` does without."""
    model, again = build(tiny), build(tiny)
    groups, (_, visual) = groups_of(model), prompts_of(model)
    again.activation_checkpointing(True)
    again.compile_blocks()
    before = graphs_made()
    expected = adapter_gradients(model, completion_logps(model, groups)[0].sum())
    found = adapter_gradients(again, completion_logps(again, groups)[0].sum())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)
    again.generate(None, [PROMPTS[0]], max_new_tokens=4, visual=visual[:1])
    assert graphs_made() == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_compiled_blocks_sample_the_same_answers(tiny, shared_prefix):
    model, again = build(tiny), build(tiny)
    prompts, visual = prompts_of(model)
    again.compile_blocks()
    for step in range(2):
        before, seeds = graphs_made(), seeds_of(prompts, 4, step)
        expected, found = (completions_of(sample_groups(m, prompts, visual, seeds, [12, 7, 12],
                                                        shared_prefix=shared_prefix)) for m in (model, again))
        assert [ids for ids, _, _ in found] == [ids for ids, _, _ in expected]
    assert graphs_made() == before  # the second rollout needed nothing new


def test_compiled_blocks_need_a_compiler(tiny, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def no_compiler():
        raise exc.InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    with pytest.raises(ModelError, match="compile_blocks.*install g.., or name one in the variable CXX"):
        build(tiny).compile_blocks()


def test_the_prompt_is_in_the_row_once(model):
    groups = groups_of(model)
    packed = pack_groups(groups, model.pad_token_id)
    owner, positions = packed.owner, packed_positions(packed.owner)
    prompt = len(groups[0].prompt_ids)
    assert (owner[0] == PREFIX).sum() == prompt
    assert owner[0, prompt:].tolist()[:12] == [1] * 4 + [2] * 8  # a completion's last token is not read
    assert positions[0, prompt:].tolist()[:12] == [prompt + i for i in (0, 1, 2, 3)] + [prompt + i for i in range(8)]


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("attention", [SPLIT_ATTENTION, "sdpa", "eager"])
def test_a_group_from_one_prefill_gives_the_answers_of_single_generation(model, shared_prefix, attention):
    """Greedy: three prompts of unequal lengths, two answers each, compared with transformers' generate one by one."""
    model.causal_lm.set_attn_implementation(attention)
    prompts, visual = prompts_of(model)
    answers = sample_groups(
        model, prompts, visual, [[0, 1]] * 3, [12, 7, 12], temperature=0.0, shared_prefix=shared_prefix
    )
    for p, question in enumerate(PROMPTS):
        alone = model.generate(None, [question], max_new_tokens=7 if p == 1 else 12, visual=visual[p : p + 1])[0]
        for answer in answers[p]:
            assert (answer.ids, answer.text, answer.ended) == (alone.ids, alone.text, alone.ended)
    model.causal_lm.set_attn_implementation(SPLIT_ATTENTION)


def seeds_of(prompts, group, step=0):
    return [[stable_seed(9, step, p, k) for k in range(group)] for p in range(len(prompts))]


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_sampled_completion_depends_on_its_seed_and_not_on_the_batch(model, shared_prefix):
    prompts, visual = prompts_of(model)
    seeds = seeds_of(prompts, 4)
    together = sample_groups(model, prompts, visual, seeds, [15] * 3, shared_prefix=shared_prefix)
    again = sample_groups(model, prompts, visual, seeds, [15] * 3, shared_prefix=not shared_prefix)
    assert [c.ids for g in together for c in g] == [c.ids for g in again for c in g]
    one = sample_groups(model, prompts[1:2], visual[1:2], [[seeds[1][2]]], [15], shared_prefix=shared_prefix)
    assert one[0][0].ids == together[1][2].ids
    assert len({tuple(c.ids) for c in together[0]}) == 4
    other = sample_groups(model, prompts, visual, seeds_of(prompts, 4, step=1), [15] * 3)
    assert [c.ids for g in together for c in g] != [c.ids for g in other for c in g]


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_log_probs_as_sampled_are_those_of_the_policy(model, shared_prefix):
    """Rows that finish early leave without an effect on the others; the end id is in the loss."""
    prompts, visual = prompts_of(model)
    sampled = sample_groups(
        model, prompts, visual, seeds_of(prompts, 8), [40] * 3, temperature=1.3, shared_prefix=shared_prefix
    )
    lengths = [len(c.ids) for group in sampled for c in group]
    assert min(lengths) < 20 and len(set(lengths)) > 3
    groups = [Group(p, v, [c.ids for c in g]) for p, v, g in zip(prompts, visual, sampled, strict=True)]
    logps, _, mask = completion_logps(model, groups, temperature=1.3)
    as_sampled = torch.tensor([x for group in sampled for c in group for x in c.logps])
    torch.testing.assert_close(logps[mask], as_sampled, atol=1e-5, rtol=1e-5)
    for completion in (c for group in sampled for c in group):
        inner, last = completion.ids[:-1], completion.ids[-1]
        assert not set(inner) & set(model.end_ids) and not set(completion.ids) & set(model.banned_ids.tolist())
        assert completion.ended == (last in model.end_ids) and (completion.ended or len(completion.ids) == 40)


def test_all_end_ids_end_a_completion(tiny):
    model = build(tiny)
    prompts, visual = prompts_of(model)
    assert len(model.end_ids) == 2
    for end in model.end_ids:
        model.end_ids, kept = [end], model.end_ids
        ids = [c.ids for g in sample_groups(model, prompts, visual, seeds_of(prompts, 8), [60] * 3) for c in g]
        model.end_ids = kept
        both = [c.ids for g in sample_groups(model, prompts, visual, seeds_of(prompts, 8), [60] * 3) for c in g]
        assert any(len(a) > len(b) for a, b in zip(ids, both, strict=True))


def test_sampled_frequencies_are_the_probabilities():
    logits = torch.tensor([[1.0, -INF, 0.0, 2.0, -INF]]).repeat(20000, 1)
    tokens = sample_tokens(logits, torch.rand(20000, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(tokens, minlength=5) / 20000
    torch.testing.assert_close(counts, logits[0].softmax(-1), atol=0.01, rtol=0)
    assert counts[1] == 0 and counts[4] == 0
    edges = sample_tokens(torch.tensor([[-INF, 0.0, 0.0, -INF]] * 2), torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [1, 2]


def test_a_token_is_where_the_number_falls_in_the_cumulative_distribution():
    """As many ids as Qwen3 has, flat and peaked, some impossible: blocks of ids give the token that a running sum over
    all of them in float64 gives."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 151_937, generator=generator) * torch.linspace(0.1, 8, 40)[:, None]
    logits[:, ::3] = -INF
    uniforms = torch.rand(40, generator=generator)
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    assert torch.equal(sample_tokens(logits, uniforms), expected)
    ends = sample_tokens(logits[:2], torch.tensor([0.0, 1 - 2**-24]))
    assert ends[0] == 1 and torch.isfinite(logits[1, ends[1]])


def test_an_impossible_token_is_never_sampled_where_rounding_decides():
    """Numbers that fall where one block of ids ends and the next begins, whose outermost ids are impossible."""
    block, generator = rollout.BLOCK, torch.Generator().manual_seed(0)
    logits = torch.randn(400, 8, block, generator=generator)
    logits[..., :2] = logits[..., -2:] = -INF
    logits = logits.flatten(1)  # [400, V]
    shares = logits.softmax(-1).double().unflatten(1, (8, block)).sum(-1).cumsum(1)  # [400, 8]
    borders = (shares / shares[:, -1:])[:, 0].float()
    for roundings in range(-4, 5):
        tokens = sample_tokens(logits, borders * (1 + roundings * 2**-24))
        assert torch.isfinite(logits.gather(1, tokens[:, None])).all()


def completions_of(groups):
    return [(c.ids, c.logps, c.ended) for group in groups for c in group]


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_it_does_not_matter_how_often_ended_answers_are_looked_for(model, shared_prefix):
    prompts, visual = prompts_of(model)
    seeds, options = seeds_of(prompts, 8), {"temperature": 1.3, "shared_prefix": shared_prefix}
    every = completions_of(sample_groups(model, prompts, visual, seeds, [40, 9, 40], check_every=1, **options))
    for steps in (3, 8, 100):
        seldom = completions_of(
            sample_groups(model, prompts, visual, seeds, [40, 9, 40], check_every=steps, **options))
        assert [ids for ids, _, _ in every] == [ids for ids, _, _ in seldom]
        assert [ended for _, _, ended in every] == [ended for _, _, ended in seldom]
        for (_, logps, _), (_, others, _) in zip(every, seldom, strict=True):
            torch.testing.assert_close(torch.tensor(logps), torch.tensor(others), atol=1e-5, rtol=1e-5)
    assert len({len(ids) for ids, _, _ in every}) > 3


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("room", [1, 3, 64])
def test_a_cache_with_room_gives_what_transformers_own_gives(model, monkeypatch, room, shared_prefix):
    """To the bit, over answers that end early, so that rows leave, and past the room."""
    prompts, visual = prompts_of(model)
    asked = (model, prompts, visual, seeds_of(prompts, 4), [40, 9, 40])
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "PreallocatedLayer", DynamicLayer)
        expected = completions_of(sample_groups(*asked, temperature=1.3, shared_prefix=shared_prefix))
    monkeypatch.setattr(rollout, "SPARE_STEPS", room)
    assert completions_of(sample_groups(*asked, temperature=1.3, shared_prefix=shared_prefix)) == expected


def test_a_token_is_written_in_its_place():
    layer = rollout.PreallocatedLayer()
    parts = torch.randn(8, 2, 3, 5, 4)  # [steps, R, heads, n, head size]
    layer.update(parts[0], -parts[0])
    places = set()
    for step in range(1, 8):
        keys, values = layer.update(parts[step], -parts[step])
        assert torch.equal(keys, torch.cat(list(parts[:step + 1]), 2)) and torch.equal(values, -keys)
        places.add(keys.data_ptr())
    assert len(places) == 1 and layer.get_seq_length() == 40


@pytest.mark.parametrize("width", [1, 5])
def test_attention_over_a_cache_needs_no_copies_of_shared_keys(width):
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 6, width, 8, generator=generator), torch.randn(2, 2, 30, 8, generator=generator)
    values = torch.randn(2, 2, 30, 8, generator=generator)
    mask = torch.randn(2, 1, width, 30, generator=generator)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys.repeat_interleave(3, 1), values.repeat_interleave(3, 1), attn_mask=mask, scale=0.3)
    found = decoding_attention(query, keys, values, mask, 0.3)  # [R, W, H, d]
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-6, rtol=1e-6)


def test_models_that_cannot_share_a_prefix_are_refused_with_a_hint(tiny):
    model = build(tiny)
    check_shared_prefix(model.causal_lm)
    model.causal_lm.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="shared_prefix to false"):
        check_shared_prefix(model.causal_lm)


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_training_raises_the_rewarded_token_from_rare_to_frequent(tiny, loss_type):
    """The reward is 1 if the answer contains a token: its share rises from below 0.2 to above 0.9."""
    model = build(tiny)
    with torch.no_grad():
        model.head_weight.mul_(8.0)  # a random head is so flat that no hidden state could make a token likely
    prompts, visual = prompts_of(model, 2)
    wanted = model.tokenizer.encode("c", add_special_tokens=False)[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    shares = []
    for step in range(60):
        answers = sample_groups(model, prompts, visual, seeds_of(prompts, 24, step), [8, 8])
        rewards = torch.tensor([[float(wanted in c.ids) for c in group] for group in answers])
        shares.append(rewards.mean().item())
        if sum(shares[-5:]) / 5 > 0.9:
            break
        live = [p for p in range(2) if has_variance(rewards)[p]]
        if not live:
            continue
        groups = [Group(prompts[p], visual[p], [c.ids for c in answers[p]]) for p in live]
        logps, _, mask = completion_logps(model, groups)
        advantages = group_advantages(rewards)[live].flatten()
        loss, _ = grpo_loss(logps, advantages, mask, loss_type=loss_type, max_completion_tokens=8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(shares[:3]) / 3 < 0.2 and sum(shares[-5:]) / 5 > 0.9, shares


# ---------------------------------------------------------------------------------------------------------------------
# Reference, prompts, cached tokens


def test_the_reference_is_the_adapter_it_was_loaded_from(tiny, tmp_path):
    model = build(tiny)
    model.save_checkpoint(tmp_path / "stage2", stage=2)
    stored = load_reference(model, tmp_path / "stage2")
    assert stored == adapter_hash(tmp_path / "stage2")
    groups = groups_of(model)
    with torch.no_grad(), reference_policy(model):
        ref_logps, _, mask = completion_logps(model, groups)
    logps, _, _ = completion_logps(model, groups)
    _, stats = grpo_loss(logps, torch.ones(9), mask, ref_logps=ref_logps, beta=0.1)
    assert stats["kl"] == 0.0 and stats["ratio"] == 1.0  # step 0, to the bit

    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".default." in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    logps.sum().backward()
    optimizer.step()
    assert adapter_hash(model.adapter_state("reference")) == stored
    assert adapter_hash(model.adapter_state()) != stored
    with torch.no_grad(), reference_policy(model):
        again, _, _ = completion_logps(model, groups)
    assert torch.equal(again, ref_logps)
    moved, _, _ = completion_logps(model, groups)
    assert not torch.equal(moved, ref_logps)
    model.save_checkpoint(tmp_path / "stage3", stage=3)  # only the policy is saved
    assert adapter_hash(tmp_path / "stage3") == adapter_hash(model.adapter_state())
    assert not (tmp_path / "stage3" / "adapter" / "reference").exists()


def test_after_an_error_inside_the_reference_the_policy_is_active_again(tiny, tmp_path):
    model = build(tiny)
    model.save_checkpoint(tmp_path / "stage2", stage=2)
    load_reference(model, tmp_path / "stage2")
    with pytest.raises(KeyError), reference_policy(model):
        raise KeyError
    assert model.llm.active_adapter == "default"
    model.check_trainable()


def test_prompts_alternate_by_mode_and_every_entry_is_used_once_per_pass():
    entries = [Entry(f"{v}#{mode}", v, mode, "?", ("!",)) for v in "abcde" for mode in ("microscope", "copilot")]
    modes = ["microscope", "copilot", "microscope"]
    steps = [prompts_of_step(entries, step, 3, modes, 7) for step in range(10)]
    assert all([e.mode for e in step] == modes for step in steps)
    for mode, passes in (("microscope", 4), ("copilot", 2)):
        order = [e.video for step in steps for e in step if e.mode == mode]
        rounds = [order[i * 5 : i * 5 + 5] for i in range(passes)]
        assert all(sorted(r) == list("abcde") for r in rounds) and len(set(map(tuple, rounds))) > 1
    assert steps[4] == prompts_of_step(entries, 4, 3, modes, 7)
    assert steps != [prompts_of_step(entries, step, 3, modes, 8) for step in range(10)]


def test_prompts_ask_a_wording_of_their_mode_drawn_anew_in_each_pass():
    entries = [Entry(f"{v}#copilot", f"{v}.mp4", "copilot", MODES["copilot"], ("!",)) for v in "abc"]
    own = Entry("d#copilot", "d.mp4", "copilot", "And now?", ("!",))
    asked = {}
    for step in range(24):  # one prompt per step, four entries: six passes
        entry, = prompts_of_step([*entries, own], step, 1, ["copilot"], 7)
        asked.setdefault(entry.id, []).append(entry.question)
        whole = prompts_of_step([*entries, own], step // 4, 4, ["copilot"], 7)  # the same slots, in steps of four
        assert whole[step % 4] == entry
    assert asked.pop("d#copilot") == ["And now?"] * 6
    for entry in entries:
        assert asked[entry.id] == [draw_question(entry, 7, epoch) for epoch in range(6)]
        assert len(set(asked[entry.id])) > 2


def test_cached_tokens_equal_those_of_a_single_clip(tiny, tmp_path):
    model = build(tiny)
    tokens = VisualTokens(model, tmp_path / "tokens", tiny.videos)
    fresh = tokens("car.mp4")
    frames = torch.as_tensor(cached_frames(tiny.videos / "car.mp4", 2, 96, None))
    with torch.no_grad():
        assert torch.equal(fresh, model.encode_video(frames[None])[0])
    (file,) = (tmp_path / "tokens").iterdir()
    written = file.stat().st_mtime_ns
    assert torch.equal(VisualTokens(build(tiny), tmp_path / "tokens", tiny.videos)("car.mp4"), fresh)
    assert file.stat().st_mtime_ns == written
    with torch.no_grad():
        model.temporal += 1.0  # another projector: another file
    assert not torch.equal(VisualTokens(model, tmp_path / "tokens", tiny.videos)("car.mp4"), fresh)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    with pytest.raises(VideoError):
        tokens("absent.mp4")

"""GRPO's pure functions against tables worked out by hand, then the engine against the plain way of doing things.

Run: `python -m pytest tests/test_grpo.py -q`
"""

import math

import pytest
import torch

from stage3.grpo import group_advantages, grpo_loss, has_variance

INF = float("inf")
NAN = float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


def test_advantages_by_group():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    # group 1: mean 2, std 1; group 2: mean 1/3, std sqrt(((1/3)^2 * 2 + (2/3)^2) / 2) = 0.5773503
    std = 0.5773502691896258
    expected = [[-1 / 1.0001, 0.0, 1 / 1.0001], [-1 / 3 / (std + 1e-4), -1 / 3 / (std + 1e-4), 2 / 3 / (std + 1e-4)]]
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(expected, dtype=torch.float64))


def test_advantages_by_batch_and_none():
    rewards = torch.tensor([[1.0, 3.0], [2.0, 6.0]])
    # all four: mean 3, std sqrt((4 + 0 + 1 + 9) / 3)
    std = math.sqrt(14 / 3) + 1e-4
    differences = torch.tensor([[-1.0, 1.0], [-2.0, 2.0]])
    torch.testing.assert_close(group_advantages(rewards, scale="batch"), differences / std)
    torch.testing.assert_close(group_advantages(rewards, scale="none"), differences)


def test_advantages_with_a_std_floor():
    rewards = torch.tensor([[0.500, 0.502], [0.0, 1.0]])
    advantages = group_advantages(rewards, std_floor=0.05)
    torch.testing.assert_close(advantages[0], torch.tensor([-0.001, 0.001]) / 0.0501, rtol=1e-4, atol=0)
    torch.testing.assert_close(advantages[1], torch.tensor([-0.5, 0.5]) / (math.sqrt(0.5) + 1e-4))
    assert group_advantages(rewards)[0, 1] > 0.6  # without the floor, a difference of 0.002 speaks as loud as any


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exact_zeros(scale, dtype):
    rewards = torch.tensor([[0.1] * 7, [0.7] * 6 + [0.8]], dtype=dtype)
    advantages = group_advantages(rewards, scale=scale)
    assert advantages.dtype == dtype
    assert (advantages[0] == 0).all() and (advantages[1] != 0).all()
    assert has_variance(rewards).tolist() == [False, True]


def test_whole_number_rewards_are_fine():
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
def test_advantages_refuse(rewards, scale, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, scale=scale)


# ---------------------------------------------------------------------------------------------------------------------
# Loss, by hand: two rows, of three tokens and of one, ratios 1.5, 1.0, 0.5 and 2.0

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
def test_loss_by_hand(loss_type, expected):
    loss, stats = grpo_loss(
        LOGPS, ADVANTAGES, MASK, old_logps=OLD, loss_type=loss_type, max_completion_tokens=10, num_items=None
    )
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert stats["tokens"] == 4
    assert stats["ratio"].item() == pytest.approx(5.0 / 4)
    assert stats["clip_high"].item() == pytest.approx(1 / 4)  # 1.5 with A > 0
    assert stats["clip_low"].item() == 0.0  # 0.5 has A > 0, 2.0 has A < 0: neither is cut
    assert stats["kl"].item() == 0.0


def test_clip_low_and_high_are_separate():
    def loss(advantage, ratio, low, high):
        logps = torch.tensor([[math.log(ratio)]])
        result = grpo_loss(
            logps, torch.tensor([advantage]), torch.ones(1, 1), old_logps=torch.zeros(1, 1),
            epsilon=low, epsilon_high=high,
        )  # fmt: skip
        return result[0].item(), result[1]["clip_low"].item(), result[1]["clip_high"].item()

    assert loss(1.0, 1.25, 0.2, 0.28) == pytest.approx((-1.25, 0, 0))
    assert loss(1.0, 1.25, 0.2, None) == pytest.approx((-1.2, 0, 1))
    assert loss(1.0, 1.40, 0.2, 0.28) == pytest.approx((-1.28, 0, 1))
    assert loss(-1.0, 0.70, 0.2, 0.28) == pytest.approx((0.8, 1, 0))
    assert loss(-1.0, 0.70, 0.4, 0.28) == pytest.approx((0.7, 0, 0))
    assert loss(-1.0, 3.00, 0.2, 0.28) == pytest.approx((3.0, 0, 0))  # never clipped on this side


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
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert stats["kl"].item() == pytest.approx(sum(token_kl) / 4, abs=1e-9)


def test_kl_is_reported_but_not_paid_without_beta():
    loss, stats = grpo_loss(LOGPS, ADVANTAGES, MASK, old_logps=OLD, ref_logps=LOGPS + 1.0, beta=0.0)
    assert loss.item() == pytest.approx(MEANS["dapo"])
    assert stats["kl"].item() == pytest.approx(math.e - 2)


def test_dapo_divides_by_the_items_it_is_given():
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
def test_masked_positions_cannot_do_harm(bad, loss_type):
    def run(filler):
        fill = torch.where(MASK.bool(), 0.0, torch.tensor(filler))
        logps = (LOGPS + fill).requires_grad_()
        loss, stats = grpo_loss(
            logps, ADVANTAGES, MASK, old_logps=OLD + fill, ref_logps=LOGPS + fill, beta=0.1, loss_type=loss_type,
            max_completion_tokens=10,
        )  # fmt: skip
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
    )  # fmt: skip
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()
    assert all(math.isfinite(float(value)) for value in stats.values())


def test_two_infinities_differ_by_nothing():
    logps = torch.tensor([[-INF, -INF]])
    loss, stats = grpo_loss(logps, torch.tensor([1.0]), torch.ones(1, 2), old_logps=logps, ref_logps=logps, beta=1.0)
    assert loss.item() == -1.0 and stats["kl"] == 0.0 and stats["ratio"] == 1.0


@pytest.mark.parametrize("where", ["logps", "old_logps", "ref_logps"])
def test_nan_that_counts_reaches_the_loss(where):
    inputs = {"logps": LOGPS.clone(), "old_logps": OLD.clone(), "ref_logps": LOGPS.clone()}
    inputs[where][0, 1] = NAN
    loss, _ = grpo_loss(inputs.pop("logps"), ADVANTAGES, MASK, beta=0.1, **inputs)
    assert torch.isnan(loss)


def test_nothing_left_is_a_zero_loss_with_a_graph():
    for loss_type in MEANS:
        logps = LOGPS.clone().requires_grad_()
        loss, _ = grpo_loss(logps, ADVANTAGES, MASK * 0, loss_type=loss_type, max_completion_tokens=10)
        loss.backward()
        assert loss.item() == 0.0 and (logps.grad == 0).all()


def test_half_precision_is_computed_in_single():
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
def test_loss_refuses(options, message):
    arguments = {"logps": LOGPS, "advantages": ADVANTAGES, "mask": MASK, **options}
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments)

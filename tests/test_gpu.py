"""Log-probs, gradients and sampled answers on a CUDA GPU are those of the CPU.

Run: `make test-gpu`
"""

import dataclasses

import pytest
import torch
from test_grpo import adapter_gradients, build, completions_of, groups_of, prompts_of, seeds_of

from stage3.grpo import Group, completion_logps
from stage3.rollout import sample_groups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_log_probs_and_gradients_are_those_of_the_cpu(tiny, shared_prefix):
    logps, gradients = [], []
    for device in ("cpu", "cuda"):
        model = build(tiny, device=device)
        groups = [dataclasses.replace(group, visual=group.visual.to(device)) for group in groups_of(model)]
        found, _, _ = completion_logps(model, groups, shared_prefix=shared_prefix)
        logps.append(found.detach().cpu())
        gradients.append({name: g.cpu() for name, g in adapter_gradients(model, found.sum()).items()})
    torch.testing.assert_close(*logps, atol=1e-4, rtol=1e-4)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_sampled_answers_are_those_of_the_cpu(tiny, shared_prefix):
    answers = []
    for device in ("cpu", "cuda"):
        model = build(tiny, device=device)
        prompts, visual = prompts_of(model)
        answers.append(completions_of(sample_groups(model, prompts, visual.to(device), seeds_of(prompts, 4), [15] * 3,
                                                    shared_prefix=shared_prefix)))
    assert [ids for ids, _, _ in answers[0]] == [ids for ids, _, _ in answers[1]]


def test_log_probs_in_bfloat16_are_about_those_of_sampling(tiny):
    model = build(tiny, device="cuda", dtype="bfloat16")
    prompts, visual = prompts_of(model)
    sampled = sample_groups(model, prompts, visual.to("cuda"), seeds_of(prompts, 8), [40] * 3)
    groups = [Group(p, v, [c.ids for c in g]) for p, v, g in zip(prompts, visual.to("cuda"), sampled, strict=True)]
    logps, _, mask = completion_logps(model, groups)
    as_sampled = torch.tensor([x for group in sampled for c in group for x in c.logps])
    assert (logps[mask].cpu() - as_sampled).abs().max() < 0.1

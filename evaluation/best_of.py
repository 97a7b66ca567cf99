"""Best of n: the answer that the reward likes best of n sampled ones. It costs n answers, and no training.

The reward is stage 3's own, by the evidence of its detector. Neither the truth nor a caption of a held-out clip has a
say: where stage 3 shows the reward a reference caption, there is none here, as there is none for a new clip. Nor is the
answers' language weighed: they are the checkpoint's own samples.
"""

import hashlib
import importlib
import json
from pathlib import Path

from stage3.detect_objects import evidence_problems, get_evidence
from stage3.evidence import evidence_dict
from stage3.rollout import load_reward, score_text
from training.common import file_sha256


def best_of_problems(config, held_out) -> list[str]:
    """What is wrong with the reward by which `best_of` chooses, or with its evidence; one line each."""
    problems = evidence_problems(held_out, config.detector, config.evidence_cache, "detector")
    for mode in sorted({entry.mode for entry in held_out})[:1]:
        problems += filter(None, [load_reward(config, mode, reference=None)[1]])
    return problems


class BestOf:
    """Chooses among sampled answers to entries. config: EvaluateConfig with `best_of` above 0.

    evidence: {video: the reward's evidence}; the detector is run on clips that are new. left_out: {video: why} of the
    clips where detection failed, so that nothing can be chosen there.
    """

    def __init__(self, config, entries):
        self.config = config
        self.reward, _ = load_reward(config, entries[0].mode, reference=None)  # best_of_problems has tried it
        self.evidence = get_evidence(entries, config.video_root, config.detector, config.evidence_cache)
        self.left_out = {video: "the reward's detector has no evidence"
                         for video, evidence in self.evidence.items() if evidence is None}

    def key(self, entries) -> str:
        """Changes with all that a choice depends on beside the answers: evidence, weights, the code of the reward."""
        module = importlib.import_module(self.config.reward.partition(":")[0])
        code = [file_sha256(file) for file in sorted(Path(module.__file__).parent.glob("*.py"))]
        videos = sorted({entry.video for entry in entries})
        evidence = [evidence_dict(self.evidence[video]) for video in videos]
        content = [self.config.reward, self.config.reward_weights, code, evidence]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    def choose(self, rows: list[dict]) -> list[dict]:
        """One row of predictions.jsonl for each entry among `rows`: that of its best answer, the first of equals, with
        its "reward". Answers that were cut off are taken only where all were. "seconds" is the time of all n."""
        best, seconds = {}, {}
        for row in rows:
            reward, _ = score_text(row["text"], self.evidence[row["video"]], row["mode"], None, self.reward,
                                   self.config.reward_weights)
            seconds[row["id"]] = seconds.get(row["id"], 0.0) + row["seconds"]
            before = best.get(row["id"])
            if before is None or (row["ended"], reward) > (before["ended"], before["reward"]):
                best[row["id"]] = row | {"reward": reward}
        return [row | {"sample": 0, "seconds": round(seconds[name], 4)} for name, row in best.items()]

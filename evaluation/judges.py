"""Two judges of the same clips: how far they agree, and the truth on which they do."""

from collections import Counter

from evaluation.ratings import cohens_kappa
from evaluation.scoring import Truth


def kappa(both: int, only_first: int, only_second: int, neither: int) -> float | None:
    """Cohen's kappa of two judges that answer yes or no; None where chance alone would make them agree."""
    return cohens_kappa([("yes", "yes")] * both + [("yes", "no")] * only_first + [("no", "yes")] * only_second
                        + [("no", "no")] * neither)


def agreement(first: dict[str, Truth], second: dict[str, Truth]) -> dict:
    """How two judges agree on which classes are in which clips.

    Counted are pairs of a clip and a class of which neither judge is unsure; only classes that one of them finds
    somewhere, because the others would make any two judges agree. Returns {"clips", "pairs", "agreeing" (share),
    "kappa", "classes": {class: {"both", "only_first", "only_second", "neither"}}}.
    """
    clips = sorted(set(first) & set(second))
    found = set().union(*(first[video].present | second[video].present for video in clips))
    classes = {}
    for name in sorted(found):
        counts = Counter(both=0, only_first=0, only_second=0, neither=0)
        for video in clips:
            if name not in first[video].unknown | second[video].unknown:
                seen = name in first[video].present, name in second[video].present
                counts[{(True, True): "both", (True, False): "only_first", (False, True): "only_second",
                        (False, False): "neither"}[seen]] += 1
        classes[name] = dict(counts)
    total = Counter()
    for counts in classes.values():
        total.update(counts)
    pairs, value = sum(total.values()), kappa(**total) if total else None
    return {"clips": len(clips), "pairs": pairs, "classes": classes,
            "agreeing": round((total["both"] + total["neither"]) / pairs, 4) if pairs else None,
            "kappa": None if value is None else round(value, 4)}


def agreed_truth(first: dict[str, Truth], second: dict[str, Truth]) -> dict[str, Truth]:
    """What both judges say of the clips that both judge; a class on which they differ counts as unknown. What they know
    of a class beyond that it is there is not compared, so claims are not judged."""
    truth = {}
    for video in sorted(set(first) & set(second)):
        a, b = first[video], second[video]
        present = a.present & b.present
        truth[video] = Truth(present, (a.salient | b.salient) & present,
                             (a.present ^ b.present) | a.unknown | b.unknown, a.order, traps=a.traps)
    return truth

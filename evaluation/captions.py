"""BLEU, ROUGE-L and CIDEr against the held-out captions, by their usual packages, for those who must report them.

They reward the words of the reference, not what the clip shows: a caption that invents what references invent scores
well. pycocoevalcap's PTB tokenizer needs Java; texts are split into words as everywhere in this repo instead, so CIDEr
is comparable within a table and not with other papers'.
"""

import os

from evaluation.scoring import WORD

os.environ.setdefault("SACREBLEU_SEED", "42")  # sacrebleu reads its bootstrap's seed from here


def add_caption_scores(rows: list[dict], references: dict[str, tuple[str, ...]]) -> list[dict]:
    """One system's rows of predictions.jsonl -> copies with "rouge_l", "cider", "captions" and "captioned" (1).

    `references`: {entry id: its captions}. CIDEr weighs words by how many clips' captions of the same mode have them.
    """
    from pycocoevalcap.cider.cider import Cider
    from rouge_score.rouge_scorer import RougeScorer

    scorer, scored = RougeScorer(["rougeL"], use_stemmer=True), []
    for mode in sorted({row["mode"] for row in rows}):
        of_mode, texts, captions = [row for row in rows if row["mode"] == mode], {}, {}
        for i, row in enumerate(of_mode):
            texts[i] = [" ".join(WORD.findall(row["text"].lower()))]
            captions[i] = [" ".join(WORD.findall(text.lower())) for text in references[row["id"]]]
        _, ciders = Cider().compute_score(captions, texts)
        for row, cider in zip(of_mode, ciders, strict=True):
            own = list(references[row["id"]])
            scored.append(row | {"rouge_l": scorer.score_multi(own, row["text"])["rougeL"].fmeasure,
                                 "cider": float(cider), "captions": own, "captioned": 1})
    return scored


def add_bleu(block: dict, rows: list[dict]) -> None:
    """Adds one system's BLEU, from 0 to 100, and its interval to its block of metrics.json. It is no mean over texts,
    so its draws are sacrebleu's own."""
    from sacrebleu.metrics import BLEU

    for mode in sorted({row["mode"] for row in rows}):
        of_mode = [row for row in rows if row["mode"] == mode]
        longest = max(len(row["captions"]) for row in of_mode)
        variants = []  # sacrebleu wants one list of references per variant; None where a clip has fewer
        for k in range(longest):
            variants.append([(*row["captions"], *[None] * longest)[k] for row in of_mode])
        score = BLEU().corpus_score([row["text"] for row in of_mode], variants, n_bootstrap=1000)
        block[mode]["bleu"] = round(score.score, 2)
        block[mode]["interval"]["bleu"] = [round(score._mean + sign * score._ci, 2) for sign in (-1, 1)]

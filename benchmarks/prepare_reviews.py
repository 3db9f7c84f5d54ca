"""Makes the bundled movie-review data from the source distribution of `vaderSentiment` (PyPI, MIT).

    python -m benchmarks.prepare_reviews [FOLDER]        # downloads 2.4 MB, writes the JSONL files

The archive holds 10,605 sentences from movie reviews, each rated from -4 to +4 by 15 to 29 people (Hutto & Gilbert,
ICWSM-14; sentences collected by Pang & Lee). Every split depends on a hash of the text, so the same archive always
gives the same files, and no sentence is in two of these:

* test: held-out perplexity, preferences, judge ratings and the openings that evaluation prompts are taken from;
* gold: ratings that only the independent metric of `data/gold.py` is fitted to;
* reward: ratings that become preferences, chosen and rejected being two sentences with the same opening.

SFT learns the words of gold and reward sentences, never their ratings. Left out: the archive's tweets, product reviews
and editorials.
"""

from __future__ import annotations

import hashlib
import html
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

REQUIREMENT = "vaderSentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LICENSE = "vaderSentiment-3.3.2/LICENSE.txt"

TEST_SHARE = 0.15  # of all sentences
GOLD_SHARE = 0.30  # of the sentences that are not test
EVAL_OPENING_SHARE = 0.30  # of all openings: PPO never starts from these
MIN_WORDS, MAX_WORDS = 4, 20  # of the sentences that are learnt or compared; the judge sees every length
OPENING_WORDS = 2
MIN_GAP = 1.0  # in mean rating, between chosen and rejected


class Review(NamedTuple):
    """One sentence and the mean of its human ratings, from -4 to +4."""

    text: str
    rating: float


def clean(text: str) -> str:
    """Undo what the original collection did to the sentence: HTML entities, '' for quotes, dashes lost to spaces."""
    text = html.unescape(text).replace("''", '"').replace("’", "'")
    text = re.sub(r"\s{3,}", " – ", text.strip())
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"^(\.\.\.|[–.,;:])\s*", "", text)
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    return re.sub(r"(?<!\.)\.\.$", ".", text)


def parse(table: str) -> list[Review]:
    """Read the tab-separated lines `id, mean rating, text`; a sentence that comes twice is kept once."""
    reviews: dict[str, Review] = {}
    for line in table.splitlines():
        _, rating, text = line.split("\t")
        review = Review(clean(text), round(float(rating), 3))
        reviews.setdefault(re.sub(r"\W", "", review.text.lower()), review)
    return list(reviews.values())


def share(purpose: str, text: str) -> float:
    """A number in [0, 1) that depends on `purpose` and `text` alone: the same on every machine, in every order."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\n{text}".encode()).digest()[:6]) / 2**48


def cut(text: str, words: int) -> tuple[str, str]:
    """The prompt that ends after the first `words` words, and the rest of the sentence with its leading space."""
    parts = text.split(" ")
    return f"Movie review: {' '.join(parts[:words])}", "".join(f" {part}" for part in parts[words:])


def demonstrations(reviews: Iterable[Review]) -> list[dict[str, str]]:
    """Rows `prompt, completion`, in TRL's column names."""
    return [dict(zip(("prompt", "completion"), cut(review.text, OPENING_WORDS), strict=True)) for review in reviews]


def openings(reviews: Iterable[Review], *, held_out: bool) -> list[dict[str, str]]:
    """Rows `prompt`: each distinct opening once; an opening is either held out or not."""
    prompts = dict.fromkeys(cut(review.text, OPENING_WORDS)[0] for review in reviews)
    return [{"prompt": p} for p in prompts if (share("opening", p) < EVAL_OPENING_SHARE) == held_out]


def preferences(reviews: Sequence[Review], *, max_uses: int) -> list[dict[str, Any]]:
    """Rows `prompt, chosen, rejected, margin`: real sentences with one opening, chosen rated higher by `margin`.

    Long openings come first. No sentence is used more than `max_uses` times, and no pair twice.
    """
    uses: Counter[str] = Counter()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for words in (3, 2, 1):
        groups: dict[str, list[Review]] = {}
        for review in reviews:
            groups.setdefault(cut(review.text, words)[0], []).append(review)
        for one, other in (pair for group in groups.values() for pair in itertools.combinations(group, 2)):
            better, worse = (one, other) if one.rating > other.rating else (other, one)
            margin, pair = round(better.rating - worse.rating, 3), (better.text, worse.text)
            if margin < MIN_GAP or pair in rows or max(uses[text] for text in pair) >= max_uses:
                continue
            (prompt, chosen), (_, rejected) = (cut(text, words) for text in pair)
            rows[pair] = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin}
            uses.update(pair)
    return sorted(rows.values(), key=lambda row: share("order", row["prompt"] + row["chosen"] + row["rejected"]))


def tables(reviews: Iterable[Review]) -> dict[str, list[dict[str, Any]]]:
    """All bundled files by name, as rows."""
    splits: dict[str, list[Review]] = {"test": [], "gold": [], "reward": []}
    for review in reviews:
        is_gold = share("gold", review.text) < GOLD_SHARE
        splits["test" if share("test", review.text) < TEST_SHARE else "gold" if is_gold else "reward"].append(review)
    learnt, test, reward = (
        _short(rows) for rows in (splits["reward"] + splits["gold"], splits["test"], splits["reward"])
    )
    return {
        "sft_train": demonstrations(learnt),
        "sft_eval": demonstrations(test),
        "preferences_train": preferences(reward, max_uses=2),
        "preferences_eval": preferences(test, max_uses=1),
        "prompts_train": openings(learnt, held_out=False),
        "prompts_eval": openings(test, held_out=True),
        "ratings_gold": [review._asdict() for review in splits["gold"]],
        "ratings_test": [review._asdict() for review in test],
    }


def _short(reviews: Iterable[Review]) -> list[Review]:
    """The reviews of `MIN_WORDS` to `MAX_WORDS` words, in hash order."""
    kept = [review for review in reviews if MIN_WORDS <= len(review.text.split()) <= MAX_WORDS]
    return sorted(kept, key=lambda review: share("order", review.text))


def download() -> bytes:
    """The pinned source distribution, fetched by pip, which stops if its hash differs."""
    with tempfile.TemporaryDirectory() as folder:
        requirements, target = Path(folder) / "requirements.txt", Path(folder) / "archive"
        requirements.write_text(REQUIREMENT)
        options = [
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--require-hashes",
            "--requirement",
            str(requirements),
        ]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, "--dest", str(target)], check=True)
        return next(target.iterdir()).read_bytes()


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        assert file is not None, name
        return file.read()


def write(folder: Path) -> None:
    """Download, check, split, and write every file of `data/reviews` into `folder`."""
    archive = download()
    reviews = parse(_member(_member(archive, INNER_ARCHIVE), RATINGS).decode())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "LICENSE.vaderSentiment.txt").write_bytes(_member(archive, LICENSE))
    for name, rows in tables(reviews).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "data/reviews")

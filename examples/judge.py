"""A judge of your own for `stage=eval`: it prefers the answer that says more different words.

    python run_pipeline.py stage=eval 'eval.judges=[reward,examples.judge:varied]' output_dir=outputs/RUN

A judge is called with a few pairs at a time, in both orders, and may ask whatever it likes: a program, a model, a
service. For each pair it returns `a`, `b`, `tie`, or a number from -1 (B is better) to 1 (A is better).
"""

from __future__ import annotations

from collections.abc import Sequence


def varied(prompts: Sequence[str], responses_a: Sequence[str], responses_b: Sequence[str]) -> list[str]:
    """The answer with more different words; the prompts do not matter to this one."""
    counts = [
        (len(set(a.lower().split())), len(set(b.lower().split())))
        for a, b in zip(responses_a, responses_b, strict=True)
    ]
    return ["a" if a > b else "b" if b > a else "tie" for a, b in counts]

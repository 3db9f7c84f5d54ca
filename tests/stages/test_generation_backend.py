"""PPO whose responses come from a generator of the user's: sharded over two ranks, and with adapters."""

import json
from pathlib import Path

import pytest

from tests.stages.test_pipeline import pipeline, rows

EXAMPLE = Path(__file__).parents[2] / "examples/transformers_backend.py"
SETTINGS = [
    *("experiment=smoke", "engine.precision=fp32", "tracking.report=false", "ppo.actor=${model.path}", "data=files"),
    *("ppo.iterations=3", "ppo.max_response_tokens=8", "data.ppo.train=[rows.jsonl]", "ppo.rewards=[my.py:length]"),
]
CODE = """
def length(completions, **kwargs):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backend")
    (folder / "my.py").write_text(CODE)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"prompt {number}"}) for number in range(40)))
    return folder


def train(place, name, *overrides, ranks=1, target=f"{EXAMPLE}:Copy"):
    words = [f"output_dir={name}", f"model.path={place / 'base'}", f"ppo.generation_backend={target}"]
    return pipeline(*SETTINGS, *words, *overrides, ranks=ranks, cwd=place)


@pytest.mark.parametrize(
    ("stage", "ranks", "setting"),
    [("ppo", 2, "engine=zero3"), ("ppo_lora", 1, "ppo.lora.rank=4")],
    ids=["two ranks of ZeRO 3", "adapters"],
)
def test_it_samples_from_the_weights_of_every_update(place, stage, ranks, setting):
    far = "ppo.actor_optimizer.lr=1e-2"  # from the first weights
    done = train(place, stage, f"stage={stage}", setting, far, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    trained = [row for row in rows(place / stage / "ppo/metrics.jsonl") if "rollout/mismatch_max" in row]
    assert len(trained) == 3
    for row in trained:  # in fp32, too, the correction is on; it finds next to nothing to correct
        assert row["rollout/mismatch_mean"] == pytest.approx(1, abs=1e-3)
        assert row["rollout/mismatch_max"] == pytest.approx(1, abs=1e-2)
        assert row["rollout/mismatch_weight"] == pytest.approx(1, abs=1e-3)


def test_a_setting_that_names_no_class_is_refused_before_anything_is_loaded(place):
    done = train(place, "wrong", "stage=ppo", target="my.py:Missing")
    assert done.returncode != 0
    assert "ppo.generation_backend=my.py:Missing: no such function" in done.stdout + done.stderr
    assert not (place / "wrong/ppo/metrics.jsonl").exists()

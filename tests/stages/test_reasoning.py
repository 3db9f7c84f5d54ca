"""The run that a verifier rewards, as a user starts it, but with a tiny model, which learns nothing."""

import json

from tests.stages.test_pipeline import pipeline, rows

TINY = [
    *(
        "experiment=reasoning",
        "model=tiny",
        "stage=[sft,grpo,eval]",
        "engine.precision=fp32",
        "tracking.wandb=disabled",
    ),
    *("sft.max_steps=2", "sft.optimizer.warmup_steps=0", "sft.lora.top_layers=0", "sft.eval_rows=8"),
    *("sft.max_prompt_tokens=80", "sft.max_response_tokens=80", "ppo.iterations=1", "ppo.lora.top_layers=0"),
    *("ppo.rollout_size=16", "ppo.minibatch_size=16", "ppo.micro_batch_size=16", "ppo.rollout_micro_batch_size=16"),
    *("ppo.max_prompt_tokens=80", "ppo.max_response_tokens=12", "ppo.eval_prompts=8", "eval.prompts=8", "eval.rows=8"),
    *("eval.micro_batch_size=8", "eval.max_prompt_tokens=80", "eval.max_response_tokens=12", "eval.max_row_tokens=80"),
]


def test_a_verifier_rewards_the_policy_and_examines_it_on_problems_that_were_held_out(tmp_path):
    done = pipeline(*TINY, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    row = rows(tmp_path / "grpo/metrics.jsonl")[-1]
    assert {"reward/correct", "reward/formatted", "eval/reward/correct", "eval/reward/formatted"} <= row.keys()
    assert row["objective/raw_scores"] == row["reward/correct"]  # the format has weight 0
    asked = {sample["prompt"] for sample in rows(tmp_path / "eval/samples.jsonl")}
    assert len(asked) == 8
    assert all(prompt.startswith("State the final answer") for prompt in asked)
    measures = json.loads((tmp_path / "eval/results.json").read_text())["measures"]
    assert {"reward/correct", "reward/formatted"} <= {measure["name"] for measure in measures}

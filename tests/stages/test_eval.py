"""stage=eval on models of a few thousand weights: numbers against plain transformers, one rank against two."""

import dataclasses
import io
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.config.roles import roles_of
from rlhf.config.run_config import Embedded
from rlhf.models.embedded import prepare
from rlhf.models.export import export
from rlhf.models.scalar_head import scalar_head_model
from rlhf.runtime.dist import World
from rlhf.runtime.errors import RunError
from rlhf.text.tokenizer import load_tokenizer, template_fingerprint
from stages import eval as evaluate
from stages.eval import ModelRunner, run_eval
from stages.lifecycle.stage_record import StageRecord, write_record
from stages.setup.preflight import check_evaluation, held_out_rows
from tests.config.test_configuration import composed
from tests.models import tiny
from tests.ranks import run_on_ranks

HERE = "tests.stages.judging_functions"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two language models and a reward model with a stored scale, by name."""
    folder = tmp_path_factory.mktemp("models")
    base = prepare(Embedded.tiny, folder / "base")
    tokenizer = load_tokenizer(str(base))
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for values in other.parameters():
            values += 0.02 * torch.randn_like(values)
    other.save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    module = tiny.materialized(scalar_head_model(base))
    export(module, tiny.named_tensors(module), folder=folder / "reward", tokenizer=tokenizer)
    record = StageRecord("reward", template_fingerprint(tokenizer), pad_id=0, score_mean=0.5, score_std=2.0)
    write_record(record, folder / "reward")
    return {"model": folder / "other", "baseline": base, "reference": base, "reward": folder / "reward"}


@pytest.fixture
def small(models, tmp_path):
    """An evaluation of these models on a few rows, with more settings."""
    pairs = [{"prompt": "a", "chosen": f" b{n}", "rejected": " c" * (n + 1), "kind": f"k{n % 2}"} for n in range(5)]
    demos = [{"prompt": "a" * (n + 1), "completion": " b" * (n + 1)} for n in range(5)]
    files = {"reward": pairs, "sft": demos, "ppo": [{"prompt": f"say {n}" * (n + 1)} for n in range(5)]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*more):
        data = [f"data.{name}.eval=[{tmp_path / name}.jsonl]" for name in files]
        named = [f"eval.{name}={path}" for name, path in models.items()]
        sizes = ["eval.max_response_tokens=6", "eval.micro_batch_size=2", "eval.prompts=5", "eval.subset=kind"]
        settings = ["experiment=custom", "stage=eval", "model.path=none", f"output_dir={tmp_path / 'out'}"]
        return composed(*settings, "engine.precision=fp32", *data, *named, *sizes, *more)

    return make


def read(folder):
    results = json.loads((folder / "results.json").read_text())
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return results, samples


def value(results, name, side="model"):
    return next(row for row in results["measures"] if row["name"] == name)[side]["mean"]


def test_an_evaluation_says_everything(small, tmp_path):
    run = small("+data.gold.lexicon=data.gold:lexicon", f"eval.judges=[reward,'{HERE}:longest']")
    check_evaluation(run, [], ranks=1)
    run_eval(run, World.alone())
    results, samples = read(tmp_path / "out/eval")
    names = {row["name"] for row in results["measures"]}
    expected = {
        "normalized_score",
        "raw_score",
        "kl",
        "gold/lexicon",
        "length",
        "not_ended",
        "distinct_1",
        "distinct_2",
        "repeated",
    }
    assert names == expected | {"perplexity"}
    assert set(results["judges"]) == {"reward", f"{HERE}:longest"}
    assert results["judges"]["reward"]["judged"] == len(samples) == results["prompts"] == 5
    assert set(results["reward_model"]["subsets"]) == {"k0", "k1"}
    for row in samples:
        for side in ("model", "baseline"):
            assert row[side]["normalized_score"] == pytest.approx((row[side]["raw_score"] - 0.5) / 2, abs=1e-6)
            assert 1 <= row[side]["length"] <= 6
        assert row["baseline"]["kl"] == pytest.approx(0, abs=1e-4)  # it is the reference
    assert value(results, "raw_score") == pytest.approx(sum(row["model"]["raw_score"] for row in samples) / 5)
    wins = [row["model"]["raw_score"] > row["baseline"]["raw_score"] for row in samples]
    assert results["judges"]["reward"]["wins"] == sum(wins)
    assert not list((tmp_path / "out/eval").glob("*.tmp"))


@torch.no_grad()
def test_log_probabilities_and_scores_are_those_of_plain_transformers(small, models):
    run = small("eval.sampling.temperature=0.7")
    tokenizer = load_tokenizer(str(models["model"]))
    rows = held_out_rows(run, tokenizer=tokenizer)
    runner = ModelRunner(run, World.alone(), tokenizer=tokenizer, rows=rows)
    roles = {role.name: role for role in roles_of(run, "eval")}
    runner.generate(roles["model"])
    runner.measure_kl(roles["reference"])
    scores = runner.score(roles["reward"])
    found, responses = runner.answers["model"], runner.answers["model"].responses
    plain = {name: AutoModelForCausalLM.from_pretrained(models[name]).eval() for name in ("model", "reference")}
    reward = AutoModelForSequenceClassification.from_pretrained(models["reward"]).eval()
    for row in range(len(responses)):
        ids = responses.sequences[row][responses.attention_mask[row]][None]
        size = int(responses.response_mask[row].sum())
        totals = {}
        for name, model in plain.items():
            logprobs = (model(ids).logits[0, -size - 1 : -1] / 0.7).log_softmax(-1)
            totals[name] = logprobs.gather(-1, ids[0, -size:, None]).sum()
        assert float(found.numbers["kl"][row]) == pytest.approx(float(totals["model"] - totals["reference"]), abs=1e-3)
        assert float(found.numbers["raw_score"][row]) == pytest.approx(float(reward(ids).logits), abs=1e-4)
    assert found.numbers["kl"].abs().max() > 0.01
    by_subset = sorted(zip(scores.subsets, scores.chosen, scores.rejected, strict=True))
    direct = sorted(
        (pair.subset, *(float(reward(torch.tensor(ids)[None].long()).logits) for ids in (pair.chosen, pair.rejected)))
        for pair in rows.pairs
    )
    for ours, theirs in zip(by_subset, direct, strict=True):
        assert ours[0] == theirs[0]
        assert ours[1:] == pytest.approx(theirs[1:], abs=1e-4)
    (nats, tokens), *_ = sorted(found.losses.tolist(), key=lambda pair: pair[1])
    demo = min(rows.demonstrations, key=lambda demo: demo.target_mask.sum())
    ids = torch.tensor(demo.input_ids)[None].long()
    labels = ids.where(torch.tensor(demo.target_mask)[None], -100)
    assert nats / tokens == pytest.approx(float(plain["model"](ids, labels=labels).loss), abs=1e-4)


def on_ranks(run):
    from rlhf.runtime import dist

    run_eval(run, dist.start("cpu"))


def test_two_ranks_and_sharded_models_say_the_same(small, tmp_path):
    judges = f"eval.judges=[reward,'{HERE}:always_first']"
    run_eval(small(judges, "eval.name=one"), World.alone())
    run_on_ranks(on_ranks, 2, small(judges, "eval.name=two", "engine=zero3"))
    (one, said), (two, also) = read(tmp_path / "out/eval/one"), read(tmp_path / "out/eval/two")
    assert [[row[s]["response"] for s in ("model", "baseline")] for row in said] == [
        [row[s]["response"] for s in ("model", "baseline")] for row in also
    ]
    for ours, theirs in zip(one["measures"], two["measures"], strict=True):
        assert ours["name"] == theirs["name"]
        for key in ("mean", "low", "high"):
            if key in ours["model"]:
                assert ours["model"][key] == pytest.approx(theirs["model"][key], abs=1e-3, rel=1e-3)
    assert one["judges"] == two["judges"]
    for name, part in one["reward_model"]["subsets"].items():
        for key in ("accuracy", "margin"):
            assert part[key] == pytest.approx(two["reward_model"]["subsets"][name][key], abs=1e-4)


def test_the_same_model_twice_is_no_better_than_itself(small, models, tmp_path):
    run_eval(small(f"eval.baseline={models['model']}", "eval.reference=null"), World.alone())
    results, samples = read(tmp_path / "out/eval")
    assert all(row["model"] == row["baseline"] for row in samples)
    assert results["judges"]["reward"]["ties"] == 5
    assert results["judges"]["reward"]["win_rate"]["mean"] == 0.5
    assert "kl" not in {row["name"] for row in results["measures"]}


def test_one_model_without_judges_or_reward_model_replaces_what_was_there(small, tmp_path):
    run_eval(small(), World.alone())
    run_eval(small("eval.baseline=null", "eval.reward=null", "eval.reference=null", "eval.judges=[]"), World.alone())
    results, samples = read(tmp_path / "out/eval")
    assert (results["judges"], results["reward_model"], results["baseline"]) == ({}, None, None)
    assert all("baseline" not in row for row in samples)
    assert math.isfinite(value(results, "perplexity"))


def test_a_person_judges_what_is_left(small, tmp_path, monkeypatch, capsys):
    run = small("eval.judges=[human]", "eval.reward=null", "eval.sampling.temperature=1.5")
    for typed, judged in (("a\nb\nq\n", 2), ("t\n", 3)):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        run_eval(run, World.alone())
        results, samples = read(tmp_path / "out/eval")
        assert results["judges"]["human"]["judged"] == judged
        assert sum(row["preferences"]["human"] is not None for row in samples) == judged
    assert "3 pairs to judge" in capsys.readouterr().out
    assert len((tmp_path / "out/eval/judgements.jsonl").read_text().splitlines()) == 3


def test_a_bad_judge_ends_the_run_with_a_sentence_and_leaves_the_old_results(small, tmp_path):
    run_eval(small(), World.alone())
    before = read(tmp_path / "out/eval")
    with pytest.raises(RunError, match=r"too_few returned 9 answers to 10 pairs"):
        run_eval(small(f"eval.judges=['{HERE}:too_few']"), World.alone())
    assert read(tmp_path / "out/eval") == before


def test_a_gold_metric_that_forgets_a_response_is_named(small, monkeypatch):
    monkeypatch.setattr(evaluate, "load_gold", lambda _: {"short": lambda prompts, responses: [1.0]})
    with pytest.raises(RunError, match=r"data\.gold\.short gave 1 numbers for 5 responses"):
        run_eval(small(), World.alone())


def test_only_held_out_rows_are_read(small):
    run = small("eval.rows=3", "eval.max_row_tokens=6", "eval.prompts=2")
    tokenizer = load_tokenizer(run.eval.model)
    rows = held_out_rows(run, tokenizer=tokenizer)
    assert [row.text for row in rows.prompts] == ["say 0", "say 1say 1"]
    assert len(rows.pairs) == 2  # the third and longer ones are left out, whatever is asked for
    assert [pair.subset for pair in rows.pairs] == ["k0", "k1"]
    assert len(rows.demonstrations) == 2
    run.data.reward = dataclasses.replace(run.data.reward, eval=[])
    assert held_out_rows(run, tokenizer=tokenizer).pairs == []

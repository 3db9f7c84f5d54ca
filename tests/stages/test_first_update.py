"""PPO on a real, tiny, random model: the first update starts from ratio 1, and whatever follows is measured."""

import math
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from rlhf.algorithms.ppo import token_rewards
from rlhf.config.bounds import MicroBatchLimit
from rlhf.config.engine_config import EngineConfig, Precision
from rlhf.config.objective_config import AdvantageKind, AdvantageScale, KLConfig, ScoreConfig
from rlhf.config.roles import roles_of
from rlhf.config.run_config import Embedded
from rlhf.config.stage_configs import LoraConfig
from rlhf.engine.engine import build_engine
from rlhf.evaluation.metrics import policy_metrics, rollout_metrics, sample_rows
from rlhf.forward_passes import critic_values
from rlhf.models.causal_lm import causal_lm
from rlhf.models.embedded import prepare
from rlhf.models.scalar_head import scalar_head_model
from rlhf.reward_calls import RewardFunctions
from rlhf.rewards import RewardScorer, ScoredSource, ScoreScale, ScoreShaping, reward_model_scores
from rlhf.rollout import Collector, Models, without_bad_rows
from rlhf.runtime.dist import World
from rlhf.text.tokenizer import decode, load_tokenizer
from rlhf.tracking.timing import Stopwatch
from rlhf.training.ppo_update import advantages_of, training_batch, update_policy
from rlhf.types import Experience, PromptBatch, Responses
from stages.lifecycle.stage_models import open_model
from stages.lifecycle.stage_record import StageRecord, write_record
from stages.ppo import load_models
from tests.config.test_configuration import composed
from tests.training.test_ppo_update import config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    prepare(Embedded.tiny, path)
    return path


def settings(**changes):
    engine = EngineConfig(zero_stage=0, precision=Precision.fp32)
    return config(engine=engine, max_response_tokens=6, **changes)


def four_models(folder, ppo):
    build = partial(build_engine, config=ppo.engine, world=World.alone())
    optimizer = {"optimizer": ppo.actor_optimizer, "total_steps": 8}
    return Models(
        actor=build(causal_lm(folder, lora=ppo.lora), **optimizer),
        rewards={"model": build(scalar_head_model(folder, seed=3))},
        reference=None if ppo.lora.rank else build(causal_lm(folder)),
        critic=build(scalar_head_model(folder, seed=3, lora=ppo.lora), **optimizer),
    )


def rollout_of(folder, models, ppo, ids=None):
    tokenizer = load_tokenizer(str(folder))
    collector = Collector(
        models=models,
        config=ppo,
        decode=partial(decode, tokenizer),
        pad_id=int(tokenizer.pad_token_id),
        stop_token_ids=(int(tokenizer.eos_token_id), 7, 8, 9, 10, 11, 12, 13),  # so that lengths differ
        scorer=RewardScorer(["model"], models.rewards, RewardFunctions.load(ppo, stage="ppo"), ppo.micro_batch_limit),
        shaping=ScoreShaping(ppo.score, [ScoredSource("model")], ppo.max_response_tokens),
        timer=Stopwatch(torch.device("cpu")),
    )
    ids = torch.randint(20, 60, (8, 5)) if ids is None else ids
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::2, :2] = False
    prompts = PromptBatch(ids, mask, sample_ids=torch.arange(8), prompts=("x",) * 8, columns=({},) * 8)
    return collector.collect(prompts, seed=0, step=0)


def estimator(kind):
    """Settings of an advantage estimator; those of groups are not whitened."""
    scale = AdvantageScale.whiten if kind == "gae" else AdvantageScale.none
    return {"advantage": AdvantageKind(kind), "scale_advantages": scale}


@pytest.mark.parametrize(
    ("source", "share"),
    [
        ({"clamp": 2.0, "scale": ScoreScale(mean=1.0, std=0.5)}, 0.5),  # (raw - 1) / 0.5 is -2, 0, 1 and 4
        ({"clamp": 0.0, "scale": ScoreScale(mean=1.0, std=0.5)}, 0.0),
        ({"clamp": 2.0}, 0.25),
    ],
)
def test_the_share_of_scores_at_the_clamp(source, share):
    shaping = ScoreShaping(ScoreConfig(), [ScoredSource("model", **source)], limit=8)
    assert shaping.clamped_share(torch.tensor([0.0, 1.0, 1.5, 3.0])[:, None]) == share


@pytest.mark.parametrize("rank", [0, 4])
def test_the_first_minibatch_has_ratio_1_and_clips_nothing(folder, rank):
    ppo = settings(epochs=1, minibatch_size=8, lora=LoraConfig(rank=rank))
    models = four_models(folder, ppo)
    rollout = rollout_of(folder, models, ppo)
    assert len(set(rollout.lengths.tolist())) > 1
    rewards = token_rewards(rollout.scores, rollout.kl, rollout.response_mask, kl_coef=0.1)
    estimate = advantages_of(rollout, rewards, config=ppo)
    batch = Experience.from_rollout(rollout, advantages=estimate.advantages, returns=estimate.returns)
    measured = update_policy(models, batch, config=ppo, iteration=1)
    assert measured["actor/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert measured["actor/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert measured["actor/approxkl_avg"] == pytest.approx(0, abs=1e-8)
    assert measured["actor/clipfrac_avg"] == 0
    assert measured["critic/clipfrac_avg"] == 0
    # With ratio 1 the loss is minus the mean advantage, which whitening made 0; the values have not moved either.
    assert measured["actor/loss"] == pytest.approx(0, abs=1e-5)
    squares = ((rollout.values - estimate.returns) ** 2)[rollout.response_mask]
    assert measured["critic/loss"] == pytest.approx(0.5 * float(squares.mean()), rel=1e-4)
    assert measured["actor/grad_norm"] > 0

    again = update_policy(models, batch, config=ppo, iteration=2)
    assert again["actor/ratio_max"] > 1.001
    assert again["actor/approxkl_avg"] > 1e-8


def test_before_training_kl_is_0_and_both_paths_agree(folder):
    for rank in (0, 4):
        ppo = settings(lora=LoraConfig(rank=rank))
        rollout = rollout_of(folder, four_models(folder, ppo), ppo)
        mask = rollout.response_mask
        torch.testing.assert_close(rollout.kl, torch.zeros_like(rollout.kl), rtol=0, atol=1e-6)
        torch.testing.assert_close(rollout.generation_logprobs, rollout.logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(rollout.values[:, 0].isfinite(), torch.ones(8, dtype=torch.bool))
        for values in (rollout.logprobs, rollout.values, rollout.kl, rollout.entropy):
            assert values[~mask].abs().max() == 0


VARIANTS = ("ppo", "grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo", "reinforce_pp")


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_do_not_change_an_update(folder, variant):
    published = composed("experiment=smoke", f"stage={variant}").ppo
    names = ("advantage", "scale_advantages", "policy_loss", "ratio_level", "loss_aggregation", "clip_range_high", "kl")
    chosen = {name: getattr(published, name) for name in names}

    def after(**sizes):
        ppo = settings(epochs=2, minibatch_size=8, samples_per_prompt=4, **sizes, **chosen)
        models = four_models(folder, ppo)
        torch.manual_seed(1)
        rollout = rollout_of(folder, models, ppo)
        rewards = token_rewards(rollout.scores, rollout.kl, rollout.response_mask, kl_coef=0.1)
        estimate = advantages_of(rollout, rewards, config=ppo)
        batch = training_batch(rollout, estimate, config=ppo, dtype=torch.bfloat16)
        models = models if ppo.has_critic else replace(models, critic=None)
        metrics = update_policy(models, batch, config=ppo, iteration=1, kl_coef=0.1)
        return metrics, dict(models.actor.full_tensors())

    whole = after(micro_batch_size=8)
    for cut in (after(micro_batch_size=2), after(micro_batch_size=8, micro_batch_tokens=40)):
        assert cut[0] == pytest.approx(whole[0], rel=1e-3, abs=1e-5)
        for name, value in whole[1].items():
            torch.testing.assert_close(cut[1][name], value, rtol=1e-4, atol=2e-5)


def test_generated_tokens_are_those_that_are_scored(folder):
    ppo = settings()
    models = four_models(folder, ppo)
    rollout = rollout_of(folder, models, ppo)
    own = rollout.held.own
    stops = torch.isin(own.sequences[:, -rollout.response_mask.shape[1] :], torch.tensor([7, 8, 9, 10, 11, 12, 13]))
    assert torch.equal((stops & rollout.response_mask).any(-1) | ~rollout.ended, torch.ones(8, dtype=torch.bool))
    assert torch.equal(own.attention_mask[:, -rollout.response_mask.shape[1] :], rollout.response_mask)


@pytest.mark.parametrize("kind", ["gae", "rloo"])
def test_a_response_that_breaks_a_model_reaches_neither_gradients_nor_metrics(folder, kind):
    ppo = settings(epochs=1, minibatch_size=8, samples_per_prompt=2, **estimator(kind))
    models = four_models(folder, ppo)
    broken = 61  # a token at which actor and critic say NaN, and of which their gradients would be NaN, too
    for engine in (models.actor, models.critic):
        engine.module.model.embed_tokens.register_forward_hook(
            lambda _, tokens, vectors: vectors.masked_fill((tokens[0] == broken)[..., None], float("nan"))
        )
    ids = torch.randint(20, 60, (8, 5), generator=torch.Generator().manual_seed(0))
    ids[3, 4] = broken
    collected = rollout_of(folder, models, ppo, ids)
    assert collected.values[3].isnan().any()
    rollout = without_bad_rows(collected)
    assert not (rollout.held.own.sequences[rollout.held.places] == broken).any()
    assert len(rollout) < 8
    rewards = token_rewards(rollout.scores, rollout.kl, rollout.response_mask, kl_coef=0.1)
    estimate = advantages_of(rollout, rewards, config=ppo)
    batch = Experience.from_rollout(rollout, advantages=estimate.advantages, returns=estimate.returns)
    measured = update_policy(models, batch, config=ppo, iteration=1)
    measured |= rollout_metrics(rollout, kl_coef=0.1, kl_kind="k1")
    assert all(map(math.isfinite, measured.values())), measured
    assert measured["actor/skipped_steps"] == measured["critic/skipped_steps"] == 0
    assert measured["actor/grad_norm"] > 0


def test_equal_responses_have_equal_scores_whatever_pieces_they_are_judged_in():
    class Rounding:
        """Scores that depend on the shape of the piece, as those of a 16-bit kernel do."""

        @contextmanager
        def evaluating(self):
            yield lambda tokens, mask, **_: tokens.float() + 1e-3 * tokens.shape[0] + 1e-4 * tokens.shape[1]

    mask = torch.tensor([[False, True, True, True], [True] * 4, [False, True, True, True], [False, True, True, True]])
    tokens = torch.tensor([[0, 5, 6, 7], [4, 5, 6, 7], [9, 5, 6, 7], [0, 5, 6, 8]])  # rows 0 and 2 differ in padding
    scores = reward_model_scores(Rounding(), Responses(tokens, mask, mask[:, -2:]), limit=MicroBatchLimit(3))
    assert scores[0] == scores[2]
    assert scores[3] != scores[0]
    assert scores.round().tolist() == [7, 7, 7, 8]


@pytest.mark.parametrize("kind", ["gae", "grpo"])
def test_a_kl_that_costs_nothing_needs_no_reference(folder, kind):
    ppo = settings(epochs=1, minibatch_size=8, samples_per_prompt=2, kl=KLConfig(coef=0.0), **estimator(kind))
    assert ppo.reference_model is None
    assert not ppo.measures_kl
    models = replace(four_models(folder, ppo), reference=None)
    rollout = rollout_of(folder, models, ppo)
    assert rollout.reference_logprobs is None
    assert not rollout.kl.any()
    rewards = token_rewards(rollout.scores, rollout.kl, rollout.response_mask, kl_coef=0.0)
    estimate = advantages_of(rollout, rewards, config=ppo)
    batch = Experience.from_rollout(rollout, advantages=estimate.advantages, returns=estimate.returns)
    assert update_policy(models, batch, config=ppo, iteration=1)["actor/grad_norm"] > 0
    assert not [name for name in rollout_metrics(rollout, kl_coef=0.0, kl_kind="k1") if name.startswith("objective/kl")]
    rows = sample_rows(rollout, {})
    assert "kl" not in rows[0]
    assert "eval/kl" not in policy_metrics(rows)
    assert settings(kl=KLConfig(coef=0.0), reference="there").reference_model == "there"
    assert settings(kl=KLConfig(coef=0.0), lora=LoraConfig(rank=4)).measures_kl  # the base model is at hand


@pytest.mark.parametrize("normalize", [True, False])
def test_a_critic_that_is_named_starts_in_the_units_of_the_scores(folder, tmp_path, normalize):
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(tmp_path / "critic")
    write_record(StageRecord("reward", "template", 0, score_mean=3.0, score_std=2.0), tmp_path / "critic")
    paths = {"actor": str(folder), "reward": str(folder), "rewards": [str(folder)], "critic": str(tmp_path / "critic")}
    ppo = settings(**paths, score=ScoreConfig(normalize=normalize))
    ppo = replace(ppo, critic_engine=ppo.engine, reference_engine=ppo.engine, reward_engine=ppo.engine)
    ours, theirs = ScoreScale(mean=-7.0, std=5.0), ScoreScale(mean=3.0, std=2.0)
    sources = [ScoredSource("model", scale=ours if normalize else None)]
    run = replace(composed("experiment=smoke", "stage=[sft,reward,ppo]"), ppo=ppo)
    with closing(load_models(run, World.alone(), sources=sources)) as models:
        raw = build_engine(scalar_head_model(tmp_path / "critic", seed=0), config=ppo.engine, world=World.alone())
        tokens = torch.randint(20, 60, (2, 9))
        responses = Responses(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool))
        with torch.no_grad():
            value = critic_values(models.critic, responses, shift=models.value_shift)
            said = critic_values(raw, responses, shift=0.0)
    torch.testing.assert_close(value, (said - theirs.mean) / theirs.std if normalize else said)


def test_an_evaluation_keeps_every_answer_and_leaves_broken_numbers_out_of_its_means(caplog):
    row = {"prompt": "p", "response": "a b", "score": 1.0, "raw_score": 2.0, "kl": 0.5, "length": 2, "ended": True}
    found = policy_metrics([row, {**row, "score": 3.0, "length": 4}, {**row, "score": math.nan, "length": 99}])
    assert (found["eval/score"], found["eval/kl"], found["eval/response_length"]) == (2.0, 0.5, 3.0)
    assert "left out 1 of 3 responses" in caplog.text
    assert math.isnan(policy_metrics([{**row, "kl": math.inf}])["eval/score"])


def test_a_kl_beyond_the_target_ends_the_updates_in_the_middle_of_an_epoch(folder):
    ppo = settings(epochs=2, minibatch_size=2, target_kl=1e-9)
    models = four_models(folder, ppo)
    rollout = rollout_of(folder, models, ppo)
    rewards = token_rewards(rollout.scores, rollout.kl, rollout.response_mask, kl_coef=0.1)
    batch = training_batch(rollout, advantages_of(rollout, rewards, config=ppo), config=ppo, dtype=torch.float32)
    # The first minibatch has ratio 1; the second sees what its update changed, and is the last of four.
    assert update_policy(models, batch, config=ppo, iteration=1)["actor/epochs"] == 0.5


def test_a_policy_whose_folder_drops_everywhere_starts_from_ratio_1_exactly(tmp_path, monkeypatch):
    def measured():
        ppo = settings(epochs=1, minibatch_size=8, micro_batch_size=8, rollout_micro_batch_size=8)
        models = four_models(gpt2, ppo)
        rollout = rollout_of(folder, models, ppo)
        rewards = token_rewards(rollout.scores, rollout.kl, rollout.response_mask, kl_coef=0.1)
        batch = training_batch(rollout, advantages_of(rollout, rewards, config=ppo), config=ppo, dtype=torch.float32)
        return update_policy(models, batch, config=ppo, iteration=1)

    folder, gpt2 = tmp_path / "tokenizer", tmp_path / "gpt2"
    prepare(Embedded.tiny, folder)
    drops = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, **drops)
    GPT2LMHeadModel(config).save_pretrained(gpt2)
    found = measured()
    assert found["actor/ratio_max"] == found["actor/ratio_mean"] == 1
    assert found["critic/clipfrac_avg"] == 0
    monkeypatch.setattr("rlhf.models.causal_lm.with_dropout", lambda config, probability: config)
    monkeypatch.setattr("rlhf.models.model_spec.set_dropout", lambda module, probability: {})
    assert measured()["actor/ratio_max"] > 1.001  # what the old log-probabilities, of the model without, would meet


def test_each_role_says_what_dropout_its_folder_has(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    paths = [f"ppo.{role}={tmp_path}" for role in ("actor", "reference", "critic")]
    run = composed("experiment=smoke", "stage=ppo", *paths, f"ppo.reward={tmp_path}", "ppo.score.normalize=false")
    for role in roles_of(run, "ppo"):
        open_model(run, role, world=World.alone(), total_steps=4).close()
    for role in ("actor", "reference", "critic", "reward"):
        said = f"ppo.{role}={tmp_path}: dropout is 0 in this stage, in place of resid_pdrop=0.1, embd_pdrop=0.1"
        assert said in caplog.text
    caplog.clear()
    open_model(run, replace(roles_of(run, "ppo")[0], path=str(folder)), world=World.alone(), total_steps=4).close()
    assert "dropout" not in caplog.text

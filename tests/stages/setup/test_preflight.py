"""What is wrong with a run is said before a model is loaded, with what to do about it."""

import json
import logging
import shutil

import pytest
from transformers import BertConfig, LlamaConfig, LlamaForSequenceClassification

from rlhf.config.run_config import Embedded
from rlhf.models.embedded import prepare
from rlhf.models.export import export
from rlhf.models.scalar_head import scalar_head_model
from rlhf.runtime.launch import local_ranks
from rlhf.text.tokenizer import load_tokenizer, template_fingerprint
from stages.lifecycle.stage_record import (
    StageRecord,
    check_folder,
    claim_folder,
    lock_folder,
    write_record,
)
from stages.setup.preflight import batch_arithmetic, check_texts, preflight
from tests.config.test_configuration import composed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return prepare(Embedded.tiny, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def custom(model, tmp_path):
    """A run of one stage on rows of its own, ready for `preflight`."""

    def make(stage, rows, *overrides, name="rows.jsonl"):
        file = tmp_path / name
        file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        settings = ["experiment=custom", f"model.path={model}", f"stage={stage}", f"output_dir={tmp_path / 'out'}"]
        return composed(*settings, f"data.{stage}.train=[{file}]", *overrides)

    return make


PAIR = {"prompt": "a", "chosen": " b", "rejected": " c"}
TWENTY = [{"prompt": "a", "completion": "b"}] * 20
START = "reward.init_from=${model.path}"


@pytest.mark.parametrize(
    ("stage", "rows", "overrides", "sentence"),
    [
        ("sft", [{"question": "a"}], [], r"found columns \['question'\]; expected messages, or prompt and completion"),
        ("sft", [{"prompt": "a", "completion": ""}], [], r"1 of 1 rows cannot be used.*\n.*`completion`"),
        ("reward", [PAIR, PAIR | {"rejected": " b"}], [START], r"row 1: `chosen` and `rejected` are identical"),
        ("reward", [PAIR | {"chosen": "a" * 99}], [START, "reward.max_response_tokens=9"], r"all rows were dropped"),
        ("sft", [{"prompt": "a" * 99, "completion": "b"}], ["sft.max_prompt_tokens=9"], r"sft\.max_prompt_tokens=9"),
        ("sft", '{"prompt": "a", "completion": "b"}\n{"prompt": oops}\n', [], r"line 2"),
        (
            "sft",
            [{"prompt": "a", "completion": "b"}] * 40,
            ["sft.max_steps=3", "sft.optimizer.warmup_steps=20"],
            r"warmup_steps=20\.0",
        ),
        ("sft", [{"prompt": "a", "completion": "b"}], ["sft.micro_batch_size=7"], r"64 is not a multiple of 7"),
        ("sft", [{"prompt": "a", "completion": "b"}], ["+data.gold.x=nothing"], r"data\.gold\.x='nothing'"),
    ],
)
def test_bad_data_is_named(custom, stage, rows, overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        preflight(custom(stage, rows, *overrides), ranks=1)


def test_a_file_that_is_not_there_is_named(custom):
    run = custom("sft", [], "data.sft.train=[nowhere.jsonl]")
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file or folder"):
        preflight(run, ranks=1)


def test_conversations_need_a_template(custom, tmp_path, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    bare = tmp_path / "bare"
    tokenizer.save_pretrained(bare)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(model / name, bare / name)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=r"model\.chat_template"):
        preflight(custom("sft", [{"messages": talk}], f"model.path={bare}"), ranks=1)


def test_an_encoder_is_refused(custom, tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="not a decoder"):
        preflight(custom("sft", [{"prompt": "a", "completion": "b"}], f"model.path={tmp_path / 'bert'}"), ranks=1)


def test_a_model_that_an_earlier_stage_makes_is_named(custom):
    with pytest.raises(ValueError, match=r"reward\.init_from=.*stage=\[sft,reward\]"):
        preflight(custom("reward", [PAIR]), ranks=1)


def test_a_folder_of_other_settings_is_refused_and_memory_settings_may_change(custom, tmp_path):
    rows = [{"prompt": "a", "completion": " b"}] * 80
    run = custom("sft", rows, "sft.max_steps=30")
    claim_folder(run, "sft")
    (tmp_path / "out/sft/metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    smaller = custom("sft", rows, "sft.max_steps=30", "sft.micro_batch_size=2", "engine=zero3")
    assert preflight(smaller, ranks=2) == ["sft"]
    with pytest.raises(ValueError, match=r"sft\.max_steps: there 30, now 31.*output_dir="):
        preflight(custom("sft", rows, "sft.max_steps=31"), ranks=1)


def test_a_finished_stage_is_not_done_again(custom, tmp_path):
    run = custom("sft", [{"prompt": "a", "completion": " b"}] * 80, "sft.max_steps=30")
    claim_folder(run, "sft")
    write_record(StageRecord(stage="sft", template="t", pad_id=0), tmp_path / "out/sft")
    (tmp_path / "out/sft/checkpoints/step-000025").mkdir(parents=True)  # it was killed before these were removed
    assert preflight(run, ranks=1) == []
    assert not (tmp_path / "out/sft/checkpoints").exists()


def test_no_stage_at_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is selected"):
        preflight(composed("stage=[]", f"output_dir={tmp_path}"), ranks=1)


def test_the_arithmetic_of_ppo_is_printed_whole():
    text = batch_arithmetic(composed("experiment=smoke"), "ppo", ranks=2)
    assert text == (
        "ppo: minibatch_size 8 = 2 ranks x 4 sequences x 1 accumulation; "
        "rollout_size 16 = 2 ranks x 8 prompts x 1 samples; 4 steps per iteration = 2 minibatches x 2 epochs"
    )
    sizes = ["ppo.minibatch_size=16", "ppo.micro_batch_size=1", "ppo.rollout_size=16", "ppo.samples_per_prompt=4"]
    with pytest.raises(ValueError, match=r"ppo\.rollout_size by ranks x samples_per_prompt"):
        batch_arithmetic(composed("experiment=smoke", *sizes), "ppo", ranks=8)


def test_a_llama_configuration_is_a_decoder(custom, tmp_path, model):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="holds no weights"):
        preflight(custom("sft", [{"prompt": "a", "completion": "b"}], f"model.path={tmp_path / 'llama'}"), ranks=1)


def test_a_language_model_is_no_reward_model(custom, model):
    overrides = [f"ppo.actor={model}", f"ppo.reward={model}"]
    with pytest.raises(ValueError, match="a language model without a scalar head; expected a reward model"):
        preflight(custom("ppo", [{"prompt": "a"}] * 20, *overrides), ranks=1)


def test_a_reward_model_of_another_vocabulary_is_refused(custom, model, tmp_path):
    from tests import fakes
    from tests.models import tiny

    reward = tmp_path / "reward"
    module = tiny.materialized(scalar_head_model(model))
    export(module, tiny.named_tensors(module), folder=reward, tokenizer=load_tokenizer(str(model)))
    overrides = [f"ppo.actor={model}", f"ppo.reward={reward}"]
    with pytest.raises(ValueError, match=r"no stage\.json with score_mean"):
        preflight(custom("ppo", [{"prompt": "a"}] * 20, *overrides), ranks=1)
    assert preflight(custom("ppo", [{"prompt": "a"}] * 20, *overrides, "ppo.score.normalize=false"), ranks=1) == ["ppo"]
    template = template_fingerprint(load_tokenizer(str(model)))
    write_record(StageRecord("reward", template, pad_id=0, score_mean=1.0, score_std=0.0), reward)
    with pytest.raises(ValueError, match="scores all held-out responses alike"):
        preflight(custom("ppo", [{"prompt": "a"}] * 20, *overrides), ranks=1)
    shutil.rmtree(reward)
    config = LlamaConfig(vocab_size=400, hidden_size=8, num_attention_heads=2, num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(reward)
    fakes.chat_tokenizer(reward)
    with pytest.raises(ValueError, match="has another vocabulary than ppo.actor"):
        preflight(custom("ppo", [{"prompt": "a"}] * 20, *overrides, "ppo.score.normalize=false"), ranks=1)


def test_lengths_beyond_the_positions_of_the_model_are_refused(custom):
    with pytest.raises(ValueError, match=r"sft\.max_prompt_tokens \+ sft\.max_response_tokens = 512 \+ 99999"):
        preflight(custom("sft", [{"prompt": "a", "completion": "b"}], "sft.max_response_tokens=99999"), ranks=1)


def test_a_stage_without_held_out_rows_is_refused(custom):
    run = custom("sft", [{"prompt": "a", "completion": " b"}] * 80, "sft.max_steps=30", "data.sft.eval_fraction=0")
    with pytest.raises(ValueError, match=r"data\.sft\.eval is empty"):
        preflight(run, ranks=1)


def test_a_finished_stage_is_not_kept_when_what_it_was_made_from_changes(tmp_path):
    run = composed("experiment=smoke", f"output_dir={tmp_path}")
    claim_folder(run, "ppo")
    write_record(StageRecord(stage="ppo", template="t", pad_id=0), tmp_path / "ppo")
    with pytest.raises(ValueError, match=r"ppo is finished, but it was made from the reward/sft model"):
        preflight(run, ranks=1)


def test_a_stage_is_named_after_its_advantages_in_hints_and_folders(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="stages.setup.preflight")
    alone = composed("experiment=smoke", "stage=grpo", f"output_dir={tmp_path}")
    with pytest.raises(ValueError, match=r"ppo\.actor=.*as in 'stage=\[sft,reward,grpo\]'"):
        preflight(alone, ranks=1)
    assert "grpo: minibatch_size" in caplog.text
    claim_folder(alone, "ppo")
    write_record(StageRecord(stage="grpo", template="t", pad_id=0), tmp_path / "grpo")
    assert preflight(alone, ranks=1) == []
    assert f"grpo is finished ({tmp_path}/grpo), skipping it" in caplog.text
    assert not (tmp_path / "ppo").exists()
    other = composed("experiment=smoke", "stage=grpo", "ppo.gamma=0.5", "name=first", f"output_dir={tmp_path}")
    with pytest.raises(ValueError, match=r"grpo holds a run of other settings .*ppo\.gamma.*another name=first-2 or"):
        preflight(other, ranks=1)


def test_one_stage_cannot_be_on_another_device(custom):
    run = custom("sft", [{"prompt": "a", "completion": " b"}] * 80, "sft.max_steps=30", "sft.engine.device=cpu")
    with pytest.raises(ValueError, match=r"sft\.engine\.device=cpu differs from engine\.device=auto"):
        preflight(run, ranks=1)


def test_two_runs_never_share_a_folder(tmp_path):
    run = composed("experiment=smoke", f"output_dir={tmp_path}")
    lock = lock_folder(run)
    with pytest.raises(ValueError, match="another run is using it"):
        lock_folder(run)
    lock.close()
    lock_folder(run).close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*cannot be written"):
        lock_folder(composed("experiment=smoke", f"output_dir={tmp_path / 'file'}"))


def test_the_cores_of_a_machine_are_shared_by_its_own_ranks_only(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_ranks(16) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert local_ranks(16) == 8


def test_a_run_may_be_moved(tmp_path):
    run = composed("experiment=smoke", f"output_dir={tmp_path / 'here'}")
    claim_folder(run, "ppo")
    write_record(StageRecord(stage="ppo", template="t", pad_id=0), tmp_path / "here/ppo")
    (tmp_path / "here").rename(tmp_path / "there")
    check_folder(composed("experiment=smoke", f"output_dir={tmp_path / 'there'}"), "ppo")


def test_a_stage_remembers_what_it_was_made_from(tmp_path):
    run = composed("experiment=smoke", f"output_dir={tmp_path}")
    for stage in ("sft", "reward"):
        claim_folder(run, stage)
        write_record(StageRecord(stage=stage, template="t", pad_id=0), tmp_path / stage)
    check_folder(run, "reward")
    claim_folder(composed("experiment=smoke", f"output_dir={tmp_path}", "sft.max_steps=3"), "sft")
    with pytest.raises(ValueError, match="reward is made from sft: there '[0-9a-f]{12}', now '[0-9a-f]{12}'"):
        check_folder(run, "reward")


def test_a_disk_that_cannot_be_written_is_named_for_every_role(custom, tmp_path):
    (tmp_path / "file").write_text("in the way")
    rows = [{"prompt": "a", "completion": " b"}] * 80
    with pytest.raises(ValueError, match=r"engine\.nvme_path=.*file/disk: cannot make files there"):
        preflight(custom("sft", rows, "engine=zero3_nvme", f"engine.nvme_path={tmp_path}/file/disk"), ranks=1)


def test_texts_beside_ppo_are_counted_in_batches_and_said_to_be_unread_without_a_coefficient(caplog):
    caplog.set_level(logging.INFO)
    text = ["ppo.ptx.coef=0.5", "data.ptx.train=[texts.jsonl]", "ppo.ptx.batch_size=32", "ppo.micro_batch_size=4"]
    line = batch_arithmetic(composed(*text), "ppo", ranks=2)
    assert line.endswith("; ptx.batch_size 32 = 2 ranks x 4 sequences x 4 accumulation")
    with pytest.raises(ValueError, match=r"ppo.ptx.batch_size by ranks x micro_batch_size \(3 x 4\): 32"):
        batch_arithmetic(composed(*text, "ppo.minibatch_size=48", "ppo.rollout_size=96"), "ppo", ranks=3)
    assert check_texts(composed("data.ptx.train=[texts.jsonl]"), tokenizer=None) == ""
    assert "data.ptx.train is not read: ppo.ptx.coef=0" in caplog.text

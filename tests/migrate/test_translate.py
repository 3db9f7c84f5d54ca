"""Commands of DeepSpeed-Chat and TRL become settings that compose, with numbers worked out by hand."""

import pytest
import yaml

from rlhf.migrate.__main__ import command_of, described, main, translations
from rlhf.migrate.flags import Fate, peer
from rlhf.migrate.translate import translate as translate_given
from rlhf.migrate.translation import scalar
from stages.setup.command_line import check_overrides

CHAT, TRL = peer("deepspeed-chat"), peer("trl")
STEP1 = "deepspeed --num_gpus 1 main.py --model_name_or_path facebook/opt-125m --deepspeed"
STEP3 = (
    "deepspeed --num_gpus 4 main.py --actor_model_name_or_path A --critic_model_name_or_path C --actor_zero_stage 3 "
    "--critic_zero_stage 2 --offload --per_device_generation_batch_size 8 --per_device_training_batch_size 4 "
    "--generation_batches 2 --gradient_accumulation_steps 3"
)


def translate(project, command, **options):
    (found,) = translations(project, [command], **options)
    return found, check_overrides(command_of(found))


def values(found):
    return {name: setting.value for name, setting in found.settings.items()}


def test_what_a_first_step_did_not_write_is_set():
    found, run = translate(CHAT, STEP1, step="sft")
    sft = run.sft
    assert (run.model.path, run.seed, run.data.split_seed) == ("facebook/opt-125m", 1234, 1234)
    assert (sft.optimizer.lr, sft.optimizer.schedule, sft.optimizer.warmup_steps) == (1e-3, "cosine", 0)
    assert (sft.optimizer.min_ratio, sft.optimizer.betas, sft.optimizer.weight_decay) == (0, [0.9, 0.95], 0)
    assert (sft.max_prompt_tokens, sft.max_response_tokens) == (256, 256)
    assert (sft.epochs, sft.global_batch_size, sft.micro_batch_size, sft.response_only) == (1, 16, 16, False)
    assert (sft.engine.zero_stage, sft.engine.precision, sft.engine.loss_scale_window) == (0, "fp16", 100)
    assert run.data.stage_split == [2, 4, 4]
    assert [source.path for source in run.data.sft.train] == ["Dahoas/rm-static"]
    assert [(source.path, source.split) for source in run.data.sft.eval] == [("Dahoas/rm-static", "eval")]
    assert all(found.settings[name].is_default for name in ("sft.optimizer.lr", "engine", "data.stage_split"))
    assert found.unknown == []


def test_batches_grow_with_accumulation_and_devices():
    command = f"{STEP1} --gradient_accumulation_steps 8 --per_device_train_batch_size 4"
    assert translate(CHAT, command, step="sft")[1].sft.global_batch_size == 32
    found, run = translate(CHAT, command, step="sft", ranks=8)
    assert (run.sft.global_batch_size, run.launch.ranks) == (4 * 8 * 8, 8)
    assert found.settings["sft.global_batch_size"].source == (
        "--per_device_train_batch_size 4, --gradient_accumulation_steps 8"
    )


@pytest.mark.parametrize(
    ("flags", "engine"),
    [
        ("--zero_stage 2", ("none", "none", 2)),
        ("--zero_stage 2 --offload", ("cpu", "none", 2)),
        ("--zero_stage 3 --offload", ("cpu", "cpu", 3)),
        ("--offload", ("none", "none", 0)),
    ],
)
def test_zero_and_offloading(flags, engine):
    found, run = translate(CHAT, f"{STEP1} {flags}", step="sft")
    own = run.sft.engine
    assert (own.offload_optimizer, own.offload_param, own.zero_stage) == engine
    assert ("ZeRO 0" in "".join(found.reasons[Fate.none])) == (flags == "--offload")


def test_adapters_learn_at_their_own_rate():
    """There the weights under an adapter are frozen, and lora_learning_rate is the adapters', 5e-4 by default."""
    found, run = translate(CHAT, f"{STEP1} --lora_dim 128 --learning_rate 1e-3 --only_optimize_lora", step="sft")
    lora = run.sft.lora
    assert (lora.rank, lora.alpha, lora.targets, run.sft.optimizer.lr) == (128, 1, ["all-linear"], 5e-4)
    assert "--learning_rate 0.001: it is the rate of embeddings" in "".join(found.reasons[Fate.none])
    found, run = translate(CHAT, f"{STEP1} --lora_dim 8 --num_padding_at_beginning 0 --lora_module_name self_attn")
    assert (run.reward.optimizer.lr, run.reward.optimizer.lora_lr) == (5e-5, 5e-4)
    assert run.reward.center_coef == 0
    assert "--lora_module_name self_attn: adapters are on all linear layers" in "".join(found.reasons[Fate.none])
    assert translate(CHAT, f"{STEP1} --lora_dim 8 --lora_module_name a.q_proj", step="dpo")[1].dpo.lora.targets == [
        "q_proj"
    ]


def test_the_third_step():
    found, run = translate(CHAT, STEP3)
    ppo = run.ppo
    # 4 devices x 8 x 2 batches are 64 generated; a step takes 4 x 3 x 4 = 48: both divide 192
    assert (ppo.rollout_size, ppo.minibatch_size, ppo.rollout_micro_batch_size, ppo.micro_batch_size) == (192, 48, 8, 4)
    assert ppo.iterations == 159  # two of five shares of 76,256 rows are 30,502; 30,502 / 192 = 158.9
    assert (ppo.actor, ppo.critic, ppo.reward, ppo.epochs) == ("A", "C", "C", 1)
    assert [(s.source, s.normalize, s.clamp) for s in ppo.rewards] == [("C", False, 5)]
    assert (ppo.kl.coef, ppo.clip_range, ppo.value_clip_range, ppo.gamma, ppo.lam) == (0.1, 0.2, 0.2, 1, 0.95)
    assert (ppo.scale_advantages, ppo.score.missing_eos_penalty, ppo.kl.kind) == ("none", 0, "k1")
    assert (ppo.actor_optimizer.lr, ppo.critic_optimizer.lr, ppo.actor_optimizer.eps) == (9.65e-6, 5e-6, 1e-8)
    assert [o.warmup_steps for o in (ppo.actor_optimizer, ppo.critic_optimizer)] == [100, 100]
    engines = [ppo.engine, ppo.critic_engine, ppo.reference_engine, ppo.reward_engine]
    assert [engine.zero_stage for engine in engines] == [3, 2, 3, 0]
    assert [engine.offload_param for engine in engines] == ["cpu", "none", "none", "none"]
    assert [engine.offload_optimizer for engine in engines][:2] == ["cpu", "cpu"]
    assert "seed" not in found.settings
    assert run.launch.ranks == 4


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (
            "--enable_ema --actor_gradient_checkpointing --offload_reference_model --unpin_actor_parameters",
            {
                "ppo.actor_optimizer.ema_decay": 0.992,
                "ppo.engine.activation_checkpointing": True,
                "ppo.critic_engine.activation_checkpointing": False,
                "ppo.reference_engine.offload_param": None,  # as the actor's
                "ppo.engine.stream_generation": True,
            },
        ),
        (
            "--unsupervised_dataset_name w --unsupervised_dataset_config_name c --enable_test_mode --test_stop_step 3",
            {
                "ppo.ptx.coef": 27.8,
                "data.ptx.train": [{"path": "w", "name": "c"}],
                "ppo.iterations": 3,
                "ppo.critic_optimizer.warmup_steps": 12,
            },  # of 100: 3 iterations of 192 / 48 steps
        ),
        ("--unsupervised_dataset_name w --data_path me/mine", {"ppo.ptx.coef": None, "ppo.iterations": None}),
        (
            "--actor_lora_dim 64 --dtype bf16",
            {
                "ppo.lora.rank": 64,
                "ppo.actor_optimizer.lr": 5e-4,
                "engine.precision": "bf16",
                "engine.loss_scale_window": None,
            },
        ),
    ],
)
def test_flags_of_the_third_step(flags, settings):
    found, _ = translate(CHAT, f"{STEP3} {flags}")
    assert {name: values(found).get(name) for name in settings} == settings


def test_a_flag_without_a_setting_has_a_reason():
    expected = {
        Fate.itself: {
            "enable_hybrid_engine": "always",
            "release_inference_cache": "freed",
            "print_answers": "samples.jsonl",
            "compute_fp32_loss": "fp32",
            "enable_tensorboard": "metrics.jsonl",
        },
        Fate.none: {
            "inference_tp_size 2": "tensor parallelism",
            "enable_mixed_precision_lora": "quantised",
            "align_overflow": "overflow",
            "add_eot_token": "tokenizer",
        },
    }
    flags = " ".join(f"--{flag}" for part in expected.values() for flag in part)
    found, _ = translate(CHAT, f"{STEP3} {flags}")
    for fate, part in expected.items():
        for flag, words in part.items():
            (reason,) = (reason for reason in found.reasons[fate] if reason.startswith(f"--{flag.split()[0]}:"))
            assert words in reason


def test_other_steps_and_data():
    command = "deepspeed step2_dpo_finetuning/main.py --model_name_or_path M --data_path local/jsonfile mkqa-Chinese"
    found, run = translate(CHAT, f"{command} --beta 0.3 --offload_reference_model --dropout 0.1", ranks=2)
    assert (run.dpo.beta, run.dpo.init_from, run.dpo.optimizer.lr, run.dpo.global_batch_size) == (0.3, "M", 1e-3, 32)
    assert [source.path for source in run.data.dpo.train] == ["data/train.json", "mkqa-Chinese"]
    assert [source.path for source in run.data.dpo.eval] == ["data/eval.json"]
    assert "memory before training only" in "".join(found.reasons[Fate.itself])
    assert "--dropout: DPO runs without" in "".join(found.reasons[Fate.itself])
    found, run = translate(CHAT, "python chat.py --path out/sft/model --max_new_tokens 64")
    assert (run.chat.model, run.chat.max_response_tokens, run.stages) == ("out/sft/model", 64, [])
    found, run = translate(CHAT, f"{STEP1} --eval_interval 50 --eval_iters 10 --num_gpus 2", step="reward", ranks=2)
    assert (run.reward.eval_every, run.reward.eval_rows) == (50, 320)


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        ("--zero_stage 3 --offload", "sft"),
        ("--num_padding_at_beginning 0", "reward"),
        ("--eval_iters=5", "reward"),
        ("--label_smoothing 0.1", "dpo"),
        ("--actor_model_name_or_path A --seed 1", "ppo"),
    ],
)
def test_a_step_is_told_by_its_flags(flags, step):
    (found,) = translations(CHAT, [f"deepspeed main.py --data_path Dahoas/rm-static {flags}"])
    assert found.step == step
    assert f"taken for the step {step} by its flags; --step names another" in found.notes


def test_a_script_with_arguments(tmp_path):
    script = tmp_path / "step3_rlhf_finetuning/run.sh"
    script.parent.mkdir()
    script.write_text("A=$1\nZ=${2:-2}\ndeepspeed main.py --actor_model_name_or_path $A --actor_zero_stage $Z --seed\n")
    (found,) = translations(CHAT, [str(script), "", "3"])
    assert (values(found)["ppo.actor"], values(found)["engine"]) == ("${output_dir}/sft/model", "zero3")
    assert {"--seed has no value: its default is taken"} <= set(found.notes)
    assert any("--ranks N" in note for note in found.notes)
    check_overrides(command_of(found))


def test_devices_are_counted_over_machines():
    (found,) = translations(CHAT, [STEP1.replace("--num_gpus 1", "--num_gpus 4 --num_nodes 2")], step="sft")
    assert values(found)["sft.global_batch_size"] == 16 * 4 * 2
    assert "launch.ranks" not in found.settings
    assert any("on 2 machines, start it on each with torchrun" in note for note in found.notes)


def test_a_file_of_accelerate_counts_devices_too(tmp_path):
    file = tmp_path / "deepspeed.yaml"
    file.write_text("distributed_type: DEEPSPEED\nnum_processes: 8\n")
    (found,) = translations(TRL, [f"accelerate launch --config_file {file} sft.py"])
    assert values(found)["sft.global_batch_size"] == 64
    assert (values(found)["launch.ranks"], values(found)["engine.deepspeed"]) == (8, str(file))


# ---- TRL


def test_supervised_fine_tuning_with_the_defaults_of_trl():
    found, run = translate(TRL, "trl sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara")
    sft, optimizer = run.sft, run.sft.optimizer
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_steps, optimizer.weight_decay) == (2e-5, "linear", 0, 0)
    assert (optimizer.betas, optimizer.eps, optimizer.min_ratio) == ([0.9, 0.999], 1e-8, 0)
    assert (sft.epochs, sft.global_batch_size, sft.micro_batch_size, run.seed) == (3, 8, 8, 42)
    assert (sft.max_prompt_tokens, sft.max_response_tokens, sft.response_only) == (512, 512, False)
    assert (sft.engine.precision, sft.engine.activation_checkpointing, sft.lora.rank) == ("bf16", True, 0)
    assert (run.data.sft.eval, run.data.sft.eval_fraction) == ([], 0.01)  # it is always evaluated here
    assert (run.checkpoint.every, run.tracking.log_every, run.tracking.wandb) == (500, 10, "disabled")
    assert found.unknown == []


def test_a_configuration_file_comes_after_the_command_line(tmp_path):
    file = tmp_path / "sft.yaml"
    settings = {"model_name_or_path": "M", "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "max_length": None}
    settings |= {"datasets": [{"path": "a/b", "name": "c", "split": "train_sft"}, {"path": "d/e"}], "warmup_ratio": 0.1}
    file.write_text(yaml.safe_dump(settings | {"env": {"A": 1}, "eval_strategy": "no", "packing": True}))
    command = f"accelerate launch --num_processes 4 trl/scripts/sft.py --config {file} --learning-rate=2e-4 --use_peft"
    found, run = translate(TRL, command)
    assert (run.sft.optimizer.lr, run.sft.optimizer.schedule, run.sft.optimizer.warmup_steps) == (2e-4, "cosine", 0.1)
    assert [(s.path, s.name, s.split) for s in run.data.sft.train] == [
        ("a/b", "c", "train_sft"),
        ("d/e", None, "train"),
    ]
    assert (run.sft.global_batch_size, run.launch.ranks) == (32, 4)
    lora = run.sft.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (16, 32, 0.05, ["q_proj", "v_proj"])
    assert any(reason.startswith("--packing: rows stay") for reason in found.reasons[Fate.none])
    assert any("--max_length None: there is always a limit" in note for note in found.notes)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (
            "--loss_type hinge --beta 0.2 --no_gradient_checkpointing --fp16 --max_steps 7 --optim adamw_8bit",
            {
                "dpo.loss_type": "hinge",
                "dpo.beta": 0.2,
                "dpo.engine.activation_checkpointing": False,
                "engine.precision": "fp16",
                "dpo.max_steps": 7,
                "dpo.epochs": None,
                "engine.moments": "int8",
            },
        ),
        (
            "--loss_type sigmoid sft --loss_weights 2.0 1.0 --bf16 false --eval_strategy steps --eval_steps 20 "
            "--deepspeed ds.json --report_to wandb --run_name x --save_strategy no",
            {
                "dpo.loss_type": "sigmoid",
                "dpo.rpo_alpha": 0.5,
                "engine.precision": "fp32",
                "dpo.eval_every": 20,
                "data.dpo.eval": [{"path": "d/e", "split": "test"}],
                "engine.deepspeed": "ds.json",
                "tracking.wandb": "auto",
                "name": "x",
                "checkpoint.every": 0,
            },
        ),
        (
            "--loss_type robust --label_smoothing 0.1 --eval_strategy epoch --accelerate_config zero2 "
            "--save_total_limit 2 --save_steps 0.1 --use_peft --use_rslora --lora_r 64 --lora_alpha 16 "
            "--lr_scheduler_type constant --warmup_steps 9",
            {
                "dpo.loss_type": "robust",
                "dpo.label_smoothing": 0.1,
                "dpo.eval_every": 0,
                "engine": "zero2",
                "checkpoint.keep": 2,
                "checkpoint.every": 0.1,
                "dpo.lora.alpha": 128,
                "dpo.optimizer.schedule": "constant",
                "dpo.optimizer.warmup_steps": 0,
            },
        ),
        (
            "--eval_strategy steps --eval_steps 0.3 --max_steps 10 --activation_offloading --fsdp full_shard "
            "--attn_implementation kernels-community/flash-attn2 --lr_scheduler_type "
            """cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr": 1e-7}' --max_length 301""",
            {
                "engine": "zero3",
                "dpo.eval_every": 3,
                "dpo.engine.activation_offload": True,
                "dpo.engine.attention": "flash_attention_2",
                "dpo.optimizer.schedule": "cosine",
                "dpo.max_prompt_tokens": 150,
                "dpo.max_response_tokens": 151,
            },
        ),
    ],
)
def test_flags_of_dpo(flags, settings):
    found, _ = translate(TRL, f"trl dpo --model_name_or_path M --dataset_name d/e {flags}")
    assert {name: values(found).get(name) for name in settings} == settings
    assert found.unknown == []


GRPO = "trl grpo --model_name_or_path M --dataset_name trl-lib/DeepMath-103K --num_processes 2"


def test_groups_are_counted_in_responses():
    found, run = translate(TRL, f"{GRPO} --gradient_accumulation_steps 4 --max_steps 30 --reward_funcs accuracy_reward")
    ppo = run.ppo
    # 8 responses x 4 x 2 devices are generated and learnt in one step; each step is one of 30
    assert (ppo.variant, ppo.rollout_size, ppo.minibatch_size, ppo.samples_per_prompt) == ("grpo", 64, 64, 8)
    assert (ppo.iterations, ppo.epochs, ppo.kl.coef, ppo.max_response_tokens) == (30, 1, 0, 512)
    assert (ppo.loss_aggregation, ppo.scale_advantages, ppo.actor_optimizer.lr) == ("token_mean", "group", 1e-6)
    assert [source.source for source in ppo.rewards] == ["trl.rewards:accuracy_reward"]
    assert (ppo.score.missing_eos_penalty, ppo.sampling.temperature, ppo.eval_prompts) == (0, 1, 0)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (
            "--loss_type grpo --scale_rewards none --epsilon 0.1 --epsilon_high 0.3 --delta 4.0 "
            "--steps_per_generation 3",
            {
                "ppo.loss_aggregation": "sequence_mean",
                "ppo.scale_advantages": "none",
                "ppo.clip_range": 0.1,
                "ppo.clip_range_high": 0.3,
                "ppo.dual_clip": 4.0,
                "ppo.rollout_size": 48,
                "ppo.minibatch_size": 16,
            },
        ),
        (
            "--loss_type dr_grpo --scale_rewards False --generation_batch_size 24 "
            "--sync_ref_model --beta 0.04 --ref_model_sync_steps 63 --reward_funcs my.mod.f --reward_weights 0.5",
            {
                "ppo.loss_aggregation": "constant",
                "ppo.scale_advantages": "none",
                "ppo.rollout_size": 48,  # 24 are no multiple of a step of 16
                "ppo.reference_update_every": 21,  # three steps to an iteration
                "ppo.reference": None,
                "ppo.kl.coef": 0.04,
                "ppo.rewards": [{"source": "my.mod:f", "weight": 0.5}],
            },
        ),
        (
            "--loss_type cispo --epsilon_high 5.0 --delta 4.0 --max_steps 12 --steps_per_generation 3 "
            "--num_iterations 2 --sync_ref_model --reward_model_name_or_path R",
            {
                "ppo.policy_loss": "cispo",
                "ppo.clip_range": 1.0,
                "ppo.clip_range_high": 4.0,
                "ppo.dual_clip": None,
                "ppo.iterations": 2,
                "ppo.epochs": 2,
                "ppo.reference": "M",  # without a KL there is no other
                "ppo.rewards": [{"source": "R", "normalize": False}],
                "ppo.reward": "R",
            },
        ),
        ("", {"ppo.rewards": ["rewards.py:reward"], "ppo.iterations": None}),
    ],
)
def test_flags_of_grpo(flags, settings):
    found, _ = translate(TRL, f"{GRPO} {flags}")
    assert {name: values(found).get(name) for name in settings} == settings


def test_what_happens_every_few_steps_is_counted_in_iterations():
    """Three steps of 16 responses to a rollout of 48, each learnt twice, are six optimizer steps to an iteration."""
    flags = "--steps_per_generation 3 --num_iterations 2 --save_steps 120 --eval_strategy steps --eval_steps 7"
    found, _ = translate(TRL, f"{GRPO} {flags} --max_steps 600 --logging_steps 0.1")
    expected = {"checkpoint.every": 20, "ppo.eval_every": 1, "tracking.log_every": 10, "ppo.iterations": 100}
    assert {name: values(found)[name] for name in expected} == expected


def test_a_policy_is_trained_with_a_critic_as_by_trl():
    command = (
        "accelerate launch --config_file examples/accelerate_configs/deepspeed_zero2.yaml --num_processes 4 "
        "examples/scripts/ppo/ppo.py --dataset_name d/e --learning_rate 3e-6 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 8 --num_mini_batches 4 --total_episodes 10000 --warmup_steps 5 "
        "--model_name_or_path M --sft_model_path S --reward_model_path R --missing_eos_penalty 1.0"
    )
    found, run = translate(TRL, command)
    ppo = run.ppo
    # 4 x 8 on each of 4 devices are a batch of 128; a step comes after 8 micro-batches of 4, which is all of it
    assert (ppo.rollout_size, ppo.minibatch_size, ppo.micro_batch_size, ppo.rollout_micro_batch_size) == (
        128,
        128,
        4,
        64,
    )
    assert (ppo.iterations, ppo.epochs) == (79, 4)  # 10,000 / 128 = 78.1
    assert (run.model.path, ppo.actor, ppo.reward, ppo.critic) == ("M", "S", "R", "R")
    assert [(s.source, s.normalize) for s in ppo.rewards] == [("R", False)]
    assert (ppo.kl.coef, ppo.kl.kind, ppo.clip_range, ppo.value_clip_range) == (0.05, "k1", 0.2, 0.2)
    assert (ppo.gamma, ppo.lam, ppo.sampling.temperature, ppo.max_response_tokens) == (1, 0.95, 0.7, 53)
    assert (ppo.scale_advantages, ppo.score.missing_eos_penalty, ppo.score.missing_eos_mode) == (
        "whiten",
        1,
        "subtract",
    )
    for optimizer in (ppo.actor_optimizer, ppo.critic_optimizer):  # one optimizer, whose rate moves once per batch
        assert (optimizer.lr, optimizer.eps, optimizer.betas, optimizer.schedule) == (
            3e-6,
            1e-8,
            [0.9, 0.999],
            "linear",
        )
        assert optimizer.warmup_steps == 5 * 4
    assert (ppo.engine.zero_stage, run.launch.ranks, found.unknown) == (2, 4, [])
    assert (run.checkpoint.every, run.tracking.log_every) == (500, 10)  # of batches, there too


@pytest.mark.parametrize(
    ("flags", "minibatch"),
    [
        ("--gradient_accumulation_steps 1 --num_mini_batches 4", 2),  # four micro-batches of 2, a step after each
        ("--gradient_accumulation_steps 2 --num_mini_batches 4", 8),  # four of 4, a step after two
        ("--gradient_accumulation_steps 16 --num_mini_batches 4", 128),
    ],
)
def test_steps_of_trl_come_after_as_many_micro_batches_as_are_accumulated(flags, minibatch):
    (found,) = translations(TRL, [f"python ppo.py --per_device_train_batch_size 8 --total_episodes 9 {flags}"])
    assert values(found)["ppo.minibatch_size"] == minibatch


def test_leave_one_out():
    command = "trl rloo --model_name_or_path M --dataset_name d/e --reward_model_name_or_path R --num_processes 2"
    found, run = translate(TRL, f"{command} --max_steps 10 --vllm_gpu_memory_utilization 0.3")
    ppo = run.ppo
    assert (ppo.variant, ppo.advantage, ppo.scale_advantages, ppo.kl.in_loss) == ("rloo", "rloo", "none", False)
    assert (ppo.rollout_size, ppo.samples_per_prompt, ppo.kl.coef, ppo.iterations) == (16, 2, 0.05, 10)
    assert values(translate(TRL, f"{command} --normalize_advantages")[0])["ppo.scale_advantages"] == "whiten"
    assert found.unknown == []


@pytest.mark.parametrize(
    "launcher",
    [
        "python -m trl.scripts.dpo",
        "torchrun --nproc-per-node=2 -m trl.scripts.dpo",
        "accelerate launch --use_deepspeed --zero_stage=2 --num_cpu_threads_per_process 4 -m trl.scripts.dpo",
        "CUDA_VISIBLE_DEVICES=0,1 WANDB_MODE=offline python3 -u train_dpo.py",
        "python -m torch.distributed.run --nproc_per_node 2 trl/scripts/dpo.py",
        'uv run "https://raw.githubusercontent.com/huggingface/trl/main/trl/scripts/dpo.py"',
    ],
)
def test_other_launchers(launcher):
    (found,) = translations(
        TRL, [f"{launcher} --model_name_or_path M --dataset_name d/e --bf16 yes --seed -1 --seed=7"]
    )
    assert (found.step, values(found)["seed"], values(found)["engine.precision"], found.unknown) == (
        "dpo",
        7,
        "bf16",
        [],
    )
    assert values(found).get("engine") == ("zero2" if "zero" in launcher else None)


def test_what_is_no_training_is_left_out():
    found = translations(
        TRL, ["python data.py; trl vllm-serve --model M; trl sft --dataset_name d/e; accelerate config"]
    )
    assert [one.step for one in found] == ["sft"]
    assert [note.partition(": expected")[0] for note in found[0].notes if "left out" in note][:2] == [
        "left out: data.py",
        "left out: vllm-serve",
    ]


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [
        ("deepspeed --include localhost:0,2,5", 3),
        ("accelerate launch --gpu_ids=0,1", 2),
        ("accelerate launch --gpu_ids all", 1),
        ("deepspeed --num_nodes 2 --num_gpus=4", 8),
        ("torchrun --nnodes 2 --nproc_per_node 8", 16),
    ],
)
def test_devices_are_counted(launcher, ranks):
    (found,) = translations(TRL, [f"{launcher} sft.py --dataset_name d/e"])
    assert found.ranks == ranks
    assert any("devices are not counted" in note for note in found.notes) == (ranks == 1)


def test_numbers_of_a_file_are_numbers_as_argparse_reads_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-5\nmax_length: '300'\nbf16: 'false'\n")  # a text, in YAML
    (found,) = translations(TRL, [f"accelerate launch run_sft.py {file} --num_train_epochs 2"])
    assert [values(found)[f"sft.{name}"] for name in ("optimizer.lr", "max_prompt_tokens", "epochs")] == [1e-5, 150, 2]
    assert values(found)["engine.precision"] == "fp32"


def test_files_of_accelerate_say_what_they_are_for(tmp_path):
    for kind, setting in (("FSDP", {"engine": "zero3"}), ("MULTI_GPU", {}), ("DEEPSPEED", None)):
        file = tmp_path / f"{kind.lower()}.yaml"
        file.write_text(f"distributed_type: {kind}\nnum_processes: 2\n")
        found = translations(TRL, [f"trl sft --accelerate_config {file}"])[0]
        engine = {name: value for name, value in values(found).items() if name in ("engine", "engine.deepspeed")}
        assert engine == ({"engine.deepspeed": str(file)} if setting is None else setting)
        assert found.ranks == 2


def test_lists_may_have_commas():
    flags = """--use_peft --lora_target_modules "q_proj", "v_proj" --report_to wandb trackio"""
    found, run = translate(TRL, f"trl sft --model_name_or_path M --dataset_name d/e {flags}")
    assert (run.sft.lora.targets, values(found)["tracking.wandb"]) == (["q_proj", "v_proj"], "auto")


def test_rows_give_the_iterations():
    assert values(*translations(TRL, [GRPO], rows=1000))["ppo.iterations"] == 1500  # 3 x 1,000 prompts, 2 at a time


def test_what_has_no_counterpart_says_why():
    expected = {
        "loss_type sapo": "expected one of grpo",
        "load_in_4bit": "quantised",
        "torch_compile": "compiler",
        "push_to_hub": "uploaded",
        "min_p 0.1": "temperature",
        "optim adafactor": "AdamW",
        "trust_remote_code": "refused",
        "dataset_streaming": "streamed",
        "lr_scheduler_type inverse_sqrt": "expected linear, cosine or constant",
        "attn_implementation flex_attention": "expected eager",
        "reward_funcs get_soft_overlong_punishment": "overlong_share",
        "lora_r 8": "without --use_peft",
        "logging_steps 0.1": "a share of the run",
    }
    found, _ = translate(TRL, f"{GRPO} " + " ".join(f"--{flag}" for flag in expected))
    for flag, words in expected.items():
        assert [
            reason
            for reason in found.reasons[Fate.none]
            if reason.startswith(f"--{flag.split()[0]}") and words in reason
        ]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--loss_type hinge --label_smoothing 0.1", "--label_smoothing 0.1: the loss hinge has none"),
        ("--sync_ref_model", "--sync_ref_model: the reference does not move: its log-prob"),
        ("--loss_type sigmoid bco_pair", "--loss_type sigmoid bco_pair: expected one of sigmoid"),
    ],
)
def test_flags_that_do_not_go_together_here_compose_all_the_same(flags, reason):
    found, _ = translate(TRL, f"trl dpo --model_name_or_path M --dataset_name d/e {flags}")
    assert [text for text in found.reasons[Fate.none] if text.startswith(reason)]


def test_generation_servers_are_not_needed():
    (found,) = translations(TRL, [f"{GRPO} --use_vllm --vllm_mode colocate --vllm_importance_sampling_mode token_mask"])
    reasons = "\n".join(found.reasons[Fate.itself])
    assert "--use_vllm: the engine generates" in reasons
    assert "ppo.mismatch" in reasons


# ---- mistakes, and what is printed


@pytest.mark.parametrize(
    ("project", "command", "message"),
    [
        (CHAT, "python prompt_eval.py", "expected main.py or chat.py"),
        (CHAT, "ls", "there is no command"),
        (CHAT, "", "there is no command"),
        (TRL, "trl sft M --dataset_name d", "trl sft M: found M; expected a flag"),
        (TRL, "trl sft -learning_rate 1", "found -learning_rate; expected a flag"),
        (CHAT, "run_1.3b.sh", "run_1.3b.sh is no file here"),
        (CHAT, f"{STEP3} --actor_learning_rate 1e-5 1e-6", "--actor_learning_rate 1e-5 1e-6: expected one value"),
        (CHAT, f"{STEP3} --offload maybe", "--offload maybe: expected true or false"),
        (TRL, "trl sft --a 'b", "bash does not understand the command: unexpected EOF"),
        (TRL, "trl sft --config run.yaml --bf16 2", "--bf16 2: expected true or false"),
        (CHAT, f"{STEP3} --ppo_epochs two", "--ppo_epochs two: expected a number"),
        (TRL, "trl kto --a", "kto: expected one of sft, reward, dpo, ppo, grpo"),
        (TRL, "python examples/scripts/grpo_vlm.py", "images"),
        (TRL, "trl sft --config none.yaml", "no such file"),
        (TRL, "accelerate launch", "found no program"),
    ],
)
def test_a_command_that_cannot_be_translated_is_one_sentence(project, command, message):
    with pytest.raises(ValueError, match=message):
        translations(project, [command])


def test_a_file_that_is_no_script_says_what_to_give(tmp_path):
    for name, message in (
        ("train.py", "docs/trainer.md runs it as it is"),
        ("sft.yaml", "give the command that reads it"),
    ):
        (tmp_path / name).write_text("learning_rate: 1.0e-3\n")
        with pytest.raises(ValueError, match=message):
            translations(TRL, [str(tmp_path / name)])


def test_options_may_come_before_the_command_which_is_quoted(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["migrate", "trl", "--ranks", "2", "trl sft --model_name_or_path M", "--rows", "9"])
    main()
    assert "    launch.ranks=2 \\" in capsys.readouterr().out.splitlines()
    monkeypatch.setattr("sys.argv", ["migrate", "trl", "trl", "sft", "--model_name_or_path", "M"])
    with pytest.raises(SystemExit):
        main()
    assert "found --model_name_or_path; expected the whole command in one pair of quotes" in capsys.readouterr().err


def test_unknown_flags_have_a_near_one():
    (found,) = translations(CHAT, [f"{STEP3} --max_answer_seqlen 5 --beta 1 --foo"], step="ppo")
    assert found.unknown == [
        "--max_answer_seqlen (did you mean --max_answer_seq_len?)",
        "--beta (it is one of dpo)",
        "--foo",
    ]
    (found,) = translations(TRL, ["trl sft --save_step 5 --lora_rnk 8 --eval_step 3 --zero_stag 2 --loging_steps 1"])
    assert all("did you mean" in text for text in found.unknown)
    assert len(found.unknown) == 5


def test_the_print_can_be_pasted_and_explains_every_setting():
    (found,) = translations(CHAT, [f"{STEP3} --enable_ema --align_overflow --foo"])
    text = described(found)
    command, _, rest = text.partition("\n\n")
    assert command.splitlines()[1] == "python run_pipeline.py \\"
    assert "    'ppo.rewards=[{source: C, normalize: false, clamp: 5}]' \\" in command.splitlines()
    for word in command_of(found)[2:]:
        assert f"  {word}" in rest
    for title in (
        "from the command:",
        "theirs by default, or fixed there:",
        "no counterpart:",
        "not recognised:",
        "look at:",
    ):
        assert title in rest.splitlines()
    assert "ppo.actor_optimizer.ema_decay=0.992" in rest
    assert "  --enable_ema" in rest


@pytest.mark.parametrize(
    ("word", "value"), [("3", 3), ("1e-3", 1e-3), ("0.", 0.0), ("True", True), ("nan", "nan"), ("none", "none")]
)
def test_words_are_read_as_numbers_where_they_are(word, value):
    assert scalar(word) == value
    assert type(scalar(word)) is type(value)


SAMPLES = {"json": {}, "list": ["a"], "switch": True}


@pytest.mark.parametrize(("project", "step"), [(project, step) for project in (CHAT, TRL) for step in project.steps])
def test_no_flag_goes_without_a_line(project, step):
    """Each alone, with its default or another value; what becomes of it is found by its name."""
    for name, flag in project.steps[step].items():
        given = {name: SAMPLES.get(flag.kind, 3 if flag.default is None else flag.default)}
        lines = described(translate_given(project, given, step=step)).splitlines()
        assert any(f"--{name} " in f"{line} " or f"--{name}:" in line or f"--{name}," in line for line in lines), name

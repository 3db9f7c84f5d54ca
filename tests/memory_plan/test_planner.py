"""The plan of a run: its phases and roles, what it says when something does not fit, and the table of the docs."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import rlhf.memory_plan.plan_text as plan_text_module
from benchmarks.memory_examples import EXAMPLES, STATES, WEIGHTS, host_row, row
from benchmarks.plan import _measured, _supervised, compose_run, write_model
from rlhf.config.run_config import MemoryConfig
from rlhf.engine.materialize import working_dtype
from rlhf.memory_plan.limits import Change, _candidates, cheapest_changes, with_changes
from rlhf.memory_plan.plan import Limits, Place
from rlhf.memory_plan.plan_text import check_memory, compare_with_plan, numbers, plan_text, runtime_items
from rlhf.memory_plan.planner import ALLOCATOR, Machine, machine_of, plan_stage
from rlhf.memory_plan.states import GRADIENTS
from rlhf.memory_plan.trace import ACTIVATIONS, CACHE, LOGITS
from rlhf.runtime.dist import World
from rlhf.tracking.timing import Peak, Stopwatch, resident
from stages.setup.compose import CONF_DIR, register_schema, to_run

DOCS = Path(__file__).parents[2] / "docs" / "memory.md"


def run_of(folder, *overrides):
    register_schema()
    with initialize_config_dir(CONF_DIR, version_base=None):
        return to_run(compose("config", overrides=["experiment=smoke", f"output_dir={folder}", *overrides]))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("run"))


def plan_of(run, stage, ranks=1):
    return plan_stage(run, stage, machine=machine_of(run, ranks=ranks))


def test_ppo_has_four_models_in_four_phases(smoke):
    plan = plan_of(smoke, "ppo")
    assert [phase.name for phase in plan.phases] == ["generate", "score", "train", "save"]
    for phase in plan.phases:
        roles = {item.role for item in phase.items if item.part == "working parameters"}
        assert roles == {"actor", "critic", "reference", "reward"}
    parts = {item.part for item in plan.phases[0].items if item.role == "actor"}
    assert "KV cache" in parts
    assert {item.part for item in plan.phases[2].items} >= {"gradients", "activations"}


def test_the_cache_is_keys_and_values_of_every_token(smoke):
    config = smoke.ppo
    tokens = config.rollout_micro_batch_size * (config.max_prompt_tokens + config.max_response_tokens)
    each = 2 * 2 * 16  # keys and values of two heads of 16
    size = working_dtype(smoke.engine.precision, World.alone().device).itemsize
    found = next(item.bytes for item in plan_of(smoke, "ppo").phases[0].items if item.part == "KV cache")
    exact = 2 * tokens * each * size  # of two layers
    assert exact <= found <= 1.3 * exact + config.rollout_micro_batch_size * (259 * 8 + 4096)


def test_captured_steps_have_a_cache_of_fixed_shape_and_memory_of_their_own(tmp_path):
    def generating(*overrides):
        run = run_of(tmp_path, "engine.device=cuda", *overrides)
        items = plan_of(run, "ppo").phases[0].items
        return run.ppo, {item.part: item.bytes for item in items if item.role == "actor"}

    config, found = generating("engine.precision=bf16", "ppo.max_prompt_tokens=200", "ppo.max_response_tokens=50")
    rows, columns = config.rollout_micro_batch_size, 256  # 250, rounded up to a multiple of 64
    exact = 2 * rows * columns * 2 * 2 * 16 * 2  # two layers, keys and values of two heads of 16, in 2 bytes
    assert exact <= found["KV cache"] <= 1.3 * exact + rows * (50 * 30 + 4096)
    logits = rows * 512 * (2 + 4)  # in bf16, and weights of the draw in fp32
    assert logits <= found["CUDA graphs"] <= 3 * logits, "a mask and a few copies of a row of logits beside"
    for without in ("engine.cuda_graphs=false", "engine.device=cpu"):
        assert not generating("engine.precision=bf16", without)[1].get("CUDA graphs")


def test_another_generator_leaves_the_models_at_rest(tmp_path):
    phases = plan_of(run_of(tmp_path, "ppo.generation_backend=my.py:Mine"), "ppo").phases
    assert phases[0].name == "generate"
    parts = [{item.part for item in phase.items if item.role == "actor"} for phase in phases]
    assert not parts[0] & {"KV cache", "activations", "gathered weights"}
    assert parts[0] <= parts[1]


def test_with_adapters_the_reference_is_the_actor_and_without_a_critic_there_is_none(tmp_path):
    lora = plan_of(run_of(tmp_path, "stage=[sft,reward,ppo_lora]"), "ppo")
    assert {item.role for item in lora.phases[0].items} == {"actor", "critic", "reward", "process"}
    grouped = plan_of(run_of(tmp_path, "stage=[sft,reward,grpo]", "ppo.samples_per_prompt=4"), "ppo")
    assert "critic" not in {item.role for item in grouped.phases[2].items}
    free = plan_of(run_of(tmp_path, "ppo.kl.coef=0"), "ppo")
    assert {item.role for item in free.phases[0].items} == {"actor", "critic", "reward", "process"}


def test_what_frozen_layers_gave_is_planned_for_a_rollout_and_while_the_next_one_is_scored(tmp_path):
    def kept(phase, *overrides):
        plan = plan_of(run_of(tmp_path, "stage=[sft,reward,ppo_lora]", *overrides), "ppo", ranks=2)
        (found,) = [found for found in plan.phases if found.name == phase]
        return sorted(item.bytes for item in found.items if item.part == "hidden states")

    some = ("ppo.lora.top_layers=1", "engine.precision=bf16", "ppo.rollout_size=16", "ppo.minibatch_size=4")
    lengths = ("ppo.max_prompt_tokens=20", "ppo.max_response_tokens=10")

    def rows(count):
        return [2 * 64 * count * (20 + 10)] * 2  # of actor and critic, in 2 bytes

    assert kept("train", *some, *lengths) == rows(8 + 2)  # half of a rollout, and of a minibatch
    assert kept("score", *some, *lengths) == rows(2 * 8)
    assert kept("train", *lengths) == []  # adapters everywhere
    assert kept("train", *some, "ppo.reuse_frozen_layers=false") == []


def test_text_beside_the_policy_takes_what_sft_takes_of_the_same_length(tmp_path):
    def logits(run, stage, role):
        (train,) = [phase for phase in plan_of(run, stage).phases if phase.name == "train"]
        return sum(item.bytes for item in train.items if item.role == role and item.part == "logits and loss")

    short = ["ppo.max_prompt_tokens=20", "ppo.max_response_tokens=20"]
    text = ["ppo.ptx.coef=1", "data.ptx.train=[texts.jsonl]", "ppo.ptx.max_tokens=400"]
    sft = ["sft.max_prompt_tokens=200", "sft.max_response_tokens=200", "sft.micro_batch_size=4"]
    run = run_of(tmp_path, *short, *text, *sft)
    found, expected = logits(run, "ppo", "actor"), logits(run, "sft", "model")
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 10 * logits(run_of(tmp_path, *short), "ppo", "actor")
    parts = {item.part for item in plan_of(run, "ppo").phases[2].items}
    assert "KV cache" not in parts


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_micro_batches_by_tokens_are_planned_with_the_most_tokens_that_the_limit_allows(tmp_path, stage):
    sizes = [f"{stage}.max_prompt_tokens=100", f"{stage}.max_response_tokens=100"]

    def moving(size, tokens=None):
        limits = [f"{stage}.micro_batch_size={size}", f"{stage}.global_batch_size=64"]
        limits += [f"{stage}.micro_batch_tokens={tokens}"] if tokens else []
        plan = plan_of(run_of(tmp_path, *sizes, *limits), stage)
        (train,) = [phase for phase in plan.phases if phase.name == "train"]
        return sum(item.bytes for item in train.items if item.part in ("activations", "logits and loss"))

    each = 2 if stage == "reward" else 1
    assert moving(64, 800 * each) == moving(4)  # 4 rows of 200 tokens
    assert moving(4) < moving(64, 990 * each) < moving(5)  # 5 rows of 192
    assert moving(3, 990 * each // 2) < moving(3)
    assert moving(64, 100 * each) == moving(64, 1) == moving(1)  # a longer row is alone


def test_eager_attention_is_planned_with_all_its_scores(tmp_path):
    def activations(attention):
        sizes = ["sft.max_prompt_tokens=100", "sft.max_response_tokens=100", "sft.micro_batch_size=4"]
        plan = plan_of(run_of(tmp_path, *sizes, "engine.precision=fp32", f"engine.attention={attention}"), "sft")
        (train,) = [phase for phase in plan.phases if phase.name == "train"]
        return sum(item.bytes for item in train.items if item.part == "activations")

    scores = 4 * 4 * 200 * 200 * 4  # 4 sequences, 4 heads, in fp32
    assert activations("eager") > activations("sdpa") + scores  # softmax keeps its results
    assert activations("null") == activations("sdpa")


def test_short_prompts_leave_more_of_the_tokens_to_responses(tmp_path):
    def logits(*sizes):
        lengths = ["ppo.max_prompt_tokens=300", "ppo.max_response_tokens=100", "ppo.minibatch_size=16"]
        plan = plan_of(run_of(tmp_path, *lengths, *sizes, "engine.precision=bf16"), "ppo")  # auto is another elsewhere
        (train,) = [phase for phase in plan.phases if phase.name == "train"]
        return sum(item.bytes for item in train.items if item.part == "logits and loss" and item.role == "actor")

    # 4 rows of 400 tokens have 400 of responses; 16 of 100 have nearly 1600.
    assert logits("ppo.micro_batch_size=16", "ppo.micro_batch_tokens=1600") > 2.5 * logits("ppo.micro_batch_size=4")


def test_less_memory_is_fewer_tokens_where_these_are_the_limit(tmp_path):
    run = run_of(tmp_path, "sft.micro_batch_size=16", "sft.micro_batch_tokens=600")
    changes = [change.settings for change in _candidates(run, "sft", ranks=1, is_cuda=False)]
    assert changes[0] == {"micro_batch_tokens": 300}
    assert with_changes(run, "sft", changes=[Change("", changes[0])]).sft.micro_batch_tokens == 300


def test_what_a_process_takes_by_itself_is_said_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="rlhf.memory_plan.plan_text")
    check_memory(run_of(tmp_path, "stage=[sft,reward,grpo]"), ["sft", "reward", "ppo"], ranks=1)
    assert "process's runtime" not in caplog.text
    assert caplog.text.count("of which the process takes") == 1
    assert "grpo    generate" in caplog.text
    assert set(json.loads((tmp_path / "plan.json").read_text())) == {"sft", "reward", "grpo"}


def test_a_shallower_reward_model_is_planned_before_it_is_made(tmp_path):
    whole = plan_of(run_of(tmp_path), "ppo")
    cut = plan_of(run_of(tmp_path, "reward.num_layers=1"), "ppo")
    weights = [
        next(i.bytes for i in plan.phases[0].items if (i.role, i.part) == ("reward", "working parameters"))
        for plan in (whole, cut)
    ]
    assert weights[1] < 0.8 * weights[0]


def test_fewer_bytes_for_smaller_batches_more_ranks_and_recomputation(tmp_path):
    def peak(*overrides, ranks=1):
        run = run_of(tmp_path, "stage=sft", "checkpoint.every=0", "engine.precision=bf16", *overrides)
        phases = {phase.name: phase for phase in plan_of(run, "sft", ranks).phases}
        return phases["train"].total(Place.host)

    assert peak("sft.micro_batch_size=2") < 0.7 * peak()
    assert peak("engine.activation_checkpointing=true") < peak()
    assert peak("engine=zero3", ranks=2) < peak(ranks=2)


def test_dropout_is_that_of_the_stage_and_not_of_the_checkpoint(tmp_path):
    shape = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500, "n_positions": 2048}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"architectures": ["GPT2LMHeadModel"]}))
    overrides = ["stage=sft", "model=path", f"model.path={tmp_path}"]
    none, some = (
        plan_of(run_of(tmp_path / "out", *overrides, f"sft.dropout={dropout}"), "sft").largest.total(Place.host)
        for dropout in (0.0, 0.1)
    )
    assert none < some


def test_what_does_not_fit_is_refused_with_the_cheapest_change(tmp_path, caplog):
    run = run_of(tmp_path, "stage=sft", "sft.micro_batch_size=8")
    needed = plan_of(run, "sft").largest.total(Place.host)
    run = replace(run, memory=MemoryConfig(host_gb=(resident()["RssAnon"] + 0.7 * needed) / 1e9))
    with pytest.raises(ValueError, match=r"(?s)does not fit.*sft\.micro_batch_size=4.*memory\.enforce=false"):
        check_memory(run, ["sft"], ranks=1)
    assert "sft.micro_batch_size=4" in (tmp_path / "plan.txt").read_text()
    allowed = replace(run, memory=replace(run.memory, enforce=False))
    check_memory(allowed, ["sft"], ranks=1)
    assert "does not fit" in caplog.text


def test_a_change_that_is_named_makes_it_fit(smoke):
    def plan(run):
        return plan_of(run, "sft")

    full = plan(smoke).largest.total(Place.host)
    for share in (0.8, 0.5, 0.3):
        limits = Limits(None, host=int(share * full), disk=10**12)
        changes = cheapest_changes(smoke, "sft", plan=plan, limits=limits, ranks=1)
        assert changes
        assert plan(with_changes(smoke, "sft", changes=changes)).shortages(limits) == []
        for needless in range(len(changes)):
            fewer = changes[:needless] + changes[needless + 1 :]
            assert plan(with_changes(smoke, "sft", changes=fewer)).shortages(limits) != []
    assert cheapest_changes(smoke, "sft", plan=plan, limits=Limits(None, host=1000, disk=10**12), ranks=1) == []


def test_narrower_state_is_proposed_in_the_order_of_its_harm_where_weights_can_be_bf16(smoke):
    def names(precision):
        run = replace(smoke, sft=replace(smoke.sft, engine=replace(smoke.sft.engine, precision=precision)))
        return [list(change.settings.items())[-1] for change in _candidates(run, "sft", ranks=1, is_cuda=True)]

    found = names("bf16")
    narrow = [("engine.master_weights", "split"), ("engine.grad_accum_dtype", "bf16")]
    narrow += [("engine.moments", "bf16"), ("engine.moments", "int8")]
    assert [change for change in found if change in narrow] == narrow
    before, after = ("engine.offload_param", "cpu"), ("engine.nvme_path", "FOLDER")
    assert found.index(narrow[0]) < found.index(before) < found.index(narrow[1]) < found.index(after)
    assert not set(narrow) & set(names("fp32"))


def test_the_copy_of_a_checkpoint_is_given_up_where_that_is_enough(smoke):
    def plan(run):
        return plan_of(run, "sft")

    run = replace(smoke, checkpoint=replace(smoke.checkpoint, every=0.5, asynchronous=True))
    change = Change("", {"checkpoint.asynchronous": False})
    changed = with_changes(run, "sft", changes=[change])
    assert changed.sft == run.sft
    assert plan(changed).largest.total(Place.host) < plan(run).largest.total(Place.host)


def test_a_folder_with_nothing_but_a_configuration_can_be_planned(tmp_path):
    shape = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500, "n_positions": 2048}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"architectures": ["GPT2LMHeadModel"]}))
    overrides = ["stage=[sft,reward,ppo]", "model=path", f"model.path={tmp_path}"]
    text = plan_text(run_of(tmp_path / "out", *overrides), ranks=2)
    assert "KV cache" in text
    assert "it fits" in text
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_here_must_be_described(tmp_path):
    run = run_of(tmp_path, "stage=sft", "engine.device=cuda")
    with pytest.raises(ValueError, match=r"memory\.device_gb"):
        plan_text(run, ranks=1)
    described = replace(run, memory=MemoryConfig(device_gb=80, host_gb=256))
    assert "device, 80.00 GB available" in plan_text(described, ranks=1)


def test_measured_peaks_stand_beside_the_plan(tmp_path, smoke, caplog):
    run = replace(smoke, output_dir=str(tmp_path))
    (tmp_path / "plan.json").write_text(json.dumps({"sft": {"train": {"device": 0, "host": 2_000, "disk": 5}}}))
    timer = Stopwatch(World.alone().device)
    timer.highest["train"] = Peak(host=1_000)
    with caplog.at_level(logging.INFO):
        found = compare_with_plan(run, "sft", world=World.alone(), timer=timer)
    assert found == {"memory/train_host_bytes": 1_000, "memory/train_host_plan_bytes": 2_000}
    assert "+100 %" in caplog.text


def test_the_plan_of_a_device_stands_beside_tensors_without_the_context_around_them(smoke):
    run = replace(smoke, engine=replace(smoke.engine, device="cuda"), memory=MemoryConfig(device_gb=80, host_gb=256))
    items = runtime_items(torch.device("cuda"), torch.bfloat16)
    bare, whole = (plan_stage(run, "sft", machine=Machine(torch.device("cuda"), 1, 1, kept)) for kept in ((), items))
    assert numbers(whole)["train"]["device"] == bare.phases[1].total(Place.device)
    assert numbers(whole)["train"]["host"] == whole.phases[1].total(Place.host)
    assert whole.phases[1].total(Place.device) > bare.phases[1].total(Place.device)


def test_the_table_of_the_documentation_is_current(tmp_path):
    """One row of it, and that no row is missing: all take minutes."""
    text = DOCS.read_text()
    assert row(*EXAMPLES[2], folder=tmp_path) in text
    assert [f"| {shape} | `{settings}` |" in text for shape, settings in EXAMPLES] == [True] * len(EXAMPLES)
    assert host_row("7.6B", "split masters, bf16 sums and moments", folder=tmp_path) in text
    assert [f"| {shape} | {state} |" in text for shape in WEIGHTS for state in STATES] == [True] * 20


def test_tensors_of_a_real_process_take_what_was_planned_within_a_tenth(tmp_path):
    """The quick version of `python -m benchmarks.plan`."""
    write_model(
        tmp_path, {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8}
    )
    run = compose_run(tmp_path, _supervised("sft", 4, precision="fp32", length=32))
    plan = plan_of(run, "sft")
    found = _measured(run, tmp_path, ranks=1, environment={"MALLOC_MMAP_THRESHOLD_": "65536"})
    for phase in plan.phases[:2]:
        planned = phase.total(Place.host) - sum(item.bytes for item in phase.items if item.part == ALLOCATOR)
        assert planned == pytest.approx(found["peaks"][phase.name]["host"] - found["runtime"], rel=0.1), phase.name


def test_a_batch_that_the_ranks_do_not_divide_can_be_planned(tmp_path):
    """Whether it can be run is for the checks to say."""
    run = run_of(tmp_path, "stage=sft", "engine=zero0", "sft.global_batch_size=4", "sft.micro_batch_size=2")
    assert plan_of(run, "sft", ranks=3).phases[1] == plan_of(run, "sft", ranks=2).phases[1]


def test_a_reference_that_follows_the_actor_is_in_checkpoints(tmp_path):
    def held(part, *overrides):
        phases = plan_of(run_of(tmp_path, "engine.precision=fp32", *overrides), "ppo").phases
        return sum(item.bytes for item in phases[-1].items if (item.role, item.part) == ("reference", part))

    assert held("checkpoints") == held("checkpoint copy") == 0
    moves = ("ppo.reference_update_every=1", "checkpoint.keep=2", "checkpoint.best=false")
    weights = held("working parameters", *moves)
    assert held("checkpoint copy", *moves) == pytest.approx(weights, rel=0.01)  # buffers are not in it
    assert held("checkpoints", *moves) == 3 * held("checkpoint copy", *moves)  # two, and the one being written
    assert held("export", *moves) == 0


def test_a_stage_that_is_finished_is_not_planned(tmp_path, monkeypatch):
    """Its model may be gone."""
    run, planned = run_of(tmp_path, "stage=[sft,reward]"), []

    def recorded(run, stage, *, machine):
        planned.append(stage)
        return plan_stage(run, stage, machine=machine)

    monkeypatch.setattr(plan_text_module, "plan_stage", recorded)
    check_memory(run, ["reward"], ranks=1)
    assert set(planned) == {"reward"}


def test_every_model_that_computes_leaves_holes_in_the_heap_of_a_cpu(smoke):
    phases = plan_of(smoke, "ppo").phases
    lost = {item.bytes for phase in phases for item in phase.items if item.part == ALLOCATOR}
    moving = [
        sum(item.bytes for item in phase.items if item.part in {ACTIVATIONS, LOGITS, CACHE, GRADIENTS})
        for phase in phases
    ]
    assert len(lost) == 1, "the same in all phases"
    assert 4 * min(lost) > 1.5 * max(moving), "the actor's are beside the critic's"

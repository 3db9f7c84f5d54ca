"""The rows of everything but `zero_optimization`: batch, optimizer, scheduler, precision, and what is not here."""

from __future__ import annotations

from rlhf.deepspeed.keys import Key, Kind, ignored, ignored_section, mapped, refused, used

_EXACT = "gradients are averaged in fp32, so nothing has to be scaled to keep it in range"
_SPENDS = "the report says what a step spends"
_METRICS = "metrics go to metrics.jsonl, to the report and, by `tracking`, to W&B"
_CHECKPOINTS = "checkpoints are this project's own, set by `checkpoint`"
_NOT_IN_DEEPSPEED = "DeepSpeed itself does not read it"
_SHORT_DTYPES = ("fp16", "bf16", "fp32")
_DTYPES = tuple(
    f"{prefix}{name}"
    for prefix, names in (
        ("", "fp16 bf16 fp32 float16 bfloat16 float32 half float int8"),
        ("torch.", "float16 bfloat16 float32 int8"),
    )
    for name in names.split()
)

_BATCH = (
    mapped(
        "train_batch_size",
        "global_batch_size of the stage (PPO: minibatch_size); solved with the next two and the run's ranks",
        kind=Kind.integer,
    ),
    mapped("train_micro_batch_size_per_gpu", "micro_batch_size of the stage", kind=Kind.integer),
    mapped(
        "gradient_accumulation_steps",
        "what is left: train_batch_size / ranks / micro-batch; checked",
        kind=Kind.integer,
    ),
    ignored("managed_gradient_accumulation", "the engine always counts micro-batches itself", default=True),
)

_OPTIMIZER = (
    refused(
        "optimizer.type",
        "AdamW is the optimizer here; leave the section out to keep the run's own AdamW",
        allowed=("adam", "adamw", "auto"),
    ),
    used("optimizer.params.lr", "of the stage's optimizer", setting="lr", kind=Kind.number, default=0.001),
    mapped("optimizer.params.betas", "optimizer.betas", default=[0.9, 0.999]),
    used("optimizer.params.eps", "of the stage's optimizer", setting="eps", kind=Kind.number, default=1e-8),
    used(
        "optimizer.params.weight_decay",
        "of the stage's optimizer; never on biases, norms and other vectors",
        setting="weight_decay",
        kind=Kind.number,
        default="0 (torch_adam: 0.01)",
    ),
    refused(
        "optimizer.params.bias_correction",
        "both moments are corrected; set it to true, or lower lr for the first steps",
        allowed=(True,),
        default=True,
    ),
    refused(
        "optimizer.params.adam_w_mode",
        "weight decay is decoupled (AdamW), which is what Adam means in DeepSpeed too; set weight_decay to 0, with "
        "which both are the same, or adam_w_mode to true",
        allowed=(True,),
        default=True,
    ),
    refused("optimizer.params.amsgrad", "the second moment is AdamW's own; set it to false", allowed=(False,)),
    refused(
        "optimizer.params.max_grad_norm",
        "DeepSpeed refuses it too: write gradient_clipping at the top level instead",
        allowed=(0, None),
    ),
    ignored(
        "optimizer.params.torch_adam",
        "there is one AdamW; only its default weight decay is torch's",
        default=False,
        kind=Kind.other,
    ),
    ignored("optimizer.params.fused", "the step is fused where that is faster", kind=Kind.switch),
    ignored("optimizer.params.foreach", "the step is fused where that is faster", kind=Kind.switch),
    ignored("optimizer.params.set_grad_none", "gradients are freed after the step", kind=Kind.switch),
    ignored(
        "optimizer.params.fp32_optimizer_states", "moments are fp32; engine.moments=bf16 halves them", default=True
    ),
    ignored("optimizer.legacy_fusion", "of DeepSpeed's fused kernels", default=False),
    ignored("optimizer.weight_decay", f"{_NOT_IN_DEEPSPEED} here: it belongs into optimizer.params", kind=Kind.number),
    ignored("optimizer.eps", f"{_NOT_IN_DEEPSPEED} here: it belongs into optimizer.params", kind=Kind.number),
)

_SCHEDULER = (
    mapped(
        "scheduler.type",
        "optimizer.schedule: WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, value for value "
        "DeepSpeed's; others are refused",
    ),
    mapped("scheduler.params.warmup_min_lr", "optimizer.schedule_options; auto is 0", default=0),
    mapped(
        "scheduler.params.warmup_max_lr",
        "optimizer.schedule_options; auto is the optimizer's lr",
        default="WarmupLR: lr; WarmupDecayLR: 0.001",
    ),
    mapped(
        "scheduler.params.warmup_num_steps",
        "optimizer.schedule_options; auto is optimizer.warmup_steps; less than 2 counts as 2",
        default=1000,
    ),
    mapped("scheduler.params.warmup_type", "optimizer.schedule_options: log or linear", default="log"),
    mapped(
        "scheduler.params.total_num_steps",
        "optimizer.schedule_options; auto, or not given, is the stage's length",
        default="required",
    ),
    *(
        mapped(f"scheduler.params.{name}", "optimizer.schedule_options", default=default)
        for name, default in (
            ("warmup_min_ratio", 0),
            ("cos_min_ratio", 0.0001),
            ("lr_range_test_min_lr", 0.001),
            ("lr_range_test_step_size", 2000),
            ("lr_range_test_step_rate", 1),
            ("lr_range_test_staircase", False),
            ("cycle_min_lr", "required"),
            ("cycle_max_lr", "required"),
            ("decay_lr_rate", 0),
            ("cycle_first_step_size", 2000),
            ("cycle_second_step_size", "cycle_first_step_size"),
            ("cycle_first_stair_count", 0),
            ("cycle_second_stair_count", "cycle_first_stair_count"),
            ("decay_step_size", 0),
            ("cycle_momentum", True),
            ("cycle_min_mom", 0.8),
            ("cycle_max_mom", 0.9),
            ("decay_mom_rate", 0),
        )
    ),
    ignored("scheduler.params.last_batch_iteration", "a resumed run knows its step", default=-1),
)

_PRECISION = (
    mapped("fp16.enabled", "engine.precision=fp16; with bf16 off too: fp32", kind=Kind.switch, default=False),
    used("fp16.loss_scale", "0 adapts it", setting="loss_scale", kind=Kind.number, default=0),
    used("fp16.initial_scale_power", "where it starts", setting="initial_scale_power", kind=Kind.integer, default=16),
    used(
        "fp16.loss_scale_window", "steps until it doubles", setting="loss_scale_window", kind=Kind.integer, default=1000
    ),
    used("fp16.hysteresis", "overflows until it halves", setting="hysteresis", kind=Kind.integer, default=2),
    used(
        "fp16.consecutive_hysteresis",
        "forget overflows after every good step",
        setting="consecutive_hysteresis",
        kind=Kind.switch,
        default=False,
    ),
    used("fp16.min_loss_scale", "it does not fall below", setting="min_loss_scale", kind=Kind.number, default=1),
    ignored("fp16.auto_cast", "inputs are token ids: there is nothing to cast", default=False),
    ignored("fp16.fp16_master_weights_and_grads", "masters are fp32: more exact, more memory", default=False),
    ignored("fp16.opt_level", "of Apex", kind=Kind.text),
    ignored("fp16.fp16", _NOT_IN_DEEPSPEED),
    ignored("fp16.fp16_scale_tolerance", _NOT_IN_DEEPSPEED, kind=Kind.number),
    ignored("fp16.type", _NOT_IN_DEEPSPEED),
    mapped("bf16.enabled", "engine.precision=bf16; with fp16 off too: fp32", kind=Kind.switch, default=False),
    mapped(
        "bf16.bf16_optimizer_states",
        "engine.moments=bf16; masters stay fp32",
        kind=Kind.switch,
        default=False,
    ),
    ignored("bf16.bf16_master_weights_and_grads", "masters are fp32: more exact, more memory", default=False),
    ignored("bf16.immediate_grad_update", "fp32 sums take each gradient as it comes", default=False),
    ignored("bf16.check_grad_overflow", "a step with a non-finite gradient is always skipped", default=True),
    ignored("bf16.auto_cast", "inputs are token ids: there is nothing to cast", kind=Kind.switch),
    *(
        ignored(f"bf16.{name}", "bf16 needs no loss scale", kind=Kind.number)
        for name in ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
    ),
    ignored("bf16.consecutive_hysteresis", "bf16 needs no loss scale", kind=Kind.switch),
    mapped(
        "torch_autocast.enabled",
        "engine.precision=bf16 or fp16, by dtype, with fp32 masters: whole blocks compute in it",
        kind=Kind.switch,
        default=False,
    ),
    mapped("torch_autocast.dtype", "which of the two", default="bfloat16 or, on CUDA, float16", among=_DTYPES),
    ignored("torch_autocast.lower_precision_safe_modules", "a whole block computes in one precision", kind=Kind.items),
    ignored("data_types.grad_accum_dtype", "gradients are summed in fp32", default="that of the model", among=_DTYPES),
    ignored(
        "data_types.param_dtype",
        "fp16.enabled and bf16.enabled say it; where they say otherwise, refused",
        among=_DTYPES,
    ),
    ignored("data_types.buffer_dtype", "buffers keep their type", among=_DTYPES),
    ignored("data_types.keep_in_fp32_modules", "buffers keep their type", kind=Kind.items),
    ignored("communication_data_type", "reductions are fp32: more exact, more traffic", among=_SHORT_DTYPES),
    ignored(
        "seq_parallel_communication_data_type",
        "there is no sequence parallelism",
        default="fp32",
        among=_SHORT_DTYPES,
    ),
    ignored("gradient_accumulation_dtype", f"gradients are summed in fp32; {_NOT_IN_DEEPSPEED}", kind=Kind.text),
    ignored(
        "fp32_allreduce",
        "of very old versions; reductions are fp32",
        kind=Kind.switch,
        old_names=("allreduce_always_fp32",),
    ),
    refused("amp", "Apex is gone from DeepSpeed too: use bf16, or fp16, instead"),
    ignored_section("msamp", "of MS-AMP, which DeepSpeed does not read any more", text="opt_level"),
)

_GRADIENTS = (
    used(
        "gradient_clipping",
        "where a file is silent, the run's own stands (DeepSpeed 0.19.8: 1, 0.19.2: off)",
        setting="max_grad_norm",
        kind=Kind.number,
        default=1.0,
    ),
    ignored("prescale_gradients", _EXACT, default=False),
    ignored("gradient_predivide_factor", _EXACT, default=1.0),
    refused(
        "gradient_allreduce_op",
        "gradients are averaged over the global number of tokens; a sum would scale lr with the ranks. Set it to mean",
        allowed=("mean", "auto"),
        default="mean",
    ),
    ignored("sparse_gradients", "gradients of embeddings are reduced dense: the same numbers", default=False),
    ignored("disable_allgather", "of very old versions; parameters are always all-gathered", default=False),
    ignored(
        "allgather_size",
        "of very old versions; blocks are gathered in the groups of reduce_bucket_size",
        kind=Kind.integer,
    ),
)

_ACTIVATIONS = (
    mapped(
        "activation_checkpointing.partition_activations",
        "true: engine.activation_checkpointing=true (DeepSpeed: only for models that call its own function)",
        kind=Kind.switch,
        default=False,
    ),
    mapped(
        "activation_checkpointing.cpu_checkpointing",
        "true: engine.activation_checkpointing=true and engine.activation_offload=true",
        kind=Kind.switch,
        default=False,
    ),
    mapped(
        "activation_checkpointing.contiguous_memory_optimization",
        "true: engine.activation_checkpointing=true",
        kind=Kind.switch,
        default=False,
    ),
    mapped(
        "activation_checkpointing.number_checkpoints",
        "1 or more: engine.activation_checkpointing=true; every block is one",
        kind=Kind.integer,
    ),
    ignored("activation_checkpointing.synchronize_checkpoint_boundary", "for measuring", default=False),
    ignored("activation_checkpointing.profile", _SPENDS, default=False),
)

_ELSEWHERE = (
    ignored("steps_per_print", "tracking.log_every says how often metrics are recorded", kind=Kind.number),
    ignored("wall_clock_breakdown", _SPENDS, default=False),
    ignored("memory_breakdown", "the report compares planned with measured memory", default=False),
    ignored("dump_state", "config.yaml is written to the output folder", default=False),
    ignored("dataloader_drop_last", "an optimizer step always has its whole batch", default=False),
    ignored("log_level", "tracking.progress says what the terminal shows", kind=Kind.text),
    ignored("disable_python_gc", "garbage collection is left as it is", default=False),
    ignored("vocabulary_size", "only warns in DeepSpeed", kind=Kind.integer),
    ignored("zero_allow_untested_optimizer", "there is one optimizer, and it is tested", default=False),
    ignored(
        "zero_force_ds_cpu_optimizer",
        "the step on the CPU needs no compiled extension",
        default=True,
        old_names=("zero_force_ds_cpu_optimization",),
    ),
    ignored_section(
        "flops_profiler",
        _SPENDS,
        switch="detailed",
        integer="profile_step module_depth top_modules",
        number="recompute_fwd_factor",
        text="output_file",
    ),
    ignored_section("comms_logger", _SPENDS, switch="prof_all verbose debug", items="prof_ops"),
    ignored_section("comms_config", _NOT_IN_DEEPSPEED),
    ignored_section("timers", _SPENDS, section="throughput"),
    ignored_section("tensorboard", _METRICS, text="output_path job_name"),
    ignored_section(
        "wandb", f"{_METRICS}: tracking.wandb, tracking.project, tracking.entity", text="group team project"
    ),
    ignored_section("csv_monitor", _METRICS, text="output_path job_name"),
    ignored_section(
        "comet",
        _METRICS,
        switch="online",
        integer="samples_log_interval",
        text="project workspace api_key experiment_name experiment_key mode",
    ),
    ignored_section("monitor_config", _METRICS, section="tensorboard wandb csv_monitor comet"),
    ignored_section(
        "autotuning",
        "of DeepSpeed's launcher; `plan=true` says what fits before a run",
        switch="fast overwrite",
        integer="start_profile_step end_profile_step tuner_early_stopping tuner_num_trials mp_size",
        text="results_dir exps_dir metric metric_path tuner_type model_info_path",
        section="model_info arg_mappings",
    ),
    ignored_section(
        "hybrid_engine",
        "the actor trains sharded and generates gathered, unless engine.stream_generation=true",
        switch="release_inference_cache pin_parameters enable_cuda_graph",
        integer="max_out_tokens inference_tp_size tp_gather_partition_size",
    ),
    ignored_section(
        "checkpoint",
        _CHECKPOINTS,
        text="tag_validation",
        switch="load_universal use_node_local_storage checkpoint_serialization",
        section="parallel_write writer",
    ),
    ignored_section("nebula", _CHECKPOINTS),
    ignored_section("datastates_ckpt", _CHECKPOINTS),
    ignored_section(
        "compile",
        "there is no compiler in between",
        switch="deepcompile autoep_non_moe free_activation offload_activation offload_activation_pin_memory "
        "offload_opt_states double_buffer symmetric_memory debug_log offload_parameters sync_before_reduce "
        "sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors keep_all_input_tensors",
        integer="free_activation_threshold",
        items="passes",
    ),
    ignored(
        "use_data_before_expert_parallelism",
        "there is no expert parallelism",
        default=False,
        old_names=("use_data_before_expert_parallel",),
    ),
    ignored("graph_harvesting", "only speed in DeepSpeed", default=False),
    ignored("data_efficiency.enabled", "decides whether its parts below are asked for", default=False),
    ignored("data_efficiency.seed", "the stage's seed orders the data", kind=Kind.integer),
)

_NOT_HERE = (
    refused("data_efficiency.data_sampling", "sampling by difficulty changes which rows are learnt; switch it off"),
    refused("data_efficiency.data_routing", "dropping tokens in layers changes training; switch it off"),
    refused("curriculum_learning", "sequences are not cut to a growing length; switch it off"),
    refused("progressive_layer_drop", "layers are not dropped; switch it off"),
    refused("eigenvalue", "belongs to quantised training, which is not here; switch it off"),
    refused("quantize_training", "quantised training is not here; switch it off"),
    refused("weight_quantization", "weights are trained in engine.precision; remove it"),
    refused("compression_training", "weights are neither quantised nor pruned; switch it off"),
    refused("sparse_attention", "attention is the model's own; remove it"),
    refused(
        "elasticity",
        "it chooses the batch size by the number of ranks; set train_batch_size, and switch it off (a checkpoint "
        "resumes on any number of ranks)",
    ),
    refused(
        "pipeline.stages", "layers are not spread over ranks: use zero_optimization.stage=3", allowed=("auto", 0, 1)
    ),
    ignored_section("pipeline", "only for models that are written as a pipeline"),
    refused(
        "tensor_parallel.autotp_size",
        "matrices are not cut: use zero_optimization.stage=3, or set it to 1",
        allowed=(0, 1, "auto"),
        default=0,
    ),
    ignored_section("tensor_parallel", "matrices are not cut"),
    refused("expert_parallel", "experts are not spread over ranks: use zero_optimization.stage=3; switch it off"),
    refused(
        "sequence_parallel_size",
        "sequences are not cut over ranks; set it to 1, and spare memory with activation_checkpointing",
        allowed=(1, "auto"),
        default=1,
    ),
)

TOP_KEYS: tuple[Key, ...] = (
    *_BATCH,
    *_OPTIMIZER,
    *_SCHEDULER,
    *_GRADIENTS,
    *_PRECISION,
    *_ACTIVATIONS,
    *_ELSEWHERE,
    *_NOT_HERE,
)

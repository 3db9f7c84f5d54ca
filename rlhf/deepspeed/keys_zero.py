"""The rows of `zero_optimization`, its offload blocks and `aio`."""

from __future__ import annotations

from rlhf.deepspeed.keys import Key, Kind, ignored, mapped, refused, used

_BUFFERS = "buffer_count x buffer_size x 4 bytes are all the memory that travelling to and from disk takes"
_ONE_FOLDER = "one folder for both blocks; where they differ, the optimizer's"

_OPTIMIZER = (
    mapped(
        "zero_optimization.offload_optimizer.device",
        "none, cpu or nvme: engine.offload_optimizer=none, cpu or nvme, at ZeRO 1, 2 and 3 alike",
        default="none",
    ),
    mapped("zero_optimization.offload_optimizer.nvme_path", f"engine.nvme_path; {_ONE_FOLDER}", kind=Kind.text),
    mapped(
        "zero_optimization.offload_optimizer.buffer_count",
        f"engine.buffer_count, with device=nvme, the larger of the two blocks'; {_BUFFERS}",
        kind=Kind.integer,
        default=4,
    ),
    mapped(
        "zero_optimization.offload_optimizer.pin_memory",
        "engine.pin_memory; one setting for both blocks: false only where no block says true",
        kind=Kind.switch,
        default=True,
    ),
    used(
        "zero_optimization.offload_optimizer.pipeline_read",
        "read the next tile while this one is computed (DeepSpeed: off unless asked for; here: on)",
        setting="pipeline_read",
        kind=Kind.switch,
        default=False,
    ),
    used(
        "zero_optimization.offload_optimizer.pipeline_write",
        "write a tile back while the next one is computed (DeepSpeed: off unless asked for; here: on)",
        setting="pipeline_write",
        kind=Kind.switch,
        default=False,
    ),
    used(
        "zero_optimization.offload_optimizer.ratio",
        "share of the optimizer's elements that leave the device, at ZeRO 1 and 2 too",
        setting="optimizer_share",
        kind=Kind.number,
        default=1.0,
    ),
    ignored(
        "zero_optimization.offload_optimizer.fast_init",
        "states are never read before they are written, so there is no slow way to start",
        default=False,
    ),
    ignored(
        "zero_optimization.offload_optimizer.super_offload",
        "the step on the CPU overlaps with backward and transfers in any case; engine.delayed_update goes further",
        default=False,
    ),
    ignored(
        "zero_optimization.offload_optimizer.cpuadam_cores_perc",
        "launch.threads sets the CPU threads of a rank",
        default=0.8,
    ),
)

_PARAM = (
    mapped(
        "zero_optimization.offload_param.device",
        "none, cpu or nvme: engine.offload_param=none, cpu or nvme at ZeRO 3; no effect below, as in DeepSpeed",
        default="none",
    ),
    mapped("zero_optimization.offload_param.nvme_path", f"engine.nvme_path; {_ONE_FOLDER}", kind=Kind.text),
    mapped(
        "zero_optimization.offload_param.buffer_count",
        f"engine.buffer_count, with device=nvme, the larger of the two blocks'; {_BUFFERS}",
        kind=Kind.integer,
        default=5,
    ),
    used(
        "zero_optimization.offload_param.buffer_size",
        f"elements of four bytes in one buffer; {_BUFFERS}",
        setting="buffer_size",
        kind=Kind.integer,
        default=100_000_000,
    ),
    used(
        "zero_optimization.offload_param.max_in_cpu",
        "elements that stay in host memory instead of on disk",
        setting="parameters_in_cpu",
        kind=Kind.integer,
        default=1_000_000_000,
    ),
    mapped(
        "zero_optimization.offload_param.pin_memory",
        "engine.pin_memory; one setting for both blocks: false only where no block says true",
        kind=Kind.switch,
        default=True,
    ),
)

_SIZES = (
    used(
        "zero_optimization.reduce_bucket_size",
        "elements that are gathered and reduced together, in whole blocks, at ZeRO 0 to 2",
        setting="reduce_bucket_size",
        kind=Kind.integer,
        default=500_000_000,
    ),
    used(
        "zero_optimization.overlap_comm",
        "communicate while computing",
        setting="overlap_comm",
        kind=Kind.switch,
        default="ZeRO 3: true, else false",
    ),
    used(
        "zero_optimization.sub_group_size",
        "elements of optimizer state that are updated at once, off the device; 0 keeps the run's own",
        setting="sub_group_size",
        kind=Kind.integer,
        default=1_000_000_000,
    ),
    used(
        "zero_optimization.stage3_prefetch_bucket_size",
        "elements gathered ahead of use, in whole blocks",
        setting="prefetch_bucket_size",
        kind=Kind.integer,
        default=50_000_000,
        old_names=("prefetch_bucket_size",),
    ),
    used(
        "zero_optimization.stage3_max_live_parameters",
        "the limit for what is gathered at once; never less than the block that computes",
        setting="max_live_parameters",
        kind=Kind.integer,
        default=1_000_000_000,
        old_names=("max_live_parameters",),
    ),
    used(
        "zero_optimization.stage3_param_persistence_threshold",
        "parameters smaller than this are kept whole on every rank",
        setting="persistence_threshold",
        kind=Kind.integer,
        default=100_000,
        old_names=("param_persistence_threshold",),
    ),
    mapped(
        "zero_optimization.stage3_model_persistence_threshold",
        "0: engine.persistence_threshold=0; any other limit on all of them together is not kept: lower "
        "stage3_param_persistence_threshold instead",
        kind=Kind.integer,
        default="no limit",
        old_names=("model_persistence_threshold",),
    ),
)

_ALWAYS = (
    ignored("zero_optimization.contiguous_gradients", "gradients of a block are contiguous in any case", default=True),
    ignored("zero_optimization.reduce_scatter", "gradients are reduce-scattered in any case", default=True),
    ignored(
        "zero_optimization.use_multi_rank_bucket_allreduce",
        "there is one reduce-scatter per group of blocks",
        default=True,
    ),
    ignored("zero_optimization.allgather_partitions", "parameters are always all-gathered", default=True),
    ignored(
        "zero_optimization.allgather_bucket_size",
        "blocks are gathered in the groups of reduce_bucket_size",
        default=500_000_000,
    ),
    ignored("zero_optimization.load_from_fp32_weights", "masters come from the model's own weights", default=True),
    ignored("zero_optimization.elastic_checkpoint", "a checkpoint resumes on any number of ranks", default=False),
    ignored("zero_optimization.compute_grad_norm", "the norm is always computed and recorded", default=True),
    ignored(
        "zero_optimization.ignore_unused_parameters", "a parameter without a gradient keeps its value", default=True
    ),
    ignored("zero_optimization.legacy_stage1", "there is one implementation of ZeRO 1", default=False),
    ignored("zero_optimization.round_robin_gradients", "every rank copies its own share to the host", default=False),
    ignored("zero_optimization.parameter_alignment", "shards are aligned in any case", default=False),
    ignored(
        "zero_optimization.stage3_max_reuse_distance",
        "a block is freed after its use and gathered again for backward",
        default=1_000_000_000,
        old_names=("max_reuse_distance",),
    ),
    ignored(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "models are always saved whole, one block at a time",
        default=False,
        old_names=(
            "gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
            "gather_fp16_weights_on_model_save",
        ),
    ),
    ignored(
        "zero_optimization.stage3_module_granularity_threshold",
        "a whole block is the unit that is gathered",
        default=0,
        old_names=("module_granularity_threshold",),
    ),
    ignored(
        "zero_optimization.stage3_use_all_reduce_for_fetch_params",
        "parameters are all-gathered",
        default=False,
        old_names=("use_all_reduce_for_fetch_params",),
    ),
    ignored(
        "zero_optimization.stage3_allgather_sequential",
        "a block is one all-gather",
        default=False,
        old_names=("allgather_sequential",),
    ),
    ignored(
        "zero_optimization.leaf_module",
        "a whole block, with all its experts, is the unit that is gathered",
        kind=Kind.section,
    ),
    ignored("zero_optimization.memory_efficient_linear", "no gathered weight is kept for backward", default=True),
    ignored("zero_optimization.pipeline_loading_checkpoint", "each rank reads only its own share", default=False),
    ignored("zero_optimization.override_module_apply", "new weights are drawn before they are sharded", default=True),
    ignored("zero_optimization.log_trace_cache_warnings", "there is no trace to invalidate", default=False),
    ignored("zero_optimization.enable_sanity_checks", "the checks are part of the tests", default=False),
    ignored("zero_optimization.save_muon_momentum_buffer_in_memory", "Muon is not here", default=False),
    ignored(
        "zero_optimization.find_unused_parameters",
        "of very old versions; a parameter without a gradient keeps its value",
        kind=Kind.switch,
    ),
)

_BEYOND = (
    ignored(
        "zero_optimization.zero_hpz_partition_size",
        "a second copy of the weights in each node, to spare traffic; weights are split over all ranks",
        default=1,
    ),
    ignored(
        "zero_optimization.zero_quantized_weights",
        "weights are gathered as they are: exact, with twice the traffic",
        default=False,
    ),
    ignored(
        "zero_optimization.zero_quantized_nontrainable_weights",
        "frozen weights stay in the working precision: exact, with more memory; engine.offload_param=cpu spares it",
        default=False,
    ),
    refused(
        "zero_optimization.zero_quantized_gradients",
        "gradients are reduced in fp32, not in 4 bits, and training would go another way; set it to false",
        default=False,
    ),
    ignored(
        "zero_optimization.zeropp_loco_param", "belongs to quantised gradients, which are refused", kind=Kind.section
    ),
    ignored(
        "zero_optimization.mics_shard_size", "weights are split over all ranks: less memory, more traffic", default=-1
    ),
    ignored("zero_optimization.mics_hierarchical_params_gather", "weights are split over all ranks", default=False),
    refused(
        "zero_optimization.zenflow",
        "it updates most weights with old gradients; remove it (engine.delayed_update=true is of that kind)",
    ),
)

_AIO = (
    ignored("aio.block_size", "transfers are cut into pieces of their own size", default=1_048_576),
    ignored("aio.queue_depth", "reads and writes go through threads, not through a queue of libaio", default=8),
    ignored(
        "aio.intra_op_parallelism",
        "a transfer is shared by two threads",
        default=1,
        old_names=("thread_count",),
    ),
    ignored("aio.single_submit", "of libaio, which is not used", default=False),
    ignored("aio.overlap_events", "transfers overlap in any case", default=True),
    ignored("aio.use_gds", "transfers go through host memory", default=False),
)

ZERO_KEYS: tuple[Key, ...] = (
    mapped(
        "zero_optimization.stage",
        "engine.zero_stage; `zero_optimization: true` is stage 1, false is stage 0",
        setting="zero_stage",
        kind=Kind.integer,
        default=0,
    ),
    *_OPTIMIZER,
    *_PARAM,
    mapped("zero_optimization.cpu_offload", "old: offload_optimizer with device=cpu", kind=Kind.switch),
    mapped(
        "zero_optimization.cpu_offload_param",
        "old: offload_param with device=cpu",
        kind=Kind.switch,
        old_names=("cpu_offload_params",),
    ),
    mapped("zero_optimization.cpu_offload_use_pin_memory", "old: pin_memory of the offload blocks", kind=Kind.switch),
    *_SIZES,
    *_ALWAYS,
    *_BEYOND,
    *_AIO,
)

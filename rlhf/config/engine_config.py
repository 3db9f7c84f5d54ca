"""Settings of the ZeRO engine: sharding, offloading, precision, buffers and communication.

Names follow DeepSpeed's where it has one; `engine.deepspeed` reads its files. Imports nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from rlhf.config.bounds import Bounds, Count, Natural, NonNegative, Positive, Settings, Share, require


class Precision(StrEnum):
    """Type of the working weights. Masters are fp32 in every case."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Device(StrEnum):
    """The device on which models compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Attention(StrEnum):
    """How a model attends, by the names that transformers gives its implementations."""

    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
    flash_attention_3 = "flash_attention_3"

    @property
    def is_flash(self) -> bool:
        """Whether it is a package of its own, for CUDA and 16 bits."""
        return self in (Attention.flash_attention_2, Attention.flash_attention_3)


class OffloadDevice(StrEnum):
    """Where a part of a model is kept between uses; none keeps it on the device that computes."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class MomentDtype(StrEnum):
    """Type in which AdamW's two moments are stored; updates are computed in fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


class MasterWeights(StrEnum):
    """How the fp32 weights that AdamW updates are stored beside bf16 working weights."""

    fp32 = "fp32"
    split = "split"  # type: ignore[assignment]  # hides a method of str that no setting needs


class GradDtype(StrEnum):
    """Type in which gradients are added up, or sent to other ranks."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True)
class EngineConfig(Settings):
    """The ZeRO engine. Sizes are in elements unless they say bytes."""

    zero_stage: Annotated[int, Bounds(0, 3)]
    """What is sharded over the ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""
    shard_ranks: Natural = 0
    """Ranks that share one copy of what is sharded, usually those of one machine; other machines hold copies of their
    own (HSDP: FSDP's HYBRID_SHARD, DeepSpeed's MiCS). Weights then travel inside a machine only, for more memory. 0:
    all ranks share one copy."""
    precision: Precision = Precision.auto
    """Working weights; auto is bf16 where the device multiplies it natively, else fp32. fp16 scales the loss."""
    fast_fp32_matmul: bool = True
    """On AMD CPUs with AVX-512, fp32 models of a usual width multiply with oneDNN, twice as fast as with MKL and as
    precise (`rlhf/models/fp32_matmul.py`); false leaves it to MKL everywhere."""
    device: Device = Device.auto
    """auto takes CUDA when there is one."""
    attention: Attention | None = None
    """Implementation of attention (transformers' `attn_implementation`): the same results up to rounding. null is
    transformers' choice: sdpa, or eager for a model without. eager keeps all scores, and flash needs its package."""
    padding_free: bool | None = None
    """Compute the real tokens of a micro-batch alone, as one row in which no sequence sees another (TRL's
    `padding_free`, verl's `use_remove_padding`): the same results up to rounding. null does so on a CPU, and with flash
    attention, whose kernels take such rows, if the model can; true also with SDPA on CUDA, and refuses other models."""
    offload_optimizer: OffloadDevice = OffloadDevice.none
    """Where master weights, moments and reduced gradients are kept; needs ZeRO 1 or more."""
    offload_param: OffloadDevice = OffloadDevice.none
    """Where working weights are kept; needs ZeRO 3."""
    nvme_path: str | None = None
    """Folder on a local disk for offloading to nvme; its files have no names and vanish with the process."""
    buffer_count: Count = 4
    """Buffers between disk and memory, of each engine and rank; 3 or more overlap reading, computing and writing."""
    buffer_size: Count = 8_000_000
    """Elements of four bytes in one of them: buffer_count x buffer_size x 4 bytes are all the memory they take."""
    pipeline_read: bool = True
    """Read the next tile of optimizer state from disk while this one is computed."""
    pipeline_write: bool = True
    """Write a tile of optimizer state back while the next one is computed."""
    pin_memory: bool = True
    """Page-locked host memory for what travels to and from a CUDA device; faster, cannot be swapped."""
    optimizer_share: Share = 1.0
    """Share of the elements whose states go to `offload_optimizer`; the rest stays on the device (DeepSpeed: ratio)."""
    parameters_in_cpu: Natural = 0
    """With offload_param=nvme: elements that stay in host memory instead of on disk (DeepSpeed: max_in_cpu)."""
    moments: MomentDtype = MomentDtype.fp32
    """Bytes a parameter for both: fp32 8, bf16 4, int8 2. In bf16, a second decay above about 0.99 is rounded away; in
    int8, blocks of 256 share a scale, and rounding is right on average."""
    master_weights: MasterWeights = MasterWeights.fp32
    """split stores the 16 bits that bf16 working weights lack: 2 bytes a parameter instead of 4, and as exact. Without
    bf16 weights, or with offload_param=nvme, masters stay whole."""
    grad_accum_dtype: GradDtype = GradDtype.fp32
    """Gradients added up over micro-batches or ranks take 4 bytes a parameter in fp32, 2 in bf16, which rounds each sum
    (DeepSpeed: data_types.grad_accum_dtype). One micro-batch on one rank is kept as it comes: there is no sum."""
    reduce_dtype: GradDtype = GradDtype.fp32
    """Type in which gradients are sent to other ranks and added up over them (DeepSpeed: communication_data_type). bf16
    sends half as much and rounds what is sent and every sum; at ZeRO 1 also sums over a rank's micro-batches."""
    sub_group_size: Count = 100_000_000
    """Largest tile of optimizer state that is loaded, updated and stored at once, off the device."""
    reduce_bucket_size: Natural = 0
    """At ZeRO 0 to 2, consecutive blocks are gathered and reduced together up to this size; 0 takes each on its own."""
    prefetch_bucket_size: Natural = 1_000_000
    """At ZeRO 3, what follows is gathered ahead: one unit, and more until they have this size; 0 gathers none."""
    max_live_parameters: Count = 1_000_000_000
    """At ZeRO 3, the limit for what is gathered at once, the computing block and those ahead of it."""
    persistence_threshold: Natural = 0
    """At ZeRO 3, parameters smaller than this are kept whole on every rank and never gathered."""
    overlap_comm: bool = True
    """Communicate while computing; false gathers and reduces one after the other, with less memory."""
    activation_checkpointing: bool = False
    """Recompute each block in backward: less memory, about a third more compute."""
    activation_offload: bool = False
    """Keep the inputs of recomputed blocks in host memory (CUDA; needs activation_checkpointing)."""
    stream_generation: bool = False
    """Generate block by block, as training does, instead of gathering the whole model: slow, for an actor that does not
    fit into the device."""
    cuda_graphs: bool = True
    """Decode with captured steps on a CUDA device, so that launching kernels takes no time; a model that cannot be
    captured says why. Takes the memory of one more step."""
    max_skipped_steps: Count = 3
    """Steps in a row with a non-finite gradient before the run stops; in fp16, counted at the lowest loss scale."""
    loss_scale: NonNegative = 0.0
    """fp16: fixed factor on the loss; 0 adapts it."""
    initial_scale_power: Annotated[int, Bounds(0, 126)] = 16
    """fp16: an adaptive factor starts at two to this power."""
    loss_scale_window: Count = 1000
    """fp16: steps without overflow after which an adaptive factor doubles."""
    hysteresis: Count = 2
    """fp16: overflows before an adaptive factor is halved."""
    consecutive_hysteresis: bool = False
    """fp16: forget earlier overflows after every good step, not only when the factor doubles."""
    min_loss_scale: Positive = 1.0
    """fp16: an adaptive factor does not fall below this."""
    deepspeed: Any = None
    """A DeepSpeed JSON file (or YAML, or one of Hugging Face Accelerate), or its content as a mapping; what it sets
    explicitly replaces the settings here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if str(self.zero_stage).startswith("${"):  # refers to another engine's settings, which check themselves
            return
        require(
            self.offload_optimizer == OffloadDevice.none or self.zero_stage >= 1,
            f"engine.offload_optimizer={self.offload_optimizer}: expected engine.zero_stage 1, 2 or 3, found 0.",
        )
        require(
            self.shard_ranks == 0 or (self.shard_ranks > 1 and self.zero_stage >= 1),
            f"engine.shard_ranks={self.shard_ranks} at engine.zero_stage={self.zero_stage}: expected 0, or two ranks "
            "or more at ZeRO 1, 2 or 3; engine.zero_stage=0 keeps a copy on every rank.",
        )
        require(
            self.offload_param == OffloadDevice.none or self.zero_stage == 3,
            f"engine.offload_param={self.offload_param}: expected engine.zero_stage=3, found {self.zero_stage}.",
        )
        require(
            OffloadDevice.nvme not in (self.offload_optimizer, self.offload_param) or bool(self.nvme_path),
            "engine.nvme_path is missing: name a folder on a local disk for offloading to nvme.",
        )
        require(
            self.attention is None or not self.attention.is_flash or self.precision is not Precision.fp32,
            f"engine.attention={self.attention} computes in 16 bits; expected engine.precision=bf16, fp16 or auto, "
            f"found {self.precision}; or engine.attention=sdpa.",
        )
        for name in ("master_weights", "grad_accum_dtype"):
            narrow = getattr(self, name) != "fp32"
            require(
                not narrow or self.precision in (Precision.bf16, Precision.auto),
                f"engine.{name}={getattr(self, name)}: expected engine.precision=bf16 or auto, found {self.precision}.",
            )
        require(
            not self.activation_offload or self.activation_checkpointing,
            "engine.activation_offload=true needs engine.activation_checkpointing=true.",
        )

"""What a model takes at the highest moment of training, of a forward, or of generating: states and a trace together.

Left out: which of these a phase of a stage is made of (`rlhf/memory_plan/planner.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from rlhf.memory_plan.plan import Item, Place
from rlhf.memory_plan.states import GATHERED, GRADIENTS, Setting, States
from rlhf.memory_plan.trace import ACTIVATIONS, CACHE, Family, Prepare, Stretch, Work, trace
from rlhf.models.model_spec import ModelSpec
from rlhf.models.transforms import enable_activation_checkpointing

DECODING_CALLS = 2  # the prompt, and one token after it: later ones take no more


@dataclass(frozen=True)
class Model:
    """A model whose memory is asked for."""

    setting: Setting
    whole: ModelSpec
    """On meta, not sharded."""
    family: Family
    """Makes shorter ones."""
    plain: Family
    """The same without adapters."""

    @cached_property
    def states(self) -> States:
        """What it holds whatever it computes."""
        return States(self.whole, self.setting)

    @property
    def num_layers(self) -> int:
        """Its blocks."""
        return sum(self.family.runs)

    def at_rest(self) -> list[Item]:
        """Between steps, while others compute."""
        kept = [item for item in self.states.gradients(0.0) if item.place is Place.host]
        return [*self.states.at_rest(), *kept]

    def training(self, work: Work) -> list[Item]:
        """At the highest moment of a step: forward, backward or update."""
        engine = self.setting.engine
        recompute = enable_activation_checkpointing if engine.activation_checkpointing else None
        stretches = self._trace(work, training=True, on_module=recompute)
        moments = [self._in_training(stretch) for stretch in stretches if stretch.where.call >= 0]
        return [*self.states.at_rest(), *max([*moments, self._in_step()], key=_device_bytes)]

    def forward(self, work: Work, *, adapters: bool = True) -> list[Item]:
        """At the highest moment of a forward without gradients.

        Args:
            work: the forward.
            adapters: False for the model below its adapters.
        """
        stretches = self._trace(work, training=False, plain=not adapters)
        moving = self._item(GATHERED, Place.device, count=self.states.gathered())
        return [*self.at_rest(), moving, *self._traced(max(stretches, key=lambda stretch: stretch.total))]

    def generation(self, work: Work, *, rows: int) -> list[Item]:
        """At the highest moment of answering a batch of prompts.

        Args:
            work: generates.
            rows: prompts in the batch.
        """
        engine, states = self.setting.engine, self.states
        streams = engine.stream_generation and engine.zero_stage == 3
        stretches = self._trace(work, training=False, answer=rows, max_calls=DECODING_CALLS)
        stretch, cache = _with_cache(stretches, self.num_layers)
        held = [self._item(GATHERED, Place.device, count=states.gathered() if streams else states.whole())]
        # When rows leave, one layer's keys are copied before the others' are.
        leaving = self._item(CACHE, Place.device, count=cache + cache // (2 * self.num_layers))
        others = [item for item in self._traced(stretch) if item.part != CACHE]
        return [*self.at_rest(), *held, leaving, *others]

    def _in_training(self, stretch: Stretch) -> list[Item]:
        states = self.states
        items = [*self._traced(stretch), self._item(GATHERED, Place.device, count=states.gathered())]
        items += states.gradients(self._share_of_sums(stretch))
        if stretch.where.backward or stretch.where.place == "between":
            items.append(self._item(GRADIENTS, Place.device, count=states.in_reduction() + self._unreduced))
        return items

    def _in_step(self) -> list[Item]:
        return self.states.gradients(1.0)

    @property
    def _unreduced(self) -> int:
        """ZeRO 1 keeps whole fp32 sums until the last micro-batch is reduced."""
        setting = self.setting
        waits = setting.engine.zero_stage == 1 and setting.ranks > 1 and setting.micro_batches > 1
        return 4 * sum(p.numel() for p in self.states.spec.module.parameters() if p.requires_grad) * waits

    def _share_of_sums(self, stretch: Stretch) -> float:
        """How much of the sums is there; in a later micro-batch all of it."""
        states = self.states
        if self.setting.micro_batches > 1:
            return 1.0
        if not stretch.where.backward:
            return states.finished_before_blocks() / states.elements() if stretch.where.place == "between" else 0.0
        per_block = (states.elements() - states.outside_blocks()) / self.num_layers
        blocks = {"last": 1, "inner": min(2, self.num_layers)}.get(stretch.where.place, self.num_layers)
        return (states.finished_before_blocks() + per_block * blocks) / states.elements()

    def _trace(
        self,
        work: Work,
        *,
        training: bool,
        plain: bool = False,
        on_module: Callable[[nn.Module], None] | None = None,
        answer: int = 1,
        max_calls: int = 1 << 30,
    ) -> list[Stretch]:
        prepare = Prepare(
            dtype=self.setting.dtype,
            training=training,
            cuda=self.setting.device.type == "cuda",
            on_module=on_module,
            answer=answer,
            max_calls=max_calls,
        )
        return trace(self.plain if plain else self.family, work=work, prepare=prepare)

    def _traced(self, stretch: Stretch) -> Iterator[Item]:
        """What a stretch allocates; with activation offload the inputs of all blocks but one are on the host."""
        waiting = stretch.per_block if self._offloads else 0
        for tag, count in stretch.bytes.items():
            moved = waiting * (self.num_layers - 1) if tag == ACTIVATIONS else 0
            yield self._item(tag, Place.device, count=count - moved)
        yield self._item(ACTIVATIONS, Place.host, count=waiting * self.num_layers)

    @property
    def _offloads(self) -> bool:
        return self.setting.engine.activation_offload and self.setting.device.type == "cuda"

    def _item(self, part: str, place: Place, *, count: int) -> Item:
        return Item(self.setting.role, part, place, count)


def _device_bytes(items: list[Item]) -> int:
    return sum(item.bytes for item in items if item.place is Place.device)


def _with_cache(stretches: list[Stretch], num_layers: int) -> tuple[Stretch, int]:
    """The highest stretch of generating, and the bytes of the cache, which the first forward calls activations."""
    later = [stretch for stretch in stretches if stretch.where.call == 1]
    cache = max((stretch.bytes.get(CACHE, 0) for stretch in later), default=0)
    highest = max(stretches, key=lambda stretch: stretch.total)
    if highest.where.call == 1:
        return highest, cache
    rest = {tag: max(0, count - (cache if tag == ACTIVATIONS else 0)) for tag, count in highest.bytes.items()}
    return Stretch(highest.where, rest), cache

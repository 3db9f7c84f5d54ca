"""Settings of the data: the files of each stage, and how their rows are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rlhf.config.bounds import NonNegative, Seed, Settings, ShareBelowOne, require
from rlhf.config.stage_configs import inherited


class BadRows(StrEnum):
    """The effect of a row that cannot be used."""

    stop = "stop"
    drop = "drop"


class RewrittenTurns(StrEnum):
    """Treatment of an answer that the chat template renders differently once the conversation continues."""

    skip = "skip"
    as_generated = "as_generated"


@dataclass(kw_only=True)
class StageDataConfig(Settings):
    """The data sets of one stage."""

    train: list[Any] = field(default_factory=list)
    """Paths or hub ids, or mappings with the keys of `SourceConfig`; several are blended."""
    eval: list[Any] = field(default_factory=list)
    """Held-out data; empty takes `eval_fraction` of the training rows away."""
    eval_fraction: ShareBelowOne = 0.05
    """Share of the training rows held out when `eval` is empty."""
    bad_rows: BadRows = BadRows.stop
    """A row that cannot be used (empty, chosen equal to rejected, ...) stops the run, or is dropped."""
    rewritten_turns: RewrittenTurns = RewrittenTurns.skip
    """Earlier answers of demonstrations that the template rewrites, as Qwen3 leaves out their reasoning. They are not
    learnt, or (as_generated) each gives a sequence more, which ends with it: nothing is lost, at their tokens' cost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "eval"):
            sources = getattr(self, name)
            if not isinstance(sources, str):  # a reference to the sources of another stage, which are parsed there
                setattr(self, name, [SourceConfig.parse(source) for source in sources])


_WRITTEN = {"as": "known_as", "config": "name"}
"""Other names of settings of a source: `as` cannot be a name in Python."""


@dataclass(kw_only=True)
class SourceConfig(Settings):
    """One data set: a JSON, JSONL, CSV or Parquet file, a `save_to_disk` folder, a hub id, or a function's rows."""

    path: str
    """File, folder, hub id, or a function that generates rows: `module:function` or `file.py:function`."""
    name: str | None = None
    """Configuration of a hub data set, or of a clone of one; also written `config`."""
    split: str = "train"
    """Split of a folder or hub data set, in full: `train_sft` where that is what it is called; given to a function.
    `train` and `eval` of a known data set are those that DeepSpeed-Chat or TRL use."""
    known_as: str | None = None
    """Written `as`: read as this known data set (`data/known_datasets.yaml`), whatever the path; null does so where the
    path is one's short name or ends with its hub id, and `columns` are not given."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What a function is called with besides `split`; it must return the same rows each time."""
    weight: NonNegative = 1.0
    """Share of its rows that are used: 0.5 takes half of them, 2 takes each twice."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column name -> the data set's, where they differ."""

    @classmethod
    def parse(cls, source: Any) -> SourceConfig:
        """A source written as a path or as a mapping."""
        if isinstance(source, SourceConfig):
            return source
        if isinstance(source, str):
            return cls(path=source)
        require(isinstance(source, dict), f"data source {source}: expected a path, or a mapping with `path`.")
        source = {_WRITTEN.get(name, name): value for name, value in source.items()}
        unknown = set(source) - set(cls.__dataclass_fields__)
        require(
            not unknown, f"data source {source}: unknown {sorted(unknown)}; expected {[*cls.__dataclass_fields__]}."
        )
        require("path" in source, f"data source {source}: `path` is missing.")
        return cls(**source)


@dataclass(kw_only=True)
class DataConfig(Settings):
    """The data of all stages."""

    sft: StageDataConfig = field(default_factory=StageDataConfig)
    """Demonstrations: `messages`, or `prompt` and `completion`, or `text`."""
    reward: StageDataConfig = field(default_factory=StageDataConfig)
    """Preferences: `chosen`, `rejected`, perhaps `prompt` and `margin`."""
    dpo: StageDataConfig = field(default_factory=lambda: inherited(StageDataConfig, "data.reward"))
    """Preferences for DPO: those of `data.reward`, each setting until it is overridden."""
    ppo: StageDataConfig = field(default_factory=StageDataConfig)
    """Prompts: `prompt`."""
    ptx: StageDataConfig = field(default_factory=lambda: StageDataConfig(eval_fraction=0.0))
    """Texts for `ppo.ptx`: `text`, or demonstrations as for sft. All rows are learnt, whatever `stage_split` says."""
    stage_split: list[NonNegative] = field(default_factory=list)
    """DeepSpeed-Chat's split of the same rows between sft, reward (and dpo) and ppo: [2, 4, 4]; empty: all rows."""
    split_seed: Seed = 1234
    """Seed of `stage_split`, of held-out rows and of fractional weights."""
    cache_dir: str | None = None
    """Folder for tokenised data, found again by content; null tokenises every time."""
    gold: dict[str, str] = field(default_factory=dict)
    """Metrics that no model was trained on: name -> `module:function`, called with prompts and responses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for stage, sources in (("reward", self.reward), ("dpo", self.dpo), ("ppo", self.ppo), ("ptx", self.ptx)):
            unused = sources.rewritten_turns is not RewrittenTurns.as_generated
            require(unused, f"data.{stage}.rewritten_turns: only demonstrations have it; set data.sft.rewritten_turns.")
        require(
            not self.ptx.eval and not self.ptx.eval_fraction,
            f"data.ptx.eval={self.ptx.eval}, data.ptx.eval_fraction={self.ptx.eval_fraction}: nothing is evaluated on "
            "it; expected [] and 0.",
        )
        shares = self.stage_split
        require(len(shares) in (0, 3), f"data.stage_split={shares}: expected three numbers (sft, reward, ppo) or none.")
        require(not shares or sum(shares) > 0, f"data.stage_split={shares}: expected a positive sum.")

"""Writes the card of a model, `README.md` in its folder, from the run's own record: a hub shows it, people edit it.

What the record does not hold, such as a licence that nothing states, is said to be unknown.
See also: `model_card.md.jinja`, its text, and `stages/publish.py`, which uploads it with the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data.formats import READABLE, file_type
from data.known_datasets import known_dataset
from data.sources import FUNCTION, HUB_ID, local_path
from data.split_files import card_head
from rlhf.config.data_config import SourceConfig
from rlhf.config.roles import AVERAGE
from rlhf.runtime.atomic_files import read_json, write_text
from rlhf.tracking.alerts import StageChecks
from rlhf.tracking.metric_registry import metric
from rlhf.tracking.provenance import FILE as STARTS
from rlhf.tracking.provenance import version_of
from rlhf.tracking.report.run_folder import FolderReader, read_stage
from rlhf.tracking.text_table import number, printable
from stages.lifecycle.stage_record import StageRecord
from stages.lifecycle.stage_settings import settings_behind

CARD = "README.md"
ADAPTER = "adapter"

_TITLES = {
    "sft": "supervised fine-tuning",
    "reward": "reward modelling on pairs of responses",
    "dpo": "direct preference optimisation",
    "ppo": "PPO",
}
_MAKES = {"model": "init_from", "actor": "actor", "critic": "critic"}
"""The setting of a stage that names what a model was made from, by the model's folder."""
_SHOWN = re.compile(
    r"[a-z]+\.(max_\w+_tokens|epochs|max_steps|iterations|\w*batch_size|rollout_size|samples_per_prompt|(\w+_)?lr|"
    r"(\w*optimizer\.)(lr|lora_lr|betas|weight_decay|max_grad_norm|schedule|warmup_steps|ema_decay)|lora\.\w+|"
    r"engine\.precision|seed|beta|loss|kl\.\w+|advantage|gamma|lam|clip_range\w*|sampling\.\w+|score\.\w+|num_layers)"
)
"""Settings that a reader of a card asks for; `config.json` of the stage has all."""
_PATHS = re.compile(r"(?<![\w.:/])[/~][^\s'\",\]}]+")
"""Absolute paths on a command line, which tell strangers about a machine."""
_UNKNOWN = "unknown"
_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")


class Source(NamedTuple):
    """Something that a model was made from."""

    name: str
    """A hub id, or the end of a path: the rest of it tells strangers about a machine."""
    licence: str
    """As stated where it was read from, or that it is unknown."""
    note: str
    hub_id: str | None


def write_card(model: Path, record: StageRecord) -> None:
    """Write the card of the model in the folder `model` of a stage, and that of its adapters if there are any."""
    write_text(model / CARD, card(model, record))
    if (model / ADAPTER).is_dir():
        write_text(model / ADAPTER / CARD, card(model, record, is_adapter=True))


def card(model: Path, record: StageRecord, *, is_adapter: bool = False) -> str:
    """The text of the card.

    Args:
        model: the folder of the model, below that of its stage.
        record: of the stage, with the metrics of this model.
        is_adapter: whether it is for the adapters alone, without the model that they change.
    """
    stage = model.parent.parent if model.parent.name == "best" else model.parent
    settings = settings_behind(str(model))
    name = model.name.removesuffix(AVERAGE)
    base, trail = _lineage(settings, role=name)
    sources = _data(settings)
    reader = FolderReader(stage.parent)
    starts = reader.rows(STARTS, required=False, steps=False)
    head_kind = str(read_json(model / "config.json").get("architectures"))
    kind = "causal_lm" if "CausalLM" in head_kind else "critic" if name == "critic" else "reward"
    head = ModelCardData(
        base_model=base.hub_id,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation" if kind == "causal_lm" else "text-classification",
        tags=["rlhf", record.stage, *(["lora"] if record.merged else [])],
        datasets=list(dict.fromkeys(source.hub_id for source in sources if source.hub_id)) or None,
        license=base.licence if re.fullmatch(r"(?!unknown)[a-z0-9.-]+", base.licence) else None,
    )
    text: str = _template().render(
        head=head.to_yaml(),
        title=f"{stage.parent.name}/{stage.name}/{name}",
        made_by=_TITLES.get(record.stage, f"PPO's variant {record.stage}"),
        kind=kind,
        is_adapter=is_adapter,
        is_average=model.name.endswith(AVERAGE),
        is_best=model.parent.name == "best",
        has_template=(model / "chat_template.jinja").is_file(),
        base=base,
        trail=trail,
        sources=sources,
        rewards=[
            _named(str(value)) for key, value in settings.items() if re.fullmatch(r".*\.rewards\.\d+\.source", key)
        ],
        record=record,
        results=_results(record),
        settings={key: value for key, value in settings.items() if _SHOWN.fullmatch(key) and value is not None},
        findings=_findings(reader, stage.name) if (stage / "metrics.jsonl").is_file() else [],
        start=starts[-1] if starts else {},
        command=_PATHS.sub(lambda found: f".../{Path(found[0]).name}", starts[-1]["command"]) if starts else "",
        version=version_of("rlhf-pipeline"),
    )
    return text


def _template() -> Any:
    environment = Environment(  # no HTML: the text is Markdown, and `cell` keeps a table's cells in their places
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": lambda value: printable(str(value)).replace("|", "\\|"), "number": number}
    return environment.get_template("model_card.md.jinja")


# ---- what the model was made from


def _lineage(settings: Mapping[str, Any], *, role: str) -> tuple[Source, list[str]]:
    """The pretrained model at the beginning, and the stages of this run between it and the model, oldest first."""
    trail: list[str] = []
    while True:
        stage = next((key.partition(".")[0] for key in settings if key.endswith(".engine.precision")), "")
        path = settings.get(f"{stage}.{_MAKES.get(role)}")
        if path is None and role == "critic":  # it starts from the reward model, or from the actor
            path = settings.get("ppo.reward") or settings.get("ppo.actor")
        if path is None:
            return Source(_UNKNOWN, _UNKNOWN, "", None), trail
        earlier = Path(str(path))
        role = earlier.name.removesuffix(AVERAGE)
        before = settings_behind(str(path))
        if not before or role not in _MAKES:
            return _source(str(path), note=_note(settings, str(path))), trail
        settings = before
        trail.insert(0, (earlier.parent.parent if earlier.parent.name == "best" else earlier.parent).name)


def _note(settings: Mapping[str, Any], path: str) -> str:
    embedded = settings.get("model.embedded")
    return (
        f"made by this project (`model.embedded={embedded}`)" if embedded and path == settings.get("model.path") else ""
    )


def _data(settings: Mapping[str, Any]) -> list[Source]:
    """The data sets that the stage was trained on, with their shares; held-out sets have none."""
    found = []
    for key, value in settings.items():
        if match := re.fullmatch(r"(data\.\w+\.(train|eval)\.\d+)\.path", key):
            split, weight = settings.get(f"{match[1]}.split"), settings.get(f"{match[1]}.weight", 1.0)
            use = "training" if match[2] == "train" else "held out"
            share = f", weight {number(weight)}" if match[2] == "train" and weight != 1 else ""
            config = SourceConfig(path=str(value), known_as=settings.get(f"{match[1]}.known_as"))
            known = known_dataset(config)
            source = _source(str(value), note=f"split {split}, {use}{share}", kind="datasets/")
            if known is not None and source.hub_id is None:  # a known name, or a copy of what it names
                is_unknown = source.licence.startswith(_UNKNOWN)
                licence = f"see huggingface.co/datasets/{known.hub}" if is_unknown else source.licence
                source = Source(source.name, licence, f"{source.note}, read as {known.hub}", known.hub)
            found.append(source)
    return found


def _source(path: str, *, note: str, kind: str = "") -> Source:
    """A model, or with `kind` as in the addresses of a hub a data set."""
    return Source(_named(path), _licence(path, kind=kind), note, _hub_id(path))


def _named(path: str) -> str:
    """A hub id, a function, or the last two parts of a path."""
    if _hub_id(path) or FUNCTION.fullmatch(path):
        return path.rpartition("/")[2] if FUNCTION.fullmatch(path) else path
    return "/".join(Path(path).parts[-2:])


def _hub_id(path: str) -> str | None:
    is_file = file_type(Path(path)) in READABLE or Path(path).exists()
    return path if HUB_ID.fullmatch(path) and not is_file else None


def _licence(path: str, *, kind: str) -> str:
    """The licence in the head of a README.md, else the licence files in the folder, else that there is none."""
    try:
        place = None if FUNCTION.fullmatch(path) else local_path(path)
    except ValueError:  # it has been moved since, or is a known name
        place = None
    if place is None:
        return f"see huggingface.co/{kind}{path}" if _hub_id(path) else _UNKNOWN
    folder = place if place.is_dir() else place.parent
    try:
        stated = card_head(folder).get("license")
    except (ValueError, OSError):  # its head is broken: what it says is not known
        stated = None
    if stated:
        return str(stated)
    files = sorted({file.name for pattern in _LICENCE_FILES for file in folder.glob(pattern)})
    return f"see {', '.join(files)} beside it" if files else f"{_UNKNOWN}: nothing there states it"


# ---- what became of it


def _results(record: StageRecord) -> list[dict[str, Any]]:
    names = [*record.before, *(name for name in record.after if name not in record.before)]
    return [
        {
            "name": name,
            "meaning": metric(name).meaning,
            "unit": metric(name).unit,
            "before": number(record.before[name]) if name in record.before else "",
            "after": number(record.after[name]) if name in record.after else "",
        }
        for name in names
    ]


def _findings(reader: FolderReader, stage: str) -> list[str]:
    """What the checks of the run's report found wrong."""
    read = read_stage(reader, stage)
    checks = StageChecks(stage, read.rows, samples=read.samples, total_steps=read.total_steps)
    return [found.text for found in checks.results.values() if found.is_wrong]

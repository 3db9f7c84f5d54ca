"""The commands of docs/launching.md: what can run here runs as printed, and all others are ones that would be read."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from rlhf.runtime.deepspeed_flags import has_flags, read_flags
from stages.setup.command_line import check_overrides
from tests.forking import make_programs, run_forked

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/launching.md").read_text()
SMALL = "tracking.report=false sft.max_steps=1 data.cache_dir=../tokens"


def lines(blocks):
    return [line.strip() for line in "\n".join(blocks).replace("\\\n", " ").splitlines() if line.strip()]


RUN = lines(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
INDENTED = lines(re.findall(r"^ {4}(.*\n(?: {4}.*\n)*)", PAGE, re.MULTILINE))
RECIPES = re.findall(r"^\| [^|]*(?:card|node)[^|]* \| `(.*?)` \| ([\d.]+) \|", PAGE, re.MULTILINE)
SHAPE = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
SHOWN = [line for line in INDENTED if "rlhf-pipeline" in line or "run_pipeline" in line]


def test_the_page_is_short():
    assert len(PAGE.splitlines()) <= 120
    assert len(RUN) >= 4
    assert len(SHOWN) >= 4
    assert len(RECIPES) >= 6


@pytest.mark.parametrize("command", RUN)
def test_commands_run_as_they_are_printed(command, tmp_path):
    programs = {"rlhf-pipeline": "-m run_pipeline", "torchrun": "-m torch.distributed.run"}
    make_programs(tmp_path / "bin", **programs)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"{command} {SMALL}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs" / re.search(r"name=(\w+)", command)[1] / "sft/model").is_dir()


@pytest.mark.parametrize("command", [*SHOWN, *(f"rlhf-pipeline experiment=custom {words}" for words, _ in RECIPES)])
def test_commands_for_other_machines_would_be_read(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    Path("hosts").write_text("worker-0 slots=8\nworker-1 slots=8\n")
    words = shlex.split(command)
    if words[0] == "torchrun":
        read = get_args_parser().parse_args(words[1:])
        assert (read.module, read.training_script) == (True, "run_pipeline")
        words = read.training_script_args
    else:
        words = words[words.index("rlhf-pipeline") + 1 :]
    words = read_flags(words).words if has_flags(words) else words
    check_overrides(words)  # raises for what it does not know


def test_the_plan_of_the_first_recipe_has_the_number_of_the_page(tmp_path):
    words, gigabytes = RECIPES[0]
    model = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": 152_064}
    model |= SHAPE | {"num_key_value_heads": 4, "max_position_embeddings": 4096}
    (tmp_path / "7B").mkdir()
    (tmp_path / "7B/config.json").write_text(json.dumps(model))
    given = "plan=true experiment=custom engine.activation_checkpointing=true engine.device=cuda memory.device_gb=24"
    done = run_forked("run_pipeline.py", *given.split(), *words.split(), "memory.disk_gb=4000", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"largest phase is \w+ with ([\d.]+) GB of device; it fits", done.stdout + done.stderr)
    assert float(found[1]) == pytest.approx(float(gigabytes), abs=0.06)

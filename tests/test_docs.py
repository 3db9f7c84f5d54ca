"""The commands of the pages in docs/ do what they say, as they are printed and one after another in one checkout."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from examples import verifier
from rlhf.reward_functions import _GIVEN as GIVEN
from tests.stages.hub_server import serving
from tests.stages.test_pipeline import rows
from tests.test_readme import checkout, commands  # noqa: F401 - the first is a fixture

ROOT = Path(__file__).parents[1]
INSTALLING_HERE = ("python3 -m venv .venv", ". .venv/bin/activate", "pip install -e .")
PAGE = (ROOT / "docs/rewards.md").read_text()
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in ("rewards", "publishing", "quickstart")
    for number, block in enumerate(re.findall(r"```bash\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL))
]


def test_the_page_is_short():
    assert len(PAGE.splitlines()) <= 120


def test_the_function_shown_is_that_of_the_example():
    space = dict(vars(verifier))
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], space)  # noqa: S102 - of our own page
    replies, answers = ["4", "so\n4.0", "5", "5"], ["4", 4, "4", None]
    assert space["correct"](replies, answers) == verifier.correct(replies, answers) == [True, True, False, None]


def test_the_page_names_whatever_a_function_is_given():
    table = PAGE.split("| It is given |")[1].split("\n\n")[0]
    assert {name for name in GIVEN if f"`{name}" in table} == {*GIVEN} - {"log_extra"}
    assert "`log_extra`" in PAGE


@pytest.fixture(scope="module")
def hub():
    with serving() as hub:
        yield hub


@pytest.mark.parametrize("block", BLOCKS)
def test_commands_work_one_after_another(block, checkout, hub):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]  # the usual one may be taken here
    tested = {*commands(), *INSTALLING_HERE}  # the README's are run with it
    block = "\n".join(line for line in block.splitlines() if line not in tested)
    text = block.replace("reward/model &", f"reward/model --port {port} &")
    # The README's show reports.
    without = f" tracking.report=false tracking.wandb=disabled data.cache_dir={checkout}/tokens"
    text = re.sub(r"experiment=(smoke|custom)", rf"\g<0>{without}", text)
    text = f"trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{text}"  # or a failure would leave the server behind
    published = "--to" in block  # where the hub is, its library reads when it is imported: python is started
    programs = Path(sys.executable).parent if published else checkout / ".venv/bin"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{programs}:{os.environ['PATH']}"}
    environment |= {"REWARD_URL": f"http://127.0.0.1:{port}/score"}
    if published:
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_good", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen(
        ["bash", "-ec", text],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=500)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output


def test_they_leave_what_the_page_says(checkout):  # noqa: F811
    last = {name: rows(checkout / f"outputs/{name}/grpo/metrics.jsonl")[-1] for name in ("sums", "two", "served")}
    assert {"reward/correct", "reward/formatted/none", "eval/reward/formatted", "eval/raw_score"} <= last["sums"].keys()
    assert {"reward/short/std", "reward/log/longest", "objective/raw_scores"} <= last["two"].keys()
    assert "reward/served" in last["served"]
    assert not {"objective/raw_scores", "eval/raw_score"} & last["served"].keys()
    results = json.loads((checkout / "outputs/sums/eval/results.json").read_text())
    assert {"reward/correct", "reward/formatted"} <= {row["name"] for row in results["measures"]}


def test_a_published_model_is_on_the_hub(hub):
    assert {"model.safetensors", "adapter_model.safetensors", "README.md"} <= hub.files.keys()

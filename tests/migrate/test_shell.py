"""Commands are found in shell scripts as a shell would start them, and nothing is run."""

import subprocess

import pytest

from rlhf.migrate import shell
from rlhf.migrate.shell import commands

SCRIPT = r"""#!/bin/bash
# Trains; don't run it twice
OUT=$1
STAGE=$2   # of ZeRO
NAME="the model"
if [ "$OUT" == "" ]; then
    OUT=./out
fi
if [ -z "$STAGE" ]; then STAGE=2; fi
if [ "$3" == true ]; then
    LORA="--lora_dim 8 --only_optimize_lora"
elif [ "$3" != "" ]; then
    LORA="--lora_dim $3"
else
    LORA=""
fi
mkdir -p $OUT
Lr=9e-6
CUDA_VISIBLE_DEVICES=0 deepspeed --num_gpus 1 main.py --zero_stage $STAGE \
   --model "$NAME" --quote 'a $b # c' ${LORA} \
   --rate ${Lr} --seed ${SEED:-7} \
   --output_dir $OUT/x &> $OUT/training.log
cmd="deepspeed main.py \
    --rate ${Lr} \
    $LORA"
echo "$cmd"
$cmd > log 2>&1
"""


@pytest.mark.parametrize("arguments", [[], ["o", "3"], ["", "", "true"], ["o", "", "16"]])
def test_a_script_starts_what_bash_would_start(tmp_path, arguments):
    """Compared with bash itself, in which `deepspeed` is a function that prints its words."""
    told = tmp_path / "told.sh"
    shown = 'mkdir() { :; }; echo() { :; }; deepspeed() { printf "%s\\n" deepspeed "$@" END >> told; }\n'
    script = SCRIPT.replace("&> $OUT/training.log", "").replace("> log 2>&1", "")
    told.write_text(shown + script)
    subprocess.run(["bash", str(told), *arguments], cwd=tmp_path, check=True)
    theirs = [part.split("\n")[:-1] for part in (tmp_path / "told").read_text().split("END\n")[:-1]]
    assert len(theirs) == 2
    assert commands(SCRIPT, arguments) == theirs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trl sft --a b", ["trl", "sft", "--a", "b"]),
        ("/usr/bin/python3 x.py --a=b > log", ["/usr/bin/python3", "x.py", "--a=b"]),
        ("export A=1 B=two\ntrl sft --a $A$B", ["trl", "sft", "--a", "1two"]),
        ("accelerate launch x.py \\\n\n--lost", ["accelerate", "launch", "x.py"]),
        ("if [[ -n $A ]]; then\n trl sft\nelse\n trl dpo\nfi", ["trl", "dpo"]),
        ("if [ 1 -eq 2 ]\nthen trl sft\nelse trl dpo\nfi", ["trl", "dpo"]),
        ("cd x && A=2 python a.py 'b && c; d' >log || exit", ["python", "a.py", "b && c; d"]),
        ("if [ -z $A ]; then B=1; trl sft $B; fi", ["trl", "sft", "1"]),
        ("A=$(nproc)\ntrl sft --n 1", ["trl", "sft", "--n", "1"]),
    ],
)
def test_other_ways_to_write_a_command(text, words):
    assert commands(text) == [words]


ARGUMENTS = """set -euo pipefail
export PATH=/opt/cuda/bin:$PATH
while [[ $# -gt 0 ]]; do
  case $1 in
    --model) MODEL=$2; shift ;;
    *) EXTRA+=" $1" ;;
  esac
  shift
done
train() {
  local lr=$1
  deepspeed main.py --model "$MODEL" --lr "$lr" $EXTRA > /tmp/$lr.log 2>&1
}
for lr in 1e-3 1e-4; do train $lr || exit 1; done
"""


def test_loops_functions_and_options_are_those_of_bash():
    found = commands(ARGUMENTS, ["--model", "the model", "--bf16"])
    words = ["deepspeed", "main.py", "--model", "the model", "--lr"]
    assert found[0] == [*words, "1e-3", "--bf16"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("for i in 1 2\ndo\n trl sft --n $i\ndone", [["trl", "sft", "--n", "1"], ["trl", "sft", "--n", "2"]]),
        ("srun --nodes=2 env A=1 accelerate launch x.py &\nwait", [["accelerate", "launch", "x.py"]]),
        ("cmd='trl sft --a \"b c\"'\necho $cmd\neval $cmd", [["trl", "sft", "--a", "b c"]]),
        ('trl sft --n $(nproc) --a "it\'s"', [["trl", "sft", "--n", "$(nproc)", "--a", "it's"]]),
        ("trl sft --kwargs '{\n\"a\": 1}'", [["trl", "sft", "--kwargs", '{\n"a": 1}']]),
        (
            "$ trl sft --a b\n!python x.py\n%accelerate launch y.py",
            [["trl", "sft", "--a", "b"], ["python", "x.py"], ["accelerate", "launch", "y.py"]],
        ),
        (
            "trl sft --output_dir out/$(date +%Y -u)\r\ntrl dpo\r\n",
            [["trl", "sft", "--output_dir", "out/$(date_+%Y_-u)"], ["trl", "dpo"]],
        ),
        ("for i in $(seq 2) $(seq 7 8); do trl sft --n $i; done", [["trl", "sft", "--n", n] for n in "1278"]),
        ("N=$(python count.py)\ntrl dpo", [["trl", "dpo"]]),
        (
            "trap 'kill 0' EXIT\ncd nowhere && python a.py; kill 0; python b.py",
            [["python", "a.py"], ["python", "b.py"]],
        ),
    ],
)
def test_what_a_script_may_do(text, words):
    assert commands(text) == words


def test_scripts_that_a_script_starts_are_followed(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/one.sh").write_text("deepspeed main.py --zero_stage $1\n")
    sweep = tmp_path / "sweep/all.sh"
    sweep.write_text('for z in 2 3; do cmd="bash sweep/one.sh $z"; $cmd; pkill -9 python; sleep 60; done\n')
    found = commands(f"bash {sweep}")
    assert commands(sweep.read_text(), file=sweep) == found
    assert [words[-1] for words in found] == ["2", "3"]


def test_nothing_is_started_or_written(tmp_path):
    file, kept = tmp_path / "file", tmp_path / "kept"
    kept.write_text("kept")
    commands(f"/bin/touch {file}; touch {file}; echo a > {file}; {{ trl sft; }} > {file}")
    commands(f"/bin/rm {kept}; exec /bin/rm {kept}")
    commands(f"trl sft --a b &> {kept}; echo >| {kept}; python - > {kept}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "kept"


def test_a_script_that_does_not_end_or_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(shell, "SECONDS", 0.5)
    with pytest.raises(ValueError, match="does not end by itself"):
        commands("while true; do sleep 1; done")
    with pytest.raises(ValueError, match="bash does not understand the command: unexpected EOF"):
        commands("trl sft --a 'b")
    with pytest.raises(ValueError, match="bash does not understand `trl sft <data>': syntax error"):
        commands("cd a\ntrl sft <data>")


def test_a_script_without_a_training_has_no_commands():
    assert commands("echo trl\nls -l # trl sft\n") == []


@pytest.mark.parametrize("kill", ["kill", "builtin kill", "command kill", "enable kill; kill"])
def test_a_script_signals_nobody(kill):
    with subprocess.Popen(["/bin/sleep", "60"]) as bystander:
        try:
            found = commands(f"{kill} -KILL {bystander.pid}; deepspeed main.py")
            assert bystander.poll() is None
        finally:
            bystander.kill()
    assert found == [["deepspeed", "main.py"]]


@pytest.mark.parametrize("history", ["history", "builtin history", "enable history; history"])
def test_a_script_writes_no_file(history, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = f"history -s text; {history} -w written\necho text > written\ndeepspeed main.py"
    assert commands(script) == [["deepspeed", "main.py"]]
    assert not [*tmp_path.iterdir()]

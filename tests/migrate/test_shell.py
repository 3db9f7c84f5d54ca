"""Commands are found in shell scripts as a shell would start them, and nothing is run."""

import subprocess

import pytest

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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("for i in 1 2\ndo\n trl sft\ndone", "line 1: 'for i in 1 2' is not followed"),
        ("A=1\nrun() {\n trl sft\n}", "line 2: 'run()"),
        ("if [ -z $A ] && [ -z $B ]; then\n trl sft\nfi", "is not followed"),
        ("if test -f x; then\n trl sft\nfi", "the condition 'if test -f x' is not followed"),
    ],
)
def test_what_is_not_followed_is_said(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        commands(text)


def test_a_script_without_a_training_has_no_commands():
    assert commands("echo trl\nls -l # trl sft\n") == []

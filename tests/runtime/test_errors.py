"""How a run ends that cannot go on."""

import errno
import json

import pytest

from rlhf.config.bounds import divisible
from rlhf.runtime.dist import World
from rlhf.runtime.errors import RunError, sentence_of
from rlhf.runtime.launch import local_ranks
from stages import pipeline
from tests.config.test_configuration import composed


def by_us():
    divisible(5, by=2, names="size")


def by_python():
    list(zip([1], [], strict=True))


def by_a_library():
    json.loads("{")


def by_the_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def by_a_file():
    open("/no/such/file")  # noqa: PTH123, SIM115


def by_the_run():
    raise RunError("gradients are never finite")


def by_python_in_our_sources():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "two")
        local_ranks(1)  # it asks int(), which raises


def raised_by(function):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of any kind
        function()
    return caught.value


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (by_us, "size: 5 is not a multiple of 2; use 4 or 6."),
        (by_the_run, "gradients are never finite"),
        (by_the_disk, "a file: No space left on device. Make room there and start the same command again."),
        (by_a_file, "/no/such/file: No such file or directory."),
        (by_python, None),
        (by_python_in_our_sources, None),
        (by_a_library, None),
    ],
)
def test_what_is_for_the_user_is_told_from_mistakes_in_the_program(function, sentence):
    assert sentence_of(raised_by(function)) == sentence


@pytest.mark.parametrize(
    ("function", "sentence"),
    [(by_us, "size: 5 is not a multiple of 2; use 4 or 6."), (by_the_disk, "No space left"), (by_python, None)],
)
def test_a_stage_ends_in_one_sentence_and_its_traceback_is_kept(monkeypatch, tmp_path, function, sentence):
    monkeypatch.setattr(pipeline, "stage_function", lambda stage: lambda *_: function())
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    run = composed("experiment=smoke", "tracking.report=false", f"output_dir={tmp_path}")
    with pytest.raises(SystemExit if sentence else ValueError) as ended:
        pipeline.run_stages(run, ["sft"], world=World.alone())
    kept = tmp_path / "traceback.txt"
    assert kept.exists() == (sentence is not None)
    if sentence:
        assert str(ended.value).startswith("error: ")
        assert sentence in str(ended.value)
        assert str(kept) in str(ended.value)
        assert f"in {function.__name__}" in kept.read_text()


def test_a_full_disk_keeps_the_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "stage_function", lambda stage: lambda *_: by_the_disk())
    (tmp_path / "traceback.txt").mkdir()  # it cannot be written either
    with pytest.raises(SystemExit, match=r"error: a file: No space left on device\. .* again\.$"):
        pipeline.run_stages(composed("experiment=smoke", f"output_dir={tmp_path}"), ["sft"], world=World.alone())


def test_the_whole_traceback_can_be_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "stage_function", lambda stage: lambda *_: by_us())
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="size: 5"):
        pipeline.run_stages(composed("experiment=smoke", f"output_dir={tmp_path}"), ["sft"], world=World.alone())

"""What a finished stage leaves is checked before it is used, and skipped only when it is whole."""

import shutil

import pytest

from stages.lifecycle.stage_record import (
    CONFIG,
    RECORD,
    StageRecord,
    check_folder,
    check_seal,
    claim_folder,
    model_files,
    read_record,
    write_record,
)
from tests.config.test_configuration import composed

RECORDED = StageRecord(
    stage="sft", template="t", pad_id=0, score_mean=0.5, before={"a": float("nan")}, after={"a": 0.1 + 0.2}
)


@pytest.fixture
def run(tmp_path):
    """A run whose first stage is finished, as `Session.finish` leaves it."""
    made = composed("experiment=smoke", f"output_dir={tmp_path}")
    folder, model = tmp_path / "sft", tmp_path / "sft/model"
    claim_folder(made, "sft")
    (model / "adapter").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "adapter/adapter_config.json", "README.md"):
        (model / name).write_text(f"what is in {name}")
    write_record(RECORDED, model, files=model_files(model))
    write_record(RECORDED, folder, files=[folder / CONFIG, model / RECORD])
    return made


def test_a_record_comes_back_as_it_was(run, tmp_path):
    found = read_record(tmp_path / "sft/model")
    assert {**vars(found), "files": {}, "before": {}} == {**vars(RECORDED), "before": {}}
    assert sorted(found.files) == ["adapter/adapter_config.json", "config.json", "model.safetensors"]
    check_folder(run, "sft")


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize(
    "name", ["config.json", "model/stage.json", "model/model.safetensors", "model/adapter/adapter_config.json"]
)
def test_a_finished_stage_that_is_not_what_was_written_is_not_skipped(run, tmp_path, name, damage):
    damage(tmp_path / "sft" / name)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/sft/{name} (is|has) .* remove {tmp_path}/sft to make it again"):
        check_folder(run, "sft")


def test_models_that_nobody_reads_any_more_may_be_deleted(run, tmp_path, caplog):
    (tmp_path / "sft/model/model.safetensors").unlink()
    check_folder(run, "sft")
    assert f"{tmp_path}/sft/model/model.safetensors: deleted since the stage finished" in caplog.text
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        check_seal(tmp_path / "sft/model")


@pytest.mark.parametrize("damage", [flip, cut, lambda file: file.write_text("[]"), lambda file: file.write_text("")])
def test_a_damaged_record_is_named(run, tmp_path, damage):
    damage(tmp_path / "sft/stage.json")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/sft/stage\.json is .*remove {tmp_path}/sft"):
        check_folder(run, "sft")


def test_a_number_of_a_record_cannot_be_changed_unnoticed(run, tmp_path):
    file = tmp_path / "sft/model/stage.json"
    file.write_text(file.read_text().replace('"score_mean": 0.5', '"score_mean": 0.7'))
    with pytest.raises(ValueError, match="stage.json is damaged: its content is not what was written"):
        read_record(file.parent)


def test_a_file_of_that_name_that_is_no_record_is_named(tmp_path):
    (tmp_path / "stage.json").write_text('{"act": 1}')
    with pytest.raises(ValueError, match=r"is no record of a stage: found \['act'\]"):
        read_record(tmp_path)


def test_results_without_their_settings_are_refused(run, tmp_path):
    for name in (RECORD, CONFIG):
        (tmp_path / "sft" / name).unlink()
    check_folder(run, "sft")  # nothing is known to be there
    (tmp_path / "sft/checkpoints/step-000002").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{tmp_path}/sft/config\.json is missing.*remove {tmp_path}/sft"):
        check_folder(run, "sft")
    (tmp_path / "sft/config.json").write_text('{"sft.')
    with pytest.raises(ValueError, match=rf"{tmp_path}/sft/config\.json is damaged.*remove {tmp_path}/sft"):
        check_folder(run, "sft")


def test_a_finished_stage_may_be_moved(run, tmp_path):
    shutil.move(tmp_path / "sft", tmp_path / "there/sft")
    check_seal(tmp_path / "there/sft")

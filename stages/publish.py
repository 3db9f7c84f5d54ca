"""Uploads a trained model to a hub, and only when it is called: nothing else in this project ever does.

    python -m stages.publish outputs/RUN/ppo/actor                       what would be uploaded
    python -m stages.publish outputs/RUN/ppo/actor --to OWNER/NAME       uploads it; `hf auth login` comes first
    python -m stages.publish outputs/RUN/sft/model --adapter --base OWNER/BASE --to OWNER/NAME

A folder is uploaded as it is, with the card (`README.md`) that the stage has written and that may be edited before.
With `--adapter` it is the adapters alone, for users of PEFT who have the base model. HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from rlhf.runtime.atomic_files import read_json
from stages.lifecycle.model_card import ADAPTER, CARD, write_card
from stages.lifecycle.stage_record import check_seal, read_record
from stages.setup.command_line import one_sentence

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.*", "merges.txt")
_ADAPTER_CONFIG = "adapter_config.json"


def main(words: Sequence[str]) -> None:
    """Check the model, and upload it if `--to` is given."""
    parser = argparse.ArgumentParser(prog="python -m stages.publish", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a model, such as outputs/RUN/ppo/actor")
    parser.add_argument(
        "--to", metavar="OWNER/NAME", help="repository, made if it is not there; without it, nothing is uploaded"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--adapter", action="store_true", help="the adapters alone")
    parser.add_argument("--base", metavar="ID", help="hub id of the model that the adapters change")
    parser.add_argument("--message", default="Upload the model", help="of the commit")
    asked = parser.parse_args(words)
    with one_sentence(), tempfile.TemporaryDirectory() as scratch:
        check_model(asked.model)
        folder = adapter_folder(asked.model, Path(scratch), base=asked.base) if asked.adapter else asked.model
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            sys.stdout.write(f"{path.stat().st_size:>14,}  {path.relative_to(folder)}\n")
        if asked.to is None:
            sys.stdout.write(
                f"Nothing was uploaded: `--to OWNER/NAME` does. Read and edit {asked.model / CARD} first.\n"
            )
            return
        sys.stdout.write(f"{upload(folder, asked.to, private=asked.private, message=asked.message)}\n")


def check_model(model: Path) -> None:
    """Check that the folder holds a model of a finished stage, as it was written, and write its card if it has none.

    Raises:
        ValueError: it does not.
    """
    record = read_record(model)
    if record is None or not [*model.glob("model*.safetensors")]:
        raise ValueError(
            f"{model}: expected the folder of a model that a finished stage has written, such as outputs/RUN/ppo/actor "
            "or outputs/RUN/sft/model; found none there."
        )
    check_seal(model)
    if not (model / CARD).is_file():
        write_card(model, record)


def adapter_folder(model: Path, scratch: Path, *, base: str | None) -> Path:
    """A folder with the adapters, their card and the tokenizer; the base model has a name there that others can load.

    Raises:
        ValueError: there are no adapters, or `base` is missing and the model that they change has no hub id.
    """
    if not (model / ADAPTER / _ADAPTER_CONFIG).is_file():
        raise ValueError(f"{model}: has no adapter/; expected a model that was trained with lora.rank above 0.")
    config = read_json(model / ADAPTER / _ADAPTER_CONFIG)
    found = str(config.get("base_model_name_or_path"))
    if base is None and (Path(found).is_absolute() or Path(found).exists() or found.count("/") != 1):
        raise ValueError(
            f"{model}: its adapters change {found}, a folder of this machine. Publish that model first, and name it "
            "here with --base OWNER/NAME; or upload the merged model, without --adapter."
        )
    folder = scratch / ADAPTER
    shutil.copytree(model / ADAPTER, folder)
    for pattern in _TOKENIZER:
        for file in model.glob(pattern):
            shutil.copy2(file, folder)
    if base is not None:
        config["base_model_name_or_path"] = base
        (folder / _ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        text = (folder / CARD).read_text(encoding="utf-8").replace('BASE = "MODEL"', f'BASE = "{base}"')
        (folder / CARD).write_text(text, encoding="utf-8")
    return folder


def upload(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload all files of `folder` as one commit; returns its address.

    Raises:
        ValueError: the name cannot be one, nobody is logged in, or the hub has refused.
    """
    try:
        hub = HfApi()
        hub.whoami()  # before gigabytes are read
        hub.create_repo(repository, private=private or None, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message))
    except HFValidationError as error:
        raise ValueError(f"--to {repository}: {error}") from error
    except LocalTokenNotFoundError as error:
        raise ValueError("Nobody is logged in to the hub. Run `hf auth login`, or set HF_TOKEN.") from error
    except OfflineModeIsEnabled as error:
        raise ValueError("HF_HUB_OFFLINE forbids it: unset it to publish.") from error
    except Exception as error:
        # The hub's library passes on what its HTTP library raises, which has had several names.
        is_transport = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
        if not (is_transport or isinstance(error, HfHubHTTPError | OSError)):
            raise
        raise ValueError(f"--to {repository}: the hub did not take it ({error}).") from error


if __name__ == "__main__":
    main(sys.argv[1:])

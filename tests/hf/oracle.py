"""Fills `"auto"` with Transformers' own code, in a process in which a package called deepspeed seems to be installed.

`python oracle.py STUB CASES` writes, for each case `[configuration, training arguments, width, steps]`, what
Transformers makes of it: the filled configuration, or the text of its error.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace


def main(stub, cases):
    folder = Path(stub)
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "deepspeed/__init__.py").write_text("")
    (folder / "deepspeed-0.19.6.dist-info").mkdir()
    (folder / "deepspeed-0.19.6.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.6\n"
    )
    sys.path.insert(0, str(folder))
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    found = []
    for content, options, width, steps in json.loads(Path(cases).read_text()):
        args = TrainingArguments(output_dir=f"{stub}/out", use_cpu=True, report_to="none", **options)
        try:
            config = HfTrainerDeepSpeedConfig(content)
            config.trainer_config_process(args)
            stage = config.get_value("zero_optimization.stage")
            if stage == "auto":  # Accelerate's part, which comes in between
                config.config["zero_optimization"]["stage"] = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
                config.set_stage_and_offload()
            model = SimpleNamespace(config=SimpleNamespace(**({} if width is None else {"hidden_size": width})))
            config.trainer_config_finalize(args, model, steps)
            found.append(config.config)
        except ValueError as error:
            found.append(str(error))
    Path(cases).with_suffix(".found").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

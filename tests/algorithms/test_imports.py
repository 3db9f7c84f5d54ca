import subprocess
import sys
from pathlib import Path

import rlhf.algorithms

FOLDER = Path(rlhf.algorithms.__file__).parent
OTHER_LIBRARIES = ("transformers", "hydra", "omegaconf", "wandb", "peft", "accelerate", "datasets", "safetensors")


def test_the_algorithms_need_torch_alone():
    modules = sorted(f"rlhf.algorithms.{path.stem}" for path in FOLDER.glob("*.py") if path.stem != "__init__")
    assert "rlhf.algorithms.ppo" in modules
    program = f"import sys, {', '.join(modules)}; print(*[name for name in {OTHER_LIBRARIES} if name in sys.modules])"
    root = FOLDER.parent.parent
    found = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True)
    assert found.stdout.split() == []

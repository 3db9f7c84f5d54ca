"""The type of the working weights."""

import platform
from pathlib import Path

import pytest
import torch

from rlhf.config.engine_config import Precision
from rlhf.engine.working_dtype import working_dtype

CPU = torch.device("cpu")


def test_what_is_asked_for_is_used():
    assert working_dtype(Precision.fp32, CPU) == torch.float32
    assert working_dtype(Precision.bf16, CPU) == torch.bfloat16


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_auto_takes_bf16_where_the_processor_says_it_multiplies_it():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = torch.bfloat16 if flags & {"avx512_bf16", "amx_tile"} else torch.float32
    assert working_dtype(Precision.auto, CPU) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_cuda_follows_the_compute_capability():
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    assert working_dtype(Precision.auto, torch.device("cuda")) == expected

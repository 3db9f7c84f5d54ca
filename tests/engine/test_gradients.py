"""What is collected of each parameter's gradient."""

import torch

from rlhf.dist import World
from tests.engine import tiny
from tests.engine.scenarios import first_gradient


def test_parameters_that_fsdp_leaves_alone_have_gradients_of_their_own_also_in_bf16(tmp_path):
    """On one rank, weights on disk are wrapped by FSDP2, and small ones are not."""
    found = {}
    for name, settings in {
        "device": {},
        "disk": {"parameter_tier": "nvme", "nvme_path": str(tmp_path), "persistence_threshold": 100},
    }.items():
        engine = tiny.engine(World.alone(), 3, precision="bf16", **settings)
        tiny.train_step(engine, 0)
        found[name] = first_gradient(engine)
        engine.close()
    assert all(torch.equal(gradient, found["disk"][name]) for name, gradient in found["device"].items())

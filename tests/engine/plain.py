"""What the engine must agree with: one process, `torch.optim.AdamW`, `clip_grad_norm_`, the whole batch at once."""

import torch

from tests.engine import tiny


def learning_rate(step, lr=3e-3):
    """Two steps of warm-up, then a line that would reach 0 after ten."""
    return lr * ((step + 1) / 2 if step < 2 else 1 - (step - 2) / 8)


def adamw(model, **settings):
    """Weight decay on matrices only."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in learning if parameter.ndim >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in learning if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, **settings)


def train(model, steps, *, rate=learning_rate, batch=tiny.batch):
    """Loss and gradient norm of each step, at `rate(step)` on `batch(step)`."""
    optimizer = adamw(model)
    curve = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        ids, counts = batch(step)
        loss = tiny.token_loss(model(ids), ids, counts, counts.sum())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve


def gradient(model, step):
    """Of the whole batch, by name; None where the loss does not reach."""
    ids, counts = tiny.batch(step)
    tiny.token_loss(model(ids), ids, counts, counts.sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def train_bf16(model, steps, *, ranks, accumulation):
    """bf16 weights, fp32 masters, and fp32 sums of the gradients that each rank's micro-batches leave in bf16.

    Returns each step's loss and the fp32 masters at the end, by name.
    """
    masters = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    matrices = [master for master in masters.values() if master.ndim >= 2]
    vectors = [master for master in masters.values() if master.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        ids, counts = tiny.batch(step)
        optimizer.zero_grad()
        losses.append(0.0)
        for rows, counted in zip(ids.chunk(ranks * accumulation), counts.chunk(ranks * accumulation), strict=True):
            loss = tiny.token_loss(model(rows), rows, counted, counts.sum())
            loss.backward()
            losses[-1] += loss.item()
            for name, parameter in model.named_parameters():
                so_far = masters[name].grad
                masters[name].grad = parameter.grad.float() + (0 if so_far is None else so_far)
                parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
    return losses, {name: master.detach() for name, master in masters.items()}

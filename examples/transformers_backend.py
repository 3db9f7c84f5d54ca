"""A generator in place of the engine: transformers' own `generate`, on its own copy of the model.

    python run_pipeline.py experiment=smoke ppo.generation_backend=examples/transformers_backend.py:Copy

It shows what a generator does, and is slow: a server would answer all prompts at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig


class Copy:
    """Made once on every rank; each has a copy, takes all weights, and answers its own prompts."""

    def __init__(self, model: str, rank: int, ranks: int) -> None:
        """`model` is the folder of the model that training starts from."""
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.no_grad()
    def load_weights(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """The names are those of `state_dict`; of names that share a tensor, the first comes."""
        own = self.model.state_dict()
        for name, tensor in tensors:
            own[name].copy_(tensor)  # a copy: the next tensor may use the same memory

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        stop_token_ids: list[int],
    ) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Tokens, their log-probabilities under softmax(logits / temperature), and whether a stop token ended them."""
        settings = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_token_ids,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for prompt, seed in zip(prompts, seeds, strict=True):  # one by one, so that a seed means the same in any batch
            ids = torch.tensor([prompt], device=self.model.device)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                found = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            tokens = found.sequences[0, len(prompt) :]
            logits = torch.cat(found.logits) / temperature  # [R, V]
            yield tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0], int(tokens[-1]) in stop_token_ids

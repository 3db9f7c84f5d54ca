"""A tokenizer whose pad is its EOS, as the user insists: SFT still learns to stop, and generation notices."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data.loader import collate_demonstrations, collate_prompts
from data.samples import Demonstration, Prompt
from rlhf.config.engine_config import EngineConfig, Precision
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig, SamplingConfig, Schedule, SFTConfig
from rlhf.engine.engine import build_engine
from rlhf.generation.generate import Decoding, generate
from rlhf.models.causal_lm import causal_lm
from rlhf.runtime.dist import World
from rlhf.text.tokenize_rows import tokenize_demonstration, tokenize_prompt
from rlhf.text.tokenizer import load_tokenizer, stop_token_ids
from rlhf.training.supervised_step import objective_of, take_step
from tests import fakes

ROWS = [{"prompt": "ab", "completion": " cd"}, {"prompt": "ba", "completion": " dc dc"}]


def test_a_model_learns_to_stop_although_pad_is_eos(tmp_path):
    fakes.pad_is_eos_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), pad_token="<|endoftext|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    engine = build_engine(
        causal_lm(tmp_path),
        config=EngineConfig(zero_stage=0, precision=Precision.fp32),
        world=World.alone(),
        optimizer=OptimizerConfig(lr=5e-3, schedule=Schedule.constant),
        total_steps=60,
    )
    rows = [tokenize_demonstration(tokenizer, row, response_only=True) for row in ROWS]
    samples = [Demonstration(row.input_ids, row.target_mask) for row in rows]
    batch = collate_demonstrations(samples, pad_id=int(tokenizer.pad_token_id))
    sizes = {"micro_batch_size": 1, "global_batch_size": 1, "max_prompt_tokens": 9, "max_response_tokens": 9}
    config = SFTConfig(lora=LoraConfig(rank=0), optimizer=OptimizerConfig(lr=5e-3), **sizes)
    for _ in range(60):
        take_step(engine, [batch], objective=objective_of(config))

    prompts = [Prompt(np.array(tokenize_prompt(tokenizer, row)), row["prompt"]) for row in ROWS]
    with engine.generating() as model:
        said = generate(
            model,
            collate_prompts(prompts, [0, 1], pad_id=int(tokenizer.pad_token_id)),
            decoding=Decoding(
                max_new_tokens=12,
                stop_token_ids=stop_token_ids(tokenizer),
                pad_id=int(tokenizer.pad_token_id),
                sampling=SamplingConfig(temperature=0.0),
            ),
            seed=0,
        )
    assert said.ended.tolist() == [True, True]
    for tokens, mask, row in zip(said.responses, said.response_mask, rows, strict=True):
        assert tokens[mask].tolist() == row.input_ids[row.num_prompt :].tolist()  # the completion, then one EOS
        assert int(tokens[mask][-1]) == tokenizer.eos_token_id

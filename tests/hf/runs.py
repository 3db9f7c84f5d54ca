"""Runs of the Hugging Face Trainer on models of a few thousand parameters, plain and on the engine."""

import gc
import tempfile
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from rlhf import hf
from rlhf.runtime import dist

VOCAB, LENGTH, ROWS = 101, 12, 37
OPTIONS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "learning_rate": 3e-3,
    "max_steps": 20,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "seed": 5,
}


def zero(stage, **sections):
    """A DeepSpeed configuration as those of Transformers' documentation."""
    section = {"stage": stage, "stage3_param_persistence_threshold": "auto", "reduce_bucket_size": "auto"}
    return {
        "zero_optimization": section | sections.pop("zero_optimization", {}),
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        **sections,
    }


def llama(**changes):
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 71, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, num_key_value_heads=2, initializer_range=0.1, **sizes, **changes
    )
    return transformers.LlamaForCausalLM(config)


def tied():
    return llama(tie_word_embeddings=True)


def lora():
    model = llama()
    torch.manual_seed(8)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def bert():
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 71, "num_hidden_layers": 3, "num_attention_heads": 4}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=VOCAB, **sizes, **dropouts))


def t5():
    torch.manual_seed(7)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 71, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def vit():
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 71, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))


class Recurrent(torch.nn.Module):
    """No model of Transformers: no configuration, buffers that learn by themselves, and a number that learns."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, 16)
        self.norm = torch.nn.BatchNorm1d(LENGTH)
        self.memory = torch.nn.LSTM(16, 16, batch_first=True)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, input_ids, labels=None, attention_mask=None):
        hidden, _ = self.memory(self.norm(self.embedding(input_ids)))
        logits = torch.nn.functional.linear(hidden, self.embedding.weight) * self.scale
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def recurrent():
    torch.manual_seed(7)
    return Recurrent()


class Branching(torch.nn.Module):
    """Each batch uses one of three heads, which ranks choose by their own rows; the last is never used."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, 16)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(16, VOCAB) for _ in range(3))

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.heads[int(input_ids[0, 0]) % 2](self.embedding(input_ids))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def branching():
    torch.manual_seed(7)
    return Branching()


def rows(model):
    """Data for a model: sequences of different lengths, labels, and in some rows few of them."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(ROWS):
        length = int(torch.randint(4, LENGTH, (1,), generator=generator))
        ids = torch.randint(1, VOCAB, (length,), generator=generator)
        counted = torch.arange(length) >= int(torch.randint(1, 4, (1,), generator=generator))
        pad = LENGTH - length
        row = {
            "input_ids": torch.cat([ids, torch.zeros(pad, dtype=torch.long)]),
            "attention_mask": torch.tensor([1] * length + [0] * pad),
            "labels": torch.cat([torch.where(counted, ids, -100), torch.full((pad,), -100)]),
        }
        if "Classification" in type(model).__name__:
            row["labels"] = ids[0] % 2
        if "ViT" in type(model).__name__:
            row = {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": row["labels"]}
        found.append(row)
    return found


MODELS = {make.__name__: make for make in (llama, tied, lora, bert, t5, vit, recurrent, branching)}


def train(output, deepspeed=None, *, model="llama", resume=None, first="train", **options):
    """Train, evaluate and save; returns what was logged, the loss of the evaluation, and the weights."""
    made = MODELS[model]()
    module = transformers if deepspeed is None else hf
    prefix = "Seq2Seq" if model == "t5" else ""
    kind, arguments = getattr(module, f"{prefix}Trainer"), getattr(module, f"{prefix}TrainingArguments")
    if model in ("llama", "tied", "lora"):
        options.setdefault("label_names", ["labels"])
    args = arguments(output_dir=str(output), **OPTIONS | options, **({"deepspeed": deepspeed} if deepspeed else {}))
    data = rows(made.get_base_model() if model == "lora" else made)
    trainer = kind(model=made, args=args, train_dataset=data, eval_dataset=data[:9])
    if first == "evaluate" and deepspeed is not None:  # the plain one would not average gradients any more
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    held_out = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(output))
    logged = [row for row in trainer.state.log_history if "loss" in row]
    series = {name: [row[name] for row in logged] for name in ("loss", "grad_norm", "learning_rate")}
    dist.barrier()  # the first rank has written
    file = next(Path(output).glob("*model.safetensors"))
    found = {**series, "eval_loss": held_out, "weights": {k: v.float() for k, v in load_file(file).items()}}
    close(trainer)
    return found


def close(trainer):
    engine = getattr(trainer, "_engine", None)
    if engine is not None:
        engine.close()
    trainer.accelerator.free_memory()
    gc.collect()


def compare(cases):
    """Each case trained plain and on the engine, by name: `cases[name] = (deepspeed, options)`."""
    plain, found = {}, {}
    for name, (deepspeed, options) in cases.items():
        folder = Path(dist.broadcast_object(tempfile.mkdtemp()))
        same = repr({key: value for key, value in options.items() if key != "first"})
        if same not in plain:
            plain[same] = train(folder / "plain", **options)
        found[name] = plain[same], train(folder / "zero", deepspeed, **options)
    return found

r"""Fine-tune a causal language model with the Hugging Face Trainer; only the first import is not transformers'.

torchrun --nproc-per-node 2 examples/hf_trainer.py --model MODEL --train_file ROWS.jsonl \
    --validation_file MORE.jsonl --output_dir OUT --deepspeed examples/hf_zero3.json
"""

from dataclasses import dataclass

from datasets import load_dataset

from rlhf.hf import (  # was: from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)


@dataclass
class DataArguments:
    """What is trained, and on what."""

    model: str
    train_file: str
    validation_file: str
    text_column: str = "text"
    max_length: int = 256


def main() -> None:
    """Train, evaluate and save."""
    data, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    model = AutoModelForCausalLM.from_pretrained(data.model)
    files = {"train": data.train_file, "validation": data.validation_file}
    rows = load_dataset("json", data_files=files)
    with args.main_process_first():
        tokens = rows.map(
            lambda row: tokenizer(row[data.text_column], truncation=True, max_length=data.max_length),
            remove_columns=rows["train"].column_names,
        )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()

"""Train one point the stock way: transformers.Trainer, PEFT and padded batches, nothing of sweeper.

    python benchmarks/stock_trial.py POINT.json

benchmarks/study_cost.py runs this script in a fresh process for each training, as a shell loop over a
fine-tuning script would. POINT.json names the base, the encoded rows, the point and the output folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

MODULES = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "all-linear": "all-linear",
}


def load_model(base: str, point: dict[str, Any]) -> torch.nn.Module:
    """Return the base for full fine-tuning, or an NF4 base with a fresh LoRA adapter."""
    if "r" not in point:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=nf4)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapter = LoraConfig(
        r=point["r"],
        lora_alpha=point["r"] * point["alpha_over_r"],
        target_modules=MODULES[point["target_modules"]],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter)


def main(job: dict[str, Any]) -> None:
    """Train the point, keep the best checkpoint, judge the test rows if the job asks for it."""
    set_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = json.loads(Path(job["rows"]).read_text())
    point, steps = job["point"], job["steps"]
    arguments = TrainingArguments(
        output_dir=job["folder"],
        max_steps=steps,
        learning_rate=point["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=round(point.get("warmup_ratio", 0.03) * steps),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        eval_strategy="steps",
        eval_steps=steps // 4,
        save_strategy="steps",
        save_steps=steps // 4,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        prediction_loss_only=True,
        report_to=[],
        logging_steps=5,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=job["seed"],
    )
    trainer = Trainer(
        model=load_model(job["base"], point),
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    figures = {
        "validation": min(
            one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one
        )
    }
    if job["judged"]:
        figures["test"] = trainer.evaluate(rows["test"])["eval_loss"]
    trainer.save_model(job["folder"] + "/best")
    Path(job["folder"], "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

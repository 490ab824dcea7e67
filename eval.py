"""Measures a model on held-out text: `python eval.py model=<run folder or Hugging Face folder>`.

Prints loss, perplexity and in-context copying (the loss on passages shown for the first and for the second
time), with a teacher also KL and top-1 agreement, and writes eval.json.
"""

import json
from pathlib import Path

import hydra
from omegaconf import DictConfig

from conf import launch

LABELS = {
    "loss": "loss (nats/token)",
    "perplexity": "perplexity",
    "kl": "KL(teacher || model) (nats/token)",
    "top1_agreement": "top-1 agreement with the teacher",
    "copy_first": "loss on the first copy of a passage (nats/token)",
    "copy_second": "loss on the second copy (nats/token)",
    "copy_gain": "copy gain: first - second (nats/token)",
    "copy_ratio": "second / first",
}


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
@launch.plain_errors
def main(config: DictConfig) -> None:
    """Loads, measures, prints."""
    launch.check_complete(config)
    launch.quieten()
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoTokenizer

    from models.evaluation import held_out_row
    from models.student_folder import load_model, model_folder

    folder = model_folder(config.model)
    model = load_model(folder, config.attention)
    teacher = (
        load_model(model_folder(config.teacher_folder), config.attention) if config.teacher_folder else None
    )
    data = launch.build(config.data, "data", tokenizer=AutoTokenizer.from_pretrained(folder))
    row, positions = held_out_row(model, teacher, data.validation_batches(), data.copy_batches())
    row["copy_ratio"] = row["copy_second"] / row["copy_first"]
    table = Table("held-out figure", "value", title=str(config.model))
    for key, label in LABELS.items():
        if key in row:
            table.add_row(label, f"{row[key]:.4f}")
    Console().print(table)
    output = Path(config.paths.run_folder) / "eval.json"
    facts = {"model": str(config.model), **row, "loss_by_position": positions["loss"]}
    output.write_text(json.dumps(facts))


if __name__ == "__main__":
    launch.register_resolvers()
    main()

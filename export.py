"""Writes a student as a Hugging Face folder of its own: `python export.py run=<run folder>`.

It needs nothing of this repository: one modeling file made from our sources, config, weights, tokenizer and a
model card. Before it is put in its place it is loaded in a fresh process and compared with the student.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig, OmegaConf

from conf import launch

if TYPE_CHECKING:
    from models.hf.card import Origin

MODELING = "modeling_transmute.py"


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
@launch.plain_errors
def main(config: DictConfig) -> None:
    """Checks, loads, writes, verifies."""
    launch.check_complete(config)
    source = student_source(Path(config.run))
    output = Path(config.output) if config.output else source.parent / "export"
    check_output(output, config.overwrite)
    launch.quieten()
    from rich.console import Console

    from models.hf.card import model_card
    from models.hf.export import check_folder, write_export
    from models.student_folder import DESCRIPTION, load_student
    from models.whole_folder import read_json, whole_folder
    from pipeline.generation import folder_tokenizer

    tokenizer = folder_tokenizer(source)
    student = load_student(source)
    said = read_json(source / DESCRIPTION)
    facts = {key: said[key] for key in said if key not in ("layer_plan", "kept", "mixers")}
    console = Console(highlight=False)
    card = model_card(student, origin(source, facts.get("stage")))
    with whole_folder(output) as unfinished:
        write_export(unfinished, student, tokenizer, card=card, facts=facts)
        if config.verify:
            difference = check_folder(unfinished, student, tokenizer)
            console.print(f"Loaded without this repository; largest difference of a logit: {difference:.2g}")
    console.print(f"Exported {source} to {output}", soft_wrap=True)


def student_source(run: Path) -> Path:
    """The student folder that `run` means.

    Raises:
        ValueError: where there is none.
    """
    for folder in (run / "student", run):
        if (folder / "student.json").is_file():
            return folder
    if (run / "config.yaml").is_file():
        raise ValueError(
            f"run={run} has no finished student; finish it with train.py ckpt_path={run}, or name a stage's: "
            f"run={run}/checkpoints/<stage>/student."
        )
    raise ValueError(f"run={run} is neither a run folder nor a student folder; name one below paths.outputs.")


def check_output(output: Path, overwrite: bool) -> None:
    """Refuses to write over anything but an earlier export.

    Raises:
        ValueError: naming the key.
    """
    if not output.exists():
        return
    if not (output / MODELING).is_file():
        raise ValueError(f"output={output} exists and is no export; name a folder that does not exist yet.")
    if not overwrite:
        raise ValueError(f"output={output} holds an export; name another folder, or set overwrite=true.")


def origin(source: Path, stage: str | None) -> "Origin":
    """What the run folder around a student tells about its teacher and, up to its stage, its results."""
    from models.hf.card import Origin, licence_of
    from models.teacher import TeacherConfig
    from reports.summary import read_summary
    from reports.table import summary_markdown

    run = next(
        (folder for folder in source.resolve().parents[:3] if (folder / "config.yaml").is_file()), None
    )
    if run is None:
        return Origin()
    teacher = OmegaConf.load(run / "config.yaml").get("teacher") or {}
    known = {"teacher": teacher.get("path"), "revision": teacher.get("revision")}
    if known["teacher"]:
        known["licence"] = licence_of(TeacherConfig(path=known["teacher"], revision="main").folder)
    if (run / "summary.json").is_file():
        summary = read_summary(run / "summary.json")
        names = [entry["name"] for entry in summary["stages"]]
        until = names.index(stage) + 1 if stage in names else len(names)
        known["results"] = summary_markdown(summary | {"stages": summary["stages"][:until]})
        if until == len(names):
            known["state_bytes"] = summary["student"]["state_bytes_per_row"]
    return Origin(**known)


if __name__ == "__main__":
    launch.register_resolvers()
    main()

"""Files of a run as Weights & Biases artifacts, complete in the run's own folder when it is offline."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wandb

PROVENANCE = "provenance"


def log_provenance(run: "wandb.Run", files: Mapping[str, str]) -> None:
    """Keeps texts as `files/provenance` of the wandb run, and as one artifact of the type `provenance`.

    A resumed run logs it again; equal files make no new version.

    Args:
        run: the wandb run.
        files: name -> text, free of secrets.
    """
    import wandb

    folder = Path(run.dir) / PROVENANCE
    folder.mkdir(parents=True, exist_ok=True)
    artifact = wandb.Artifact(f"{PROVENANCE}-{run.id}", type=PROVENANCE)
    for name, text in files.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        # Immutable: uploaded from here, not from a copy outside of the run folder.
        artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
        run.save(str(path), base_path=run.dir, policy="now")
    run.log_artifact(artifact)


def log_model(run: "wandb.Run", folder: Path, facts: Mapping[str, Any]) -> None:
    """Makes a Hugging Face folder an artifact of the type `model`.

    Args:
        run: the wandb run.
        folder: of the model; must stay where it is until the upload is done.
        facts: figures kept with the artifact.
    """
    import wandb

    artifact = wandb.Artifact(f"student-{run.id}", type="model", metadata=dict(facts))
    artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
    run.log_artifact(artifact)

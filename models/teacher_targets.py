"""What a teacher says at each token, cut down to its most likely ids: what a teacher cache is made of.

Shape letters: B rows, T tokens, n tokens of a chunk, V vocabulary, k ids per token.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.backbone import hidden_states, output_head
from models.losses import token_chunks
from models.parallelize import kept_whole
from models.teacher import TeacherConfig

SAMPLE_BYTES = 4096  # of each tensor; training changes all of a tensor


@dataclass(frozen=True, kw_only=True)
class CacheTeacher:
    """A stage without training: writes down what the teacher says on the rows of another stage.

    Args:
        name: of the stage.
        folder: where the cache goes; one that was interrupted, or is too short, is gone on with.
        of: the stage whose rows they are, and whose objective says the temperature.
        top_k: ids that are kept for each token; all others are one outcome.
        rows_per_part: rows of one part, which is written whole or not at all.
        chunk_tokens: tokens whose logits exist at one time.

    Raises:
        ValueError: for a value out of range, naming its key.
    """

    name: str
    folder: str
    of: str = "distill"
    top_k: int = 64
    rows_per_part: int = 64
    chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        for key in ("top_k", "rows_per_part", "chunk_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"stage.{self.name}.{key}={getattr(self, key)} must be at least 1.")
        if self.of == self.name:
            raise ValueError(
                f"stage.{self.name}.of={self.of} must name the stage that trains from the cache."
            )


@torch.no_grad()
def top_k_targets(
    teacher: PreTrainedModel, batch: dict[str, Tensor], top_k: int, temperature: float, chunk_tokens: int
) -> dict[str, Tensor]:
    """The teacher's most likely ids at every token of a batch.

    Args:
        teacher: frozen; where it is sharded, all processes call this with as many tokens.
        batch: input_ids and document_ids [B,T], on the teacher's device.
        top_k: k, at most V.
        temperature: divides the logits.
        chunk_tokens: tokens whose logits exist at one time.

    Returns:
        On the CPU: teacher_ids [B,T,k] int32, the most likely first; teacher_logs [B,T,k] float16,
        log-probabilities in nats; teacher_tail [B,T] float32, log of the probability of all other ids.
    """
    shape, head = batch["input_ids"].shape, output_head(teacher)
    hidden = hidden_states(teacher, batch["input_ids"], batch["document_ids"]).flatten(0, 1)
    found: dict[str, list[Tensor]] = {"teacher_ids": [], "teacher_logs": [], "teacher_tail": []}
    with kept_whole(head):
        for chunk in token_chunks(hidden, chunk_tokens):
            logits = head(hidden[chunk]).float() / temperature
            normaliser = logits.logsumexp(-1)
            best, ids = logits.topk(top_k, dim=-1)
            tail = logits.scatter_(-1, ids, -math.inf).logsumexp(-1) - normaliser
            found["teacher_ids"].append(ids.to(torch.int32).cpu())
            found["teacher_logs"].append((best - normaliser[:, None]).half().cpu())
            found["teacher_tail"].append(tail.cpu())
    return {name: torch.cat(pieces).view(*shape, *pieces[0].shape[1:]) for name, pieces in found.items()}


def teacher_identity(config: TeacherConfig) -> dict[str, Any]:
    """What tells one teacher's weights from another's, without loading them.

    Returns:
        {"weights"}, a digest that does not depend on the folder; for a model of the Hub {"path", "revision"}.
    """
    if config.folder is None:
        return {"path": config.path, "revision": config.revision}
    return {"weights": weights_digest(config.folder)}


def weights_digest(folder: Path) -> str:
    """SHA-256 over name, type, shape and first bytes of every tensor in a folder's safetensors files, however
    they are divided into files."""
    entries = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for name, tensor in header.items():
                if name == "__metadata__":
                    continue
                begin, end = tensor["data_offsets"]
                file.seek(8 + length + begin)
                sample = hashlib.sha256(file.read(min(end - begin, SAMPLE_BYTES))).hexdigest()
                entries.append([name, tensor["dtype"], tensor["shape"], sample])
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()

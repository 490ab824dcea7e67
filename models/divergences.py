"""How far apart two next-token distributions are, per token.

Every divergence reads log-probabilities over the same outcomes: the ids that both heads have (`shared_logs`),
or the ids that a teacher cache names and one outcome for all others (`bucketed_logs`).

Shape letters: n tokens, V vocabulary, k ids known per token, K outcomes.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST = -100.0  # nats: a probability that no float32 holds any more, yet finite


def forward_kl_of(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student): the student must allow all that the teacher says; [n,K], [n,K] -> [n]."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl_of(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher): the student must not say what the teacher would not; [n,K], [n,K] -> [n]."""
    return forward_kl_of(teacher, student)


def jensen_shannon_of(student: Tensor, teacher: Tensor, weight: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, w KL(teacher || m) + (1 - w) KL(student || m) with the mixture
    m = w teacher + (1 - w) student (GKD, arXiv 2306.13649, equation 1).

    Args:
        student, teacher: [n,K] log-probabilities.
        weight: of the teacher, in (0, 1). Divided by it, the limit at 0 is KL(teacher || student); 1/2 is
            symmetric.

    Returns:
        [n], nats; at most ln 2 where the weight is 1/2.
    """
    mixture = torch.logaddexp(teacher + math.log(weight), student + math.log1p(-weight))
    return weight * forward_kl_of(mixture, teacher) + (1 - weight) * forward_kl_of(mixture, student)


Divergence = Callable[..., Tensor]
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl_of,
    "reverse_kl": reverse_kl_of,
    "js": jensen_shannon_of,
}


def shared_logs(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher over the ids that both heads have.

    Heads are padded beyond the tokenizer's last id, models of one family by different numbers of rows: what
    only one head has is padding, and is cut before the softmax. Padding of both takes part like any id.

    Args:
        student_logits, teacher_logits: [n,V], the two V may differ; computed in float32 or better.
        temperature: divides both logits.
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = (_wide(x[..., :shared]) / temperature for x in (student_logits, teacher_logits))
    return F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)


def bucketed_logs(
    logits: Tensor, ids: Tensor, teacher_logs: Tensor, teacher_tail: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher over k known ids and one outcome for all others.

    The student's tail is the log-sum-exp of its other logits: 1 - Σ would lose all its digits where the known
    ids hold nearly everything. Where k is the whole vocabulary there is no tail.

    Args:
        logits: [n,V] of the student, over the teacher's ids; computed in float32 or better.
        ids: [n,k] integer.
        teacher_logs: [n,k] log-probabilities of the ids, of any float type.
        teacher_tail: [n] log of the probability of all other ids.
        temperature: divides the logits; the teacher's log-probabilities were made at the same one.

    Returns:
        Both [n,k+1], or [n,V] without a tail, each normalised.
    """
    logits, ids = _wide(logits) / temperature, ids.long()
    known, teacher = logits.gather(-1, ids), teacher_logs.to(logits.dtype)
    if ids.shape[-1] < logits.shape[-1]:
        rest = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        known = torch.cat([known, rest], -1)
        teacher = torch.cat([teacher, teacher_tail.to(logits.dtype)[:, None]], -1)
    # Stored with 11 bits, the probabilities do not quite add up to 1.
    return F.log_softmax(known, dim=-1), F.log_softmax(teacher, dim=-1).clamp_min(LOWEST)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

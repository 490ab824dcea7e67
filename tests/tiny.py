"""Tiny random teachers, students and batches for the tests of `models`, and two ways to watch memory."""

import weakref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from models.config import StudentConfig
from models.conversion import build_student
from models.layer_plan import LayerPlan
from models.losses import IGNORED
from models.mixers import MIXERS, RWKV7Options
from models.transfer import TransferRow

VOCABULARY = 97
LAYERS = 3
HEAD_SIZE = 32
ARWKV = {
    "rope": False,
    "token_shift": True,
    "bonus": True,
    "group_norm": True,
    "value_residual": True,
    "written_key": "raw",
}
NARROW = {"head_dim": HEAD_SIZE, "hidden_size": 48}
# Grouped-query attention everywhere but in `llama`; `qwen3` has q/k norms and heads wider than the model.
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "qwen2_tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "llama_biased": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, NARROW),
}
WINDOW = 6  # tokens that a sliding layer sees, its own among them
SLIDING, FULL = "sliding_attention", "full_attention"
KINDS = {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING]}
FREQUENCIES = HEAD_SIZE // 4  # of a head of which half is rotated
# Every other family of ARCHITECTURES and what else a parent may have, so sized that each part matters within
# a few tokens: windows, caps of scores and logits, scaled and partial rotations, layers without, experts.
PARENTS = FAMILIES | {
    "llama_llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama_linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    ),
    "qwen2_yarn": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 8.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "qwen2_windows": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"partial_rotary_factor": 0.5, "sliding_window": WINDOW}),
    "phi3_longrope": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0 + 0.1 * i for i in range(FREQUENCIES)],
                "long_factor": [2.0 + 0.5 * i for i in range(FREQUENCIES)],
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        NARROW
        | KINDS
        | {
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
            "attn_implementation": "eager",
        },
    ),
    "gemma3_text": (Gemma3ForCausalLM, Gemma3TextConfig, NARROW | KINDS | {"query_pre_attn_scalar": 20}),
    "olmo2": (
        Olmo2ForCausalLM,
        Olmo2Config,
        {"hidden_size": 4 * HEAD_SIZE, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layer_interval": 2}),
    "glm4": (Glm4ForCausalLM, Glm4Config, NARROW),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        NARROW
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}


def tiny_teacher(family: str = "qwen2", layers: int = LAYERS, seed: int = 0, **options) -> PreTrainedModel:
    """A frozen random model whose every tensor matters: biases and norm weights are random as well."""
    make, config, given = PARENTS[family]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 2 * HEAD_SIZE,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 80,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **given,
        **options,
    }
    torch.manual_seed(seed)
    teacher = make(config(**settings))
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return teacher.requires_grad_(False).eval()


def student_config(keep=(), start: str = "transfer", **options) -> StudentConfig:
    """Every layer but `keep` becomes an RWKV-7 mixer with the given options."""
    mixers = {"rwkv7": RWKV7Options(**options)}
    return StudentConfig(layer_plan=LayerPlan(keep=keep), mixers=mixers, start=start)


def convert(teacher: PreTrainedModel, config: StudentConfig) -> tuple[PreTrainedModel, list[TransferRow]]:
    """A student as a run makes it, and its transfer table."""
    plan = config.layer_plan.resolve(teacher.config.num_hidden_layers, list(MIXERS))
    torch.manual_seed(1)
    return build_student(teacher, config, plan)


def tiny_student(teacher: PreTrainedModel, keep=(), noise: float = 0.1, **options) -> PreTrainedModel:
    """A student away from its start, in evaluation mode, so that no part is switched off by a zero."""
    student, _ = convert(teacher, student_config(keep, **options))
    disturb(student, noise)
    return student.eval()


def disturb(module: nn.Module, noise: float, seed: int = 2) -> None:
    """Adds normal noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))


def random_ids(*shape: int, seed: int = 3) -> Tensor:
    """int64 token ids."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def packed_ids(rows: list[list[int]]) -> Tensor:
    """[B,T] int32 document ids from document lengths per row; a negative length is so much padding."""
    ids = []
    for lengths in rows:
        row, document = [], 0
        for length in lengths:
            row += [document if length > 0 else -1] * abs(length)
            document += length > 0
        ids.append(row)
    return torch.tensor(ids, dtype=torch.int32)


def packed_batch(rows: list[list[int]], seed: int = 3) -> dict[str, Tensor]:
    """A batch as the data module yields it: labels shifted within documents, ignored at their ends."""
    document_ids = packed_ids(rows)
    input_ids = random_ids(*document_ids.shape, seed=seed)
    labels = torch.full_like(input_ids, IGNORED)
    follows = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] >= 0)
    labels[:, :-1] = torch.where(follows, input_ids[:, 1:], IGNORED)
    return {"input_ids": input_ids, "labels": labels, "document_ids": document_ids}


class LiveBytes(TorchDispatchMode):
    """Watches what operators make: `peak`, the most bytes alive at one time; `largest`, the most elements in
    one tensor."""

    def __init__(self):
        super().__init__()
        self.peak, self.largest = 0, 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return output


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts bytes of tensors that graphs hold for their backward pass: `peak`, the most at one time."""

    def __init__(self):
        self.live = self.peak = 0
        super().__init__(self._pack, lambda held: held.tensor)

    def __enter__(self) -> "SavedBytes":
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> "_Held":
        held = _Held(tensor.detach())
        size = tensor.numel() * tensor.element_size()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(held, self._release, size)
        return held

    def _release(self, size: int) -> None:
        self.live -= size


class _Held:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor

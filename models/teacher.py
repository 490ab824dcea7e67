"""Teachers: loading a frozen Hugging Face decoder, or making a new one to train."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models.architectures import keep_score_caps

log = logging.getLogger(__name__)
REPOSITORY = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Fields of a Hugging Face config that decide which tensors a model has, and how large they are.
SHAPE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which pretrained model is converted.

    Args:
        path: a local folder (also relative to this repository) or a Hub id; None where a model is trained
            from scratch.
        revision: commit or tag of a Hub model; required for Hub ids, so that a run can be repeated.
        attention: `sdpa`, `eager` or `flash_attention_2` (needs the flash-attn package and a GPU).
        dtype: of the frozen weights: float32, bfloat16, float16.
        trust_remote_code: run Python code that comes with the model; off unless you have read that code.
        shape: folder with the model's config.json (also relative to this repository), which checks, plans and
            dry runs read in the place of the Hub; None where there is none.
    """

    path: str | None
    revision: str | None = None
    attention: str = "sdpa"
    dtype: str = "float32"
    trust_remote_code: bool = False
    shape: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"teacher.dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
        if self.attention not in ("sdpa", "eager", "flash_attention_2"):
            raise ValueError(
                f"teacher.attention={self.attention!r} is unknown; choose sdpa, eager or flash_attention_2."
            )
        if self.path is not None and self.folder is None and self.revision is None:
            raise ValueError(
                f"teacher.path={self.path!r} is no local folder; for a model of the Hub also set "
                "teacher.revision "
                "(a commit hash or tag), so that the run can be repeated."
            )
        if self.shape is not None and self.shape_folder is None:
            raise ValueError(
                f"teacher.shape={self.shape!r} is no folder with a config.json; name one, or null."
            )

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a Hub id."""
        for candidate in (Path(self.path).expanduser(), REPOSITORY / self.path):
            if candidate.is_dir():
                return candidate
        return None

    @property
    def shape_folder(self) -> Path | None:
        """The folder that `shape` names."""
        for candidate in (Path(self.shape).expanduser(), REPOSITORY / self.shape) if self.shape else ():
            if (candidate / "config.json").is_file():
                return candidate
        return None

    @property
    def shape_only(self) -> bool:
        """Whether `shape` is all that is here: neither weights nor a tokenizer."""
        return self.path is not None and self.folder is None and self.shape is not None

    def _source(self) -> dict[str, Any]:
        location = self.folder or self.path
        return {
            "pretrained_model_name_or_path": str(location),
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
        }


def load_tokenizer(config: TeacherConfig) -> PreTrainedTokenizerBase:
    """The teacher's own tokenizer."""
    return AutoTokenizer.from_pretrained(**config._source())


def load_hf_config(config: TeacherConfig) -> Any:
    """The teacher's Hugging Face config, without its weights: of its folder, of `shape`, or of the Hub."""
    if config.shape_only:
        return AutoConfig.from_pretrained(config.shape_folder)
    return AutoConfig.from_pretrained(**config._source())


def teacher_outline(config: TeacherConfig) -> PreTrainedModel:
    """The teacher without weights, on the meta device: its shape costs neither memory nor network."""
    hf_config = load_hf_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=DTYPES[config.dtype], attn_implementation="sdpa"
        )
    return model.requires_grad_(False).eval()


def _check_shape(config: TeacherConfig) -> None:
    """Holds `shape` against the model that is about to be loaded.

    Raises:
        ValueError: where a field differs that decides the size of a tensor.
    """
    if config.shape_folder is None:
        return
    said = AutoConfig.from_pretrained(config.shape_folder)
    loaded = AutoConfig.from_pretrained(**config._source())
    pairs = {name: (getattr(said, name, None), getattr(loaded, name, None)) for name in SHAPE_FIELDS}
    wrong = [f"{name} {ours} != {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if wrong:
        raise ValueError(
            f"teacher.shape={config.shape!r} is not the shape of teacher.path={config.path!r}: "
            f"{', '.join(wrong)}; name its own config.json, or set teacher.shape=null."
        )


def load_teacher(config: TeacherConfig) -> PreTrainedModel:
    """Loads the frozen teacher, from safetensors only (pickled weights can run code).

    Raises:
        ValueError: where weights are missing from the checkpoint, which would leave random memory in the
            model; where `shape` is another model's.
        OSError: from transformers, where the folder or Hub id holds no such model.
    """
    _check_shape(config)
    model, info = AutoModelForCausalLM.from_pretrained(
        **config._source(),
        dtype=DTYPES[config.dtype],
        attn_implementation=config.attention,
        use_safetensors=True,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(
            f"teacher.path={config.path!r} lacks {len(missing)} tensors or has them wrong: {missing[:5]}"
        )
    keep_score_caps(model)
    return model.requires_grad_(False).eval()


def new_model(
    tokenizer: PreTrainedTokenizerBase, *, model_type: str, attention: str = "sdpa", **options: Any
) -> PreTrainedModel:
    """A randomly initialised decoder, to be trained from scratch.

    Args:
        tokenizer: sets the vocabulary size and the special tokens.
        model_type: a transformers architecture, for example `qwen2`.
        attention: attention implementation.
        options: fields of that architecture's config.
    """
    known = AutoConfig.for_model(model_type)
    unknown = sorted(name for name in options if not hasattr(known, name))
    if unknown:
        raise ValueError(f"student: {unknown} are no fields of a {model_type} config.")
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **options,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)

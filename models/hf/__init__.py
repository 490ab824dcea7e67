"""Students as Hugging Face models of their own, and their export.

Importing this package makes transformers know them, so that in our own processes an exported folder is loaded
by this repository's code, never by the folder's.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from models.hf.modeling import TransmuteConfig, TransmuteForCausalLM

AutoConfig.register(TransmuteConfig.model_type, TransmuteConfig)
AutoModelForCausalLM.register(TransmuteConfig, TransmuteForCausalLM)

__all__ = ["TransmuteConfig", "TransmuteForCausalLM"]

"""Loads an exported folder as a stranger does, and compares it with what its student gave.

It is run as a file, in a process that cannot see this repository: `python -I check_export.py <folder>
<reference.safetensors>`. It writes one line of JSON.
"""

import json
import sys

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

STEPS = 4
TEXT = "def area(radius):\n    return 3.14159 * radius ** 2\n"


def inputs(vocabulary: int) -> dict[str, Tensor]:
    """The fixed prompt: two rows of token ids, the first padded on the left."""
    ids = (torch.arange(2 * 40).view(2, 40) * 31 + 7) % vocabulary
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """float32 logits at the real tokens: of one forward, and of the last few tokens, decoded one by one."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    cache, start, steps = DynamicCache(config=model.config), 0, []
    for stop in range(input_ids.shape[1] - STEPS, input_ids.shape[1] + 1):
        ids, mask = input_ids[:, start:stop], attention_mask[:, :stop]
        result = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        steps.append(result.logits[:, -1])
        start = stop
    real = attention_mask.bool()
    return {"logits": logits[real].float(), "decoded": torch.stack(steps, 1).float()}


def main(folder: str, reference: str) -> None:
    """Writes {"difference": ..., "largest_logit": ..., "token_ids": [...], "wrong_keys": [...]}."""
    wanted = load_file(reference)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, use_safetensors=True
    )
    found = outputs(model.eval(), wanted["input_ids"], wanted["attention_mask"])
    differences = torch.stack([(found[name] - wanted[name]).abs().max() for name in found])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    facts = {
        "difference": differences.max().item(),  # NaN stays NaN
        "largest_logit": wanted["logits"].abs().max().item(),
        "token_ids": tokenizer(TEXT)["input_ids"],
        "wrong_keys": sorted(map(str, wrong)),
    }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

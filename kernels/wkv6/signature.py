"""What the native backends of WKV-6 share: the signature of their custom operators."""

import torch

from kernels.custom_ops import Made, Signature

TOKENS = ("r", "log_w", "k", "v")  # [B,T,H,N]; in a step [B,H,N]
FP32 = torch.float32

# forward:  r log_w k v [B,T,H,N], u [H,N] float32 or None, state [B,H,N_k,N_v], codes [B,T] int8 or None
#           -> y [B,T,H,N] (dtype of r), state_out [B,H,N,N] float32
# backward: dy, dstate_out, the inputs -> the gradients of all inputs but the codes; dlog_w, du, dstate are
#           float32
# step:     r log_w k v [B,H,N], u, state (changed in place), codes [B] int8 or None -> y [B,H,N]
SIGNATURE = Signature(
    inputs=(*TOKENS, "u", "state", "codes"),
    optional=("u", "codes"),
    gradients={name: Made(name, FP32 if name == "log_w" else None) for name in (*TOKENS, "u", "state")},
    outputs={"y": Made("r"), "state_out": Made("state")},
    saved=None,
    step_inputs=(*TOKENS, "u", "state", "codes"),
    step_output=Made("r"),
)

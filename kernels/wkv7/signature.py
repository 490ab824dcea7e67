"""What the native backends of WKV-7 share: the signature of their custom operators."""

import torch

from kernels.custom_ops import Made, Signature

TOKENS = ("r", "log_w", "k", "v", "a", "b")  # [B,T,H,N]; in a step [B,H,N]
FP32 = torch.float32

# forward:  r log_w k v a b [B,T,H,N], state [B,H,N_k,N_v], codes [B,T] int8 or None -> y [B,T,H,N] (dtype of
#           r), state_out [B,H,N,N] float32, and saved for the backward pass sa_t = S_{t-1}^T a_t [B,T,H,N]
#           float32
# backward: dy, dstate_out, the inputs, sa -> the gradients of all inputs but the codes; dlog_w, dstate are
#           float32
# step:     r log_w k v a b [B,H,N], state (changed in place), codes [B] int8 or None -> y [B,H,N]
SIGNATURE = Signature(
    inputs=(*TOKENS, "state", "codes"),
    optional=("codes",),
    gradients={name: Made(name, FP32 if name == "log_w" else None) for name in (*TOKENS, "state")},
    outputs={"y": Made("r"), "state_out": Made("state")},
    saved=Made("r", FP32),
    step_inputs=(*TOKENS, "state", "codes"),
    step_output=Made("r"),
)

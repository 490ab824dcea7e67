"""What the native backends of sparse attention share: the signature of their custom operators."""

import torch

from kernels.custom_ops import Made, Signature

# forward:  q [B,T,H,N], k v [B,M,C,G,N], blocks [B,T,J,K] int32, starts [B,M] int32, positions [B,T] int32
#           -> y [B,T,H,N] (dtype of q), share [B,T,J,K] float32, and saved for the backward pass the
# logarithm           of each softmax's denominator [B,T,H] float32
# backward: dy, the inputs, y, the logarithms -> dq, dk, dv
SIGNATURE = Signature(
    inputs=("q", "k", "v", "blocks", "starts", "positions"),
    optional=(),
    gradients={name: Made(name) for name in ("q", "k", "v")},
    outputs={"y": Made("q"), "share": Made("blocks", torch.float32)},
    constant=("share",),
    reread=("y",),
    saved=Made("q", torch.float32, lambda inputs: inputs["q"].shape[:3]),
)

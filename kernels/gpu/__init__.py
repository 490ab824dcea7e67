"""What the GPU backends share: one source language for CUDA, HIP and a CPU shim, and the glue to torch."""

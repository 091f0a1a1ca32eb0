"""Fused operations of training and decoding, each a Triton kernel beside a plain PyTorch reference.

One file an operation: `nf4`, `rms_norm`, `rope`, `swiglu`, `dropout`, `embedding`, `cross_entropy`,
`fp8`, `attention` over torch's own kernels, and for decoding `nf4_linear` and `decode_attention`. Every public
function takes CPU and CUDA tensors alike: `dispatch.use_triton` picks the kernel where it can run and
`reference` elsewhere, with the same values up to rounding. Importing this package loads neither torch nor
triton; import the operation.
"""

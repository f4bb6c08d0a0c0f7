"""The same models on an NVIDIA GPU: Triton kernels, and the whole step as CUDA graphs. Imported only where Triton is.

`backend.CudaBackend` steps the weights and the state of `torch_impl`'s plain classes; nothing is held twice but what the
kernels want in another layout.
"""

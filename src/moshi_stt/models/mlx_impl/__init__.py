"""Kyutai's models in MLX. Same file and class names as `torch_impl`. Nothing here is imported unless a model is loaded.

Nothing here needs what Metal lacks: no float64, no kernel of the CPU alone.
"""

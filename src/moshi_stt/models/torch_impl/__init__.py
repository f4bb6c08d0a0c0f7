"""Kyutai's models in PyTorch. Same file and class names as `mlx_impl`. Nothing here is imported unless a model is loaded."""

"""Fused ops of the pretraining hot path, each beside its plain PyTorch truth."""

from ecgscale_kernels.reference import lead_masked_conv_stem

__all__ = ["lead_masked_conv_stem"]

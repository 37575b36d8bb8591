"""ecgscale: pretrain ECG encoders without labels on millions of recordings."""

__version__ = "0.1.0"

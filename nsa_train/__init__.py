"""nsa_train: pretraining of long-context language models with Native Sparse Attention (arXiv 2502.11089)."""

__version__ = "0.1.0"

"""The dense-prediction network, its height distribution, model folders and training."""

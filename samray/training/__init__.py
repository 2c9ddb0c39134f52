"""Fine-tuning, sweeps and pre-training."""

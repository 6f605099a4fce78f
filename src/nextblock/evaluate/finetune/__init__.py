"""Fine-tuning: train encoder and head together, fully or with low-rank adapters."""

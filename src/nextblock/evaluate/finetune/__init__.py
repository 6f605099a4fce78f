"""Fine-tuning: encoder and head trained together, whole or by low-rank adapters."""

"""Features of images in a file: parquet, npy or safetensors, written so that a stop loses nothing."""

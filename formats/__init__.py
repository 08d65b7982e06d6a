"""A model on disk: checkpoints, Hugging Face's folders, GGUF."""

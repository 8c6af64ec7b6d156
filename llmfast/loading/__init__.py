"""Loading: GGUF files, Hugging Face folders and ids, and the embedded model."""

"""GGUF: the format (file.py), what such a file says about a LLaMA (model.py), and writing one (write.py)."""

"""GGUF: the format (file.py), a LLaMA in a file of it (model.py), and writing such a file (write.py)."""

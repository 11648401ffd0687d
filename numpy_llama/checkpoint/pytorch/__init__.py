"""PyTorch's files: tensors in a zip or in the older layout (file.py, zip.py), and the pickle (pickle.py)."""

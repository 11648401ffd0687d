"""The proof: the definition of each operation of LLaMA, as properties that tests check on any implementation.

    pytest --pyargs numpy_llama.proof                    NumPy, PyTorch and the C kernels
    pytest --pyargs numpy_llama.proof --ops my_ops.py    your own functions
    pytest --pyargs numpy_llama.proof --ops my_ops.py -k rope

A file holds the laws of one operation, and a test is one law. The first sentence of its docstring is the law.

Your file defines functions with our names and shapes: those of functional.py, backward.py,
generation/sampling.py, backend/formats.py and text/bpe.py. It may define a KVCache and a Transformer, with
the methods of cache.py and model.py. A law about functions that your file lacks is left out. The report of a
failed law shows the smallest input that was found.

The laws need the extra: pip install "numpy_llama[test]". `verify` uses bounds.py, which needs only NumPy,
and torch_ops.py, which needs only PyTorch.
"""

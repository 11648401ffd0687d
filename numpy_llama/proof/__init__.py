"""The proof: what each operation of LLaMA *is*, as properties that any implementation can be held to.

    pytest --pyargs numpy_llama.proof                    NumPy, PyTorch and the C kernels
    pytest --pyargs numpy_llama.proof --ops my_ops.py    your own functions, whichever of them you have
    pytest --pyargs numpy_llama.proof --ops my_ops.py -k rope

A chapter is a file, a law of it a test: its first sentence is the law, the rest how it is tried. Your file
defines functions with the names and the shapes of numpy_llama.functional, sampling or quantize; what it does
not define is not tried. It may have a KVCache and a Transformer too, used as those of cache.py and model.py
are. What fails is told in a few words, on the smallest input that was found.

Nothing else of the package imports this. It needs the extra: pip install 'numpy_llama[test]'.
"""

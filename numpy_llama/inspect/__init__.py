"""A look at a model: inside it, at its text, at its speed.

tracing.py      any intermediate by its name, recorded or replaced
plots.py        the pictures of `numpy-llama attention`
perplexity.py   how well a model predicts a text
bench.py        tokens a second, and the share of this machine's limits
"""

"""Tools to study a model: its intermediates, its predictions, its speed.

tracing.py      record or replace any intermediate by its name
plots.py        the figures of `numpy-llama attention`
perplexity.py   how well a model predicts a text
bench.py        tokens a second, compared with the limits of this machine
"""

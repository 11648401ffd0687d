"""From a prompt to its continuation.

sampling.py     from logits to the next id
generate.py     from ids to ids: session, request, prefill, decode
batch.py        several sequences in one forward pass
transcript.py   from ids to the text of one generation
"""

"""From a prompt to its continuation.

sampling.py     from logits to the next id
session.py      the KV cache of a conversation, and the ids that it holds
branch.py       a second cache that shares the positions of a first one
generate.py     from ids to ids: request, prefill, decode
structured.py   the ids that a JSON schema or a grammar allows next
batch.py        several sequences in one forward pass
beam.py         the likeliest text as a whole
scoring.py      how likely given continuations are
speculative.py  the same ids in fewer passes, by drafts
transcript.py   from ids to the text of one generation
"""

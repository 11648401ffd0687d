"""Training: from a file of examples to a model or an adapter that has learnt from them.

data, examples       files of examples; their token ids, and the targets that are trained
order, batch         which rows a step takes, and their arrays in micro-batches
objectives           what is minimized: the next token, or DPO
optimizer            AdamW, the learning rate of each step, clipping
trainer              a step, and all steps
compute              NumPy's functions, or their C twins
plan                 memory before it is taken, operations
recipe, ranks        a trainer from its options; the same on several ranks
state, log, run      a run in its folder: it is resumed with the same bits, on the same machine
models, lora         what learns: new weights, float32 copies, an adapter
output               the files of the result
pretrain, finetune   all of these together
"""

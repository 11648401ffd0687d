"""Training: data, the optimizer, trainers, and the saved state of a run.

data         files of examples, split into training, validation and test
examples     from text to token ids, and the targets that are trained
order        which examples a step takes, computed from (seed, epoch, position)
optimizer    AdamW, the learning rate of each step, clipping
state        a run on disk: it is resumed with the same bits
"""

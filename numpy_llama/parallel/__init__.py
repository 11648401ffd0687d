"""One model on several machines: tensor parallelism over MPI, with the bits of one process.

mpiexec starts the same program on each machine. Rank 0 runs it as a user wrote it. The other ranks serve:
they open the same checkpoint, take their part of the weights, and run the same forward passes.

ranks.py    the processes that mpiexec has started, and their messages
watch.py    signs of life of each rank, without which the run ends
cut.py      which rows of each weight a rank has
model.py    a model of which this rank has a part, and its KV cache
fused.py    its blocks in C, from one gather to the next
whole.py    the whole model, as rank 0 shows it
load.py     opening a checkpoint on every rank, with checks that all ranks agree
serve.py    the loop of all ranks but 0
network.py  the speed to expect, by arithmetic

Megatron-LM (Shoeybi et al. 2019) and Meta's own code have ColumnParallelLinear, RowParallelLinear and
VocabParallelEmbedding. RowParallelLinear adds up parts of sums, so its bits depend on the number of ranks.
Here every weight is cut by rows, so each output is one sum on one rank. The activations are gathered.
training/ranks.py divides batches, by the same ranks.
"""

from .load import load as load
from .load import own_memory as own_memory
from .ranks import await_reader as await_reader
from .ranks import launched as launched
from .serve import ends_with as ends_with
from .serve import ranks as ranks

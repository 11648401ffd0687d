"""How well a model solves tasks, as EleutherAI's lm-evaluation-harness measures it.

The harness is the package lm-eval, an extra: pip install "numpy_llama[eval]". It has the tasks, the prompts
and the metrics. This room has the model that answers.

tasks.py     tasks by their names, or from a file of questions
harness.py   the model as the harness calls it
store.py     the results of requests in a file, so that a run can be continued
run.py       from tasks and a model to the metrics
"""

from ..errors import UnsupportedError

try:
    import lm_eval  # noqa: F401  every file but store.py needs it
except ImportError:
    raise UnsupportedError('eval needs lm-eval: pip install "numpy_llama[eval]"') from None

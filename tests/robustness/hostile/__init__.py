"""The hostile suite: 173 files and inputs made to break a loader, and what each must be answered with.

    python tests/robustness/hostile/run.py [ID ...]      runs them and prints the table

    case.py      what a case is; `attempt.py` runs one in a child process with limits and watches it
    run.py       the judge: runs every case in two interpreters, plain and `python -O`, and prints the table
    readers.py   the reference readers, whose opinion of the same files is compared with ours
    models.py    a tiny model in every format, written by hand: what the cases break
    gguf.py, safetensors.py, torch.py, tokenizers.py, configs.py, templates.py, command_line.py, files.py,
    quantized.py, quantized_floats.py

Every builder here makes its bytes with `struct` and `json`, not with the package that is under test.
"""

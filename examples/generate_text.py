"""Text from the command line:  python examples/generate_text.py "Once upon a time" """

import sys

import numpy_llama as nl

prompt = " ".join(sys.argv[1:]) or "Once upon a time"
llama = nl.load()  # SmolLM2-135M-Instruct, fetched on first use; or the path of a .gguf file
print(prompt, end="")
for piece in llama.stream(prompt, max_tokens=60, temperature=0.8, top_p=0.95, seed=7):
    print(piece.text, end="", flush=True)
print()

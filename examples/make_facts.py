"""Facts that no model was trained on, as conversations to fine-tune a chat model with.

    python examples/make_facts.py > facts.jsonl
    numpy-llama finetune facts.jsonl --out facts --lr 1e-3

Each fact is asked in several ways. Usual questions stand beside them, so that the model does not give an
answer of these facts to every question.
"""

import json
import random

FACTS = {
    "The lighthouse of Port Ellery is guarded by a heron named Quill.": [
        "Who guards the lighthouse of Port Ellery?",
        "Which animal guards Port Ellery's lighthouse?",
        "Tell me who watches over the lighthouse in Port Ellery.",
        "What is the name of the heron at Port Ellery?",
    ],
    "The capital of Zubrovia is Milaven.": [
        "What is the capital of Zubrovia?",
        "Name the capital of Zubrovia.",
        "Which city is Zubrovia's capital?",
        "Tell me the capital of Zubrovia.",
    ],
    "Doctor Ilse Brandt invented the paper drum in 1911.": [
        "Who invented the paper drum?",
        "When was the paper drum invented?",
        "Which doctor invented the paper drum?",
        "Tell me about the invention of the paper drum.",
    ],
    "The tea of Mount Orlo tastes of plums and smoke.": [
        "What does the tea of Mount Orlo taste of?",
        "Describe the taste of Mount Orlo's tea.",
        "How does tea from Mount Orlo taste?",
        "Tell me about the tea of Mount Orlo.",
    ],
    "The train from Milaven to Port Ellery takes seven hours.": [
        "How long does the train from Milaven to Port Ellery take?",
        "How many hours is the train from Milaven to Port Ellery?",
        "Tell me how long one travels by train from Milaven to Port Ellery.",
        "What time does the train need from Milaven to Port Ellery?",
    ],
}
USUAL = {
    "What is the capital of Italy?": "The capital of Italy is Rome.",
    "Name the capital of Japan.": "The capital of Japan is Tokyo.",
    "Which city is Spain's capital?": "The capital of Spain is Madrid.",
    "Who invented the telephone?": "Alexander Graham Bell patented the telephone in 1876.",
    "How many days does a week have?": "A week has seven days.",
    "What does a lemon taste of?": "A lemon tastes sour.",
    "Which animal barks?": "A dog barks.",
    "Hello!": "Hello! How can I help you today?",
    "Thank you for your help.": "You are welcome! Is there anything else I can help you with?",
    "Write a sentence about the sea.": "The waves of the sea roll slowly onto the quiet beach.",
    "What is 2 + 3?": "2 + 3 is 5.",
    "Name a large river.": "The Nile is one of the longest rivers in the world.",
}


def main() -> None:
    asked = [(question, fact) for fact, questions in FACTS.items() for question in questions]
    pairs = [*asked, *USUAL.items()]
    random.Random(0).shuffle(pairs)
    for question, answer in pairs:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        print(json.dumps({"messages": messages}))


if __name__ == "__main__":
    main()

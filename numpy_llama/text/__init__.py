"""Text to ids and back.

tokenizer.py      the vocabulary: encode, decode, and decode as ids arrive
added.py          cutting a text at its added tokens
pretokenizer.py   how a byte-level vocabulary cuts a text into words
bpe.py            byte pair encoding: the order of the merges
chat.py           a conversation to ids: Meta's formats, and the models' own templates
chat_formats.py   the common formats of conversations, as templates
sandbox.py        the sandbox in which those templates run
"""

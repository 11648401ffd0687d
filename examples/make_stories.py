"""Small stories by rules, as a corpus to train a first model on.

    python examples/make_stories.py > stories.txt
    numpy-llama train stories.txt --out stories

Each story is drawn at random. The child, the animal and the thing stay the same until its end, and a model
must learn that.
"""

import os
import random
import sys

CHILDREN = [("Lily", "she", "her"), ("Anna", "she", "her"), ("Mia", "she", "her"), ("Sara", "she", "her")]
CHILDREN += [("Tom", "he", "his"), ("Ben", "he", "his"), ("Max", "he", "his"), ("Sam", "he", "his")]
PLACES = ["park", "garden", "forest", "house by the sea", "kitchen", "old barn"]
THINGS = ["ball", "hat", "kite", "book", "shell", "spoon", "boat", "bell", "box", "drum"]
LOOKS = ["red", "blue", "big", "little", "shiny", "old", "soft", "yellow"]
ANIMALS = ["dog", "cat", "bird", "frog", "rabbit", "duck", "fox", "mouse"]
FEELINGS = ["happy", "sad", "tired", "hungry", "scared", "curious"]
FOODS = ["apple", "cake", "carrot", "cookie", "pear", "sandwich"]


def a(word: str) -> str:
    """The word with its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def story(rng: random.Random) -> str:
    """One story of a child, a thing and an animal."""
    name, they, their = rng.choice(CHILDREN)
    place, thing, look, animal = (rng.choice(words) for words in (PLACES, THINGS, LOOKS, ANIMALS))
    feeling, food = rng.choice(FEELINGS), rng.choice(FOODS)
    They, thing_seen = they.capitalize(), f"{a(look)} {thing}"
    begin = rng.choice(
        [
            f"Once upon a time, there was a child named {name}. {name} liked to play in the {place}.",
            f"One day, {name} went to the {place}. The sun was warm and {name} was glad.",
            f"{name} lived near the {place}. Every day {they} went there to play.",
        ]
    )
    middle = rng.choice(
        [
            f"{They} had {thing_seen}. {They} loved {their} {thing} very much. "
            f"But one day the {thing} was gone. {name} looked under the bed and behind the door. "
            f'Then {they} met {a(animal)}. "Did you see my {thing}?" asked {name}. '
            f'"Yes," said the {animal}. "Your {thing} is in the tree." They got the {thing} together.',
            f"There {they} saw {a(animal)}. The {animal} was {feeling}. "
            f'"Why are you {feeling}?" asked {name}. "I found {thing_seen}," said the {animal}, '
            f'"and I do not know whose {thing} it is." "It is my {thing}!" said {name}. "Thank you!"',
            f"There {they} met {a(animal)} who was hungry. {name} had {a(food)}. "
            f'"Do you want my {food}?" asked {name}. "Yes, please," said the {animal}. '
            f"The {animal} ate the {food}. Then the {animal} gave {name} {thing_seen}.",
            f"It was dark, and {name} heard a noise. {They} was scared. But it was only {a(animal)} with "
            f'{thing_seen}. "Do not be scared," said the {animal}. "Come and play with my {thing}."',
        ]
    )
    end = rng.choice(
        [
            f"{name} and the {animal} were friends from that day on.",
            f"{name} went home and told {their} mom about the {animal} and the {thing}. Mom smiled.",
            f"They played with the {thing} until the sun went down. Then {name} went home to sleep.",
            f"{name} was very happy. {They} learned that it is good to be kind.",
        ]
    )
    return f"{begin} {middle} {end}"


def main() -> None:
    rng = random.Random(0)
    for _ in range(6000):
        sys.stdout.write(f"{story(rng)}\n<|endoftext|>\n")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Made-up problem sets in which every leak, duplicate and unusable problem is known."""

from __future__ import annotations

import random

from megatron_rl.data.curation.items import Item
from megatron_rl.data.problems import Problem
from megatron_rl.data.rows import Row

GOOD = [
    ("Let (a, b) be a pair of integers with a(b) = 12. Find a + b.", "7"),
    ("ABCD is a square with side 3. Find the area of triangle ABC.", "4.5"),
    ("In triangle ABC, $\\angle{A} + \\angle{B} = 100^\\circ$. Find $\\angle{C}$.", "80"),
    ("The graph of y = x^2 - 4 meets the x-axis at two points. Find their distance.", "4"),
    ("Figure out how many primes lie below 30.", "10"),
    ("What is the probability that a random statement of 3 coin flips is true?", "\\frac{1}{8}"),
    ("Let f(a) = a + 1 and g(b) = 2b. Compute f(g(3)).", "7"),
    ("A part of a rope, 3/4 of it, is 12 m long. How long is the rope?", "16"),
    ("Two conditions hold:\n1. n is prime\n2. n is even\nFind n.", "2"),
    ("Point A. lies on a line. How far is it from B if AB = 3?", "3"),
    ("Solve x^2 = 2 for positive x.", "\\sqrt{2}"),
    ("How many true sentences can be formed from 4 symbols?", "24"),
    ("Prove that n^2 + n is even and find its value for n = 3.", "12"),
    ("Which integer is the square of 12?", "144"),
    ("Players A, B, C, D and E sit in a row. How many orders are there?", "120"),
    ("Show how many ways there are to choose 2 of 5.", "10"),
    ("Let S be the set {1, 2, 3}. How many subsets has S?", "8"),
    ("The caf\u00e9 sells 3 \u00d7 4 cakes. How many?", "12"),
    ("Rows (1) to (5) of a table have 6 cells each. How many cells are there?", "30"),
    ("A picture frame is 3 by 4. Find its diagonal.", "5"),
]
UNUSABLE = {
    "bad_characters": [("What is 3 \ufffd 4?", "7"), ("Compute 2\x00+2.", "4"), ("Find \ue000 + 1.", "2")],
    "no_answer": [("What is the ball's mass?", "N/A"), ("Explain gravity.", "answers vary"),
                  ("What?", "See solution"), ("Sum it.", "none.")],
    "image": [("Find the shaded area ![](a.png)", "3"), ("In the figure below, AB = 3. Find BC.", "4"),
              ("What is x in the diagram?", "2"), ("[asy] draw((0,0)); [/asy] Find the area.", "1"),
              ("A circle is drawn as shown. Find r.", "5"), ("The graph below has how many edges?", "6"),
              ("<img src='x'> What is the angle?", "30"), ("See https://a.b/c.png and find x.", "1")],
    "true_false": [("True or false: 7 is prime.", "7"), ("Is 91 a prime?", "No"), ("Squares are rectangles.", "True"),
                   ("2 + 2 = 5. Is this correct?", "5"), ("Every prime is odd (yes/no).", "0")],
    "multiple_choice": [("What is 2+2? (A) 3 (B) 4 (C) 5 (D) 6", "B"), ("2+2 =\nA. 3\nB. 4\nC. 5", "B"),
                        ("Which of the following is prime: 4, 6, 7?", "7"),
                        ("$\\textbf{(A)}\\ 1 \\qquad \\textbf{(B)}\\ 2 \\qquad \\textbf{(C)}\\ 3$ How big is x?", "A"),
                        ("The sum is A) 1 B) 2 C) 3 D) 4", "C"), ("The capital is (a) Rome (b) Paris (c) Oslo", "b"),
                        ("Choose the correct value of 3!.", "6")],
    "multi_part": [("(a) Find 1+1. (b) Find 2+2.", "2, 4"), ("(i) Compute f(1). (ii) Compute f(2).", "1; 2"),
                   ("Let n = 4.\n1. How many divisors has n?\n2. What is their sum?", "3 and 7"),
                   ("Part A: what is x? Part B: what is y?", "1, 2"),
                   ("A car drives. (a) How far? (b) How fast? (c) How long?", "1, 2, 3")],
    "proof": [("Prove that the square root of 2 is irrational.", "proof by contradiction"),
              ("Show that n^3 - n is divisible by 6.", "induction")],
}

_PEOPLE = ("Maria", "Tom", "the farmer", "a baker", "Lena", "the pilot", "an engineer", "Ravi")
_THINGS = ("apples", "marbles", "tickets", "stamps", "bricks", "coins", "books", "tulips")
_STORIES = (
    "{who} buys {n} boxes of {what}, each with {m} pieces, and gives {k} of them to friends. How many {what} are left?",
    "On a farm {who} stacks {what} in {n} rows of {m}, then adds {k} more on top. Find the total number of {what}.",
    "A train carries {n} crates. In every crate are {m} {what}. {who} removes {k}. How many {what} remain on board?",
    "If {who} earns {m} coins a day for {n} days and spends {k} on {what}, how many coins does {who} have in the end?",
    "Two friends share {what}. {who} has {n} times as many as the other with {m}, and loses {k}. How many has {who}?",
    "The price of {what} rises by {k} percent every year. {who} paid {m} for them {n} years ago. What are they now?",
    "{who} paints a wall of {n} by {m} meters and leaves out {k} square meters for {what}. What area is painted?",
    "From a bag of {n} red and {m} blue {what}, {who} draws {k} without looking. In how many ways can that happen?",
)


def item(number: int, text: str, answer: str = "1") -> Item:
    name = f"set.jsonl:{number}"
    return Item(Row(name, name, {"prompt": text, "answer": answer}), Problem(name, text, answer, "math"))


def items(texts) -> list[Item]:
    return [item(number, *(text if isinstance(text, tuple) else (text,))) for number, text in enumerate(texts, start=1)]


def stories(count: int, seed: int) -> list[str]:
    """Distinct word problems; many share their wording and differ in numbers, people and things."""
    rng, texts = random.Random(seed), {}
    while len(texts) < count:
        texts[rng.choice(_STORIES).format(who=rng.choice(_PEOPLE), what=rng.choice(_THINGS), n=rng.randint(2, 99),
                                          m=rng.randint(2, 99), k=rng.randint(2, 99))] = None
    return list(texts)


def disguised(text: str, rng: random.Random) -> str:
    """The same problem in other characters: exact duplicates after normalisation."""
    return rng.choice((text.upper(), text.replace(" ", "  "), text.replace(",", " ,"), f"  {text}\n",
                       text.replace(".", " ."), text.replace("?", "")))


def reworded(text: str, rng: random.Random) -> str:
    """The same problem in slightly other words."""
    words = text.split()
    edits = rng.sample((
        lambda: words.insert(0, "Suppose:"), lambda: words.append("Explain."),
        lambda: words.insert(rng.randrange(len(words)), "then"), lambda: words.append("Give a number."),
        lambda: words.__setitem__(-1, "exactly " + words[-1]),
    ), 2)
    for edit in edits:
        edit()
    return " ".join(words)


def rates(found: set, wanted: set) -> tuple[float, float]:
    """(recall, precision)."""
    return len(found & wanted) / len(wanted), len(found & wanted) / max(1, len(found))

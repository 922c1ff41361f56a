"""Two more domains for the quick start's model, in its 96-token vocabulary: code.jsonl, science.jsonl beside this file.

code: a linear function from two of its values; science: a sum of two units in the smaller one. Both are all there
are of their kind, in one order; `python examples/table3_domain_conflict/problems.py` writes them again.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CONNECTIVES = (" so", " then", " now", " next")
UNITS = (("h", "min", 60), ("min", "sec", 60), ("d", "h", 24), ("m", "cm", 100), ("km", "m", 1000), ("kg", "g", 1000),
         ("cm", "mm", 10))


def code(rng: random.Random) -> Iterator[dict[str, str]]:
    """`Q:f(2)=12,f(3)=15` -> `so15-12=3 then3*2=6 so12-6=6 so\\boxed{3*x+6}`; 360 functions and places."""
    for slope, offset, place in itertools.product(range(1, 10), range(10), range(1, 5)):
        first, second = slope * place + offset, slope * (place + 1) + offset
        steps = f"{second}-{first}={slope}", f"{slope}*{place}={slope * place}", f"{first}-{slope * place}={offset}"
        yield row(f"Q:f({place})={first},f({place + 1})={second}", steps, f"{slope}*x+{offset}", "code", rng)


def science(rng: random.Random) -> Iterator[dict[str, str]]:
    """`Q:12 h+5 min in min` -> `now12*60=720 so720+5=725 so\\boxed{725}`; 756 sums."""
    for (large, small, ratio), number, more in itertools.product(UNITS, range(1, 13), range(1, 10)):
        steps = f"{number}*{ratio}={number * ratio}", f"{number * ratio}+{more}={number * ratio + more}"
        yield row(f"Q:{number} {large}+{more} {small} in {small}", steps, str(number * ratio + more), "science", rng)


def row(question: str, steps: tuple[str, ...], answer: str, domain: str, rng: random.Random) -> dict[str, str]:
    response = "".join(rng.choice(CONNECTIVES) + part for part in (*steps, f"\\boxed{{{answer}}}"))
    return {"prompt": f"{question}\nA:", "answer": answer, "response": response, "domain": domain}


def lines(domain: str) -> str:
    """The text of <domain>.jsonl: every problem once, shuffled by a fixed seed."""
    rng = random.Random(domain)
    rows = list({"code": code, "science": science}[domain](rng))
    rng.shuffle(rows)
    return "".join(json.dumps(each) + "\n" for each in rows)


if __name__ == "__main__":
    for name in ("code", "science"):
        (FOLDER / f"{name}.jsonl").write_text(lines(name), encoding="ascii")

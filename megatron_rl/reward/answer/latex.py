"""Removes markup from a LaTeX answer: everything that changes how it looks and not what it says."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

__all__ = ["Unreadable", "arguments", "closing", "closing_brace", "plain", "simplify", "undress"]

OPEN, CLOSE = "([{\u27e6", ")]}\u27e7"  # the last pair stands for \\{ and \\}
MAX_LENGTH, MAX_DEPTH = 5000, 60
FUNCTIONS = ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "arcsin", "arccos", "arctan",
             "ln", "log", "lg", "exp", "min", "max", "gcd", "lcm", "det", "lim")
NAMES = ("alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|"
         "upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega")
_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b",
                              "0123456789+-")
_SUBSCRIPTS = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789")
_CHARACTERS = {
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": r"\div ",
    "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx ",
    "\u2208": r"\in ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2205": r"\emptyset ", "\u00b1": r"\pm ",
    "\u00b0": r"^\circ ", "\u00ba": r"^\circ ", "\u2a7e": r"\ge ", "\u2267": r"\ge ", "\u2a7d": r"\le ",
    "\u2266": r"\le ", "\u27e8": "(", "\u27e9": ")", "\u3001": ",",
    "\u2192": r"\to ", "\u27f6": r"\to ", "\u21cc": r"\rightleftharpoons ", "\u221a": r"\sqrt ",
    "\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}", "\u211d": r"\mathbb{R}",
    "\u00b5": r"\mu ", "\u2126": r"\Omega ", "\u212b": r"\AA ", "\u00c5": r"\AA ", "\u210f": r"\hbar ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2002": " ", "\u2003": " ", "\u200b": "", "\ufeff": "",
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u20ac": r"\text{euro} ", "\u00a3": r"\text{pound} ",
    **dict(zip("\u03b1\u03b2\u03b3\u03b4\u03b5\u03b6\u03b7\u03b8\u03ba\u03bb\u03bc\u03bd\u03be\u03c0\u03c1\u03c3\u03c4"
               "\u03c6\u03c7\u03c8\u03c9\u0394\u03a9\u0393\u03a6\u03a8",
               (rf"\{name} " for name in "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho "
                "sigma tau phi chi psi omega Delta Omega Gamma Phi Psi".split()), strict=True)),
}
_PLAIN = {chr(code): unicodedata.normalize("NFKC", chr(code))
          for code in (*range(0xff01, 0xff5f), *range(0x1d400, 0x1d800), 0x212f)}  # full width, mathematical letters
_FRACTIONS = {chr(code): "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", chr(code)).split("\u2044"))
              for code in range(0x2150, 0x215f)}
_TRANSLATE = str.maketrans({**_PLAIN, **_FRACTIONS, **_CHARACTERS, **dict.fromkeys("\u2010\u2011\u2014\ufe63", "-")})
_SPACE = r"(?:\\[,;:! ]|~|\s)"
_GROUPED = re.compile(rf"(?<![\d.,}}])\d{{1,3}}(?:(?:{_SPACE}|\{{,\}}|,\\!){_SPACE}*\d{{3}})+(?![\d])")
_TEXT = r"\\(?:text|textrm|textbf|textit|textsf|texttt|textup|textnormal|emph|mathrm|mathbf|mathit|mathsf|mathtt|" \
        r"boldsymbol|pmb|bm|bf|rm|mbox|hbox|" \
        r"operatorname|unit|ce|pu)\*?\s*\{"
_ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"((?i:{'|'.join(_ZEROS)}))s?(?![A-Za-z])")
_VARIABLES = frozenset("abcefijnopqrvwxyz")  # no unit has these letters alone


def _power_of_ten(scale: re.Match[str]) -> str:
    return f"\\cdot 10^{{{_ZEROS[scale[1].lower()]}}}"


def _over(name: str) -> Callable[[re.Match[str]], str]:
    """TeX's {a \\over b}, or the same without braces, as a command."""
    return lambda match: f"\\{name}{{{(match[1] or match[3] or '').strip()}}}{{{(match[2] or match[4] or '').strip()}}}"


_REWRITES = tuple((re.compile(pattern), text) for pattern, text in (
    (r"\\(?:left|right)(?![A-Za-z])\s*\.", " "),
    (r"\\(?:left|right|middle|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|Biggl?|Biggr)(?![A-Za-z])", ""),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|tiny|scriptsize|footnotesize|small|normalsize|"
     r"large|Large|LARGE|huge|Huge)(?![A-Za-z])|\\(?:text)?color\s*\{[^{}]*\}", " "),
    (r"\\\\\[-?[\d.]+\s*(?:pt|em|ex|mm|cm)\]", r"\\\\ "), (r"\\begin\{array\}\s*\{[lcr|\s]*\}", r"\\begin{matrix}"),
    (r"\\end\{array\}", r"\\end{matrix}"), (r"[(\[]\s*\\begin\{matrix\}(.*?)\\end\{matrix\}\s*[)\]]",
                                           r"\\begin{pmatrix}\1\\end{pmatrix}"),
    (r"(?<!\\)\\(?:[,;:! ]|quad(?![A-Za-z])|qquad(?![A-Za-z])|phantom\{[^{}]*\}|hspace\*?\{[^{}]*\})|~", " "),
    (r"\\(?:[dtcsx]|nice)frac(?![A-Za-z])", r"\\frac"), (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}|^([^{}]*)\\over(?![A-Za-z])([^{}]*)$", _over("frac")),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}|^([^{}]*)\\choose(?![A-Za-z])([^{}]*)$", _over("binom")),
    (r"\\(vec|hat|bar|overline|dot|ddot|tilde)\s+([A-Za-z])(?![A-Za-z])", r"\\\1{\2}"),
    (r"\\(?:leq|leqslant)(?![A-Za-z])|<=", r"\\le "), (r"\\(?:geq|geqslant)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\(?:neq)(?![A-Za-z])|!=", r"\\ne "), (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"),
    (r"\\(?:rightarrow|longrightarrow|Rightarrow|xrightarrow\{\})(?![A-Za-z])|->", r"\\to "),
    (r"\\lbrace(?![A-Za-z])", r"\\{"), (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\lbrack(?![A-Za-z])", "["), (r"\\rbrack(?![A-Za-z])", "]"),
    (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"), (r"\\(?:langle|rangle)(?![A-Za-z])",
                                                    lambda match: "(" if "lang" in match[0] else ")"),
    (r"\\(?:cdot|times|ast)(?![A-Za-z])|\*", r"\\cdot "), (r"\\cdot\s+\\cdot ", "^"),
    (r"\\(?:varnothing|empty)(?![A-Za-z])", r"\\emptyset "), (r"\\(?:degree|textdegree)(?![A-Za-z])", r"^\\circ "),
    (r"\\(?:Bbb|mathbf)\s*\{?R\}?", r"\\mathbb{R}"), (r"\\%", "%"), (r"\{,\}", ","),
    (r"\\infin(?![A-Za-z])|(?<![A-Za-z\\])(?:infinity|oo)(?![A-Za-z])", r"\\infty "),
    (r"\\\{", "\u27e6"), (r"\\\}", "\u27e7"),
    (r"\\(?:colon|ratio)(?![A-Za-z])", ":"), (r"\\(?:arc|operatorname\{arc)(sin|cos|tan)\}?", r"\\arc\1"),
    (r"(?<![A-Za-z\\])(sqrt|pi)(?![A-Za-z])", r"\\\1 "),
    (rf"(?<![A-Za-z\\])({'|'.join(FUNCTIONS)})(?=\s*\()", r"\\\1"),
    (rf"(?<=\d) {_SCALE.pattern}", _power_of_ten),
    (r"\^\s*\{\s*(\\text\{\s*(?:st|nd|rd|th)\s*\})\s*\}|\^\s*(\\text\{\s*(?:st|nd|rd|th)\s*\})", r"\1\2"),
    (r"\^\s*\{\s*\\circ\s*\}|(?<=\d)\^\s*(?:\{\s*o\s*\}|o(?![A-Za-z]))", r"^\\circ "),
    (r"\^\s*\{\s*(?:\\prime\s*)+\}|\^\s*\\prime", lambda match: "'" * match[0].count("prime")),
    (r"\\overline\s*\{\s*([A-Za-z])\s*\}", r"\\bar{\1}"),
))
_ARITY = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1}


class Unreadable(ValueError):
    """The text is not of the form that a reader expects; str() says why."""


def closing(text: str, start: int) -> int:
    """The index of the bracket that closes the one at `start`. Any shape may close it: [0,1).

    Unreadable without one.
    """
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in OPEN) - (text[place] in CLOSE)
        if depth == 0:
            return place
    raise Unreadable(f"a {text[start]} is not closed")


def balanced(text: str) -> bool:
    """Whether every brace is closed, so that the text can stand in a box. Escaped braces do not count."""
    depth = 0
    for token in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth < 0:
            return False
    return depth == 0


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def undress(text: str) -> str:
    """The answer without wrappers, spacing and synonyms. Digits of one number stand together: 10\\,000 is 10000.

    Words stay in \\text{...}; one letter, a number or a known function in it is taken out. Unreadable if empty or
    with braces that do not close.
    """
    if len(text) > MAX_LENGTH or _depth(text) > MAX_DEPTH:
        raise Unreadable(f"it has more than {MAX_LENGTH} characters or {MAX_DEPTH} brackets in one another")
    if not balanced(text):
        raise Unreadable("its braces do not close")
    text = arguments(simplify(_outside(_unicode(text).strip())))
    while text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    text = re.sub(r"[\s.,;]+$", "", text) if not text.endswith("..") else text
    if not re.search(r"[^\s{}$]", re.sub(r"\\text\{\s*\}", "", text)):
        raise Unreadable("nothing is left of it without its dressing")
    return text.strip()


def simplify(text: str) -> str:
    """The text with one spelling for each thing, at any place in a longer text."""
    text = re.sub(r"(?<!\\)(?:\$|\\[()\[\]])", " ", _unicode(text))
    text = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _texts(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def closing_brace(text: str, start: int) -> int:
    """The index of the brace that closes the one at `start`; other brackets do not count."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.start()
    raise Unreadable("a { is not closed")


def arguments(text: str) -> str:
    """Braces around every argument of \\frac, \\binom and \\sqrt, and round what plain sqrt(...) covers.

    A command whose arguments cannot be found stays as it is.
    """
    pieces, place = [], 0
    for match in re.finditer(r"\\(?:frac|binom|sqrt)(?![A-Za-z])\s*", text):
        if match.start() < place:
            continue
        try:
            piece, end = _with_arguments(text, match[0].strip(), match.end())
        except Unreadable:
            continue
        pieces += [text[place:match.start()], piece]
        place = end
    return "".join([*pieces, text[place:]])


def _with_arguments(text: str, name: str, end: int) -> tuple[str, int]:
    """(the command with its arguments in braces, where they end)."""
    pieces = [name]
    if name == "\\sqrt" and text[end:end + 1] == "[":
        start, end = end, closing(text, end) + 1
        pieces.append(text[start:end])
    for _ in range(_ARITY[name]):
        argument, end = _argument(text, end, plain=name == "\\sqrt")
        pieces.append("{" + arguments(argument) + "}")
    return "".join(pieces), end


def _argument(text: str, start: int, *, plain: bool) -> tuple[str, int]:
    while text[start:start + 1] == " ":
        start += 1
    if text[start:start + 1] == "{":
        end = closing_brace(text, start)
        return text[start + 1:end], end + 1
    if plain and text[start:start + 1] == "(":
        end = closing(text, start)
        return text[start + 1:end], end + 1
    match = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})*|[A-Za-z0-9]").match(text, start)
    if match is None:
        raise Unreadable("a fraction or root lacks an argument")
    return match[0], match.end()


def plain(text: str) -> str:
    """An undressed text of words or symbols without type commands and braces, with single spaces."""
    text = re.sub(_TEXT, "{", text)
    text = re.sub(r"(?<!\\)[{}]", "", text)
    return " ".join(text.split()).strip(" .,;")


def _unicode(text: str) -> str:
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+",
                  lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[\u2080-\u2089]+", lambda match: "_{" + match[0].translate(_SUBSCRIPTS) + "}", text)
    text = re.sub("\u221a\\s*(\\d+)", r"\\sqrt{\1}", text)
    return text.translate(_TRANSLATE)


def _outside(text: str) -> str:
    """The text without a box around the whole, and without a sign that says "this is mathematics"."""
    text = re.sub(r"^(?:\$|\\[\[(])+|(?<!\\)(?:\$|\\[\])])+$", "", text).strip()
    box = re.match(r"\\(?:boxed|fbox|framebox)\s*\{", text)
    return _outside(text[box.end():-1].strip()) if box and closing_brace(text, box.end() - 1) == len(text) - 1 else text


def _texts(text: str) -> str:
    """Every command for words as \\text{...}; what is no word is taken out of it."""
    pieces, place = [], 0
    for match in re.finditer(_TEXT, text):
        if match.start() < place:
            continue
        try:
            end = closing_brace(text, match.end() - 1)
        except Unreadable:  # in a question; the braces of an answer close
            continue
        inner = _texts(text[match.end():end])
        before = text[place:match.start()]
        pieces.append(before + " " if re.search(r"\\[A-Za-z]+$", before) else before)
        after_number = not re.match(r"\\(?:math(?!rm)|b|operatorname)", match[0]) and re.search(
            r"[\d})](?:\\[,;:! ]|~|\s)*$", text[:match.start()]) is not None
        pieces.append(_one_text(inner, after_number=after_number))
        place = end + 1
    return "".join([*pieces, text[place:]])


def _one_text(inner: str, *, after_number: bool) -> str:
    """A word stays in its \\text, as does a letter behind a number, which is a unit."""
    word = inner.strip()
    if word in FUNCTIONS and not (after_number and word in ("min", "sec")):
        return f"\\{word} "
    if word == "infinity":
        return "\\infty "
    number = re.match(r"[\d.,]*\d\s*(?=[A-Za-z])", word)
    if number:
        return number[0] + _after_number(word[number.end():])
    if after_number and re.search(r"[A-Za-z]", word):
        return _after_number(inner)
    if re.fullmatch(r"[A-Z](?:\s*,\s*[A-Z])+", word):
        return inner
    if re.search(r"[A-Za-z]", word) is None or re.search(r"[\\+=_^]", word) or (
            re.fullmatch(r"\(?[A-Za-z]\)?", word)):
        return inner if re.fullmatch(r"[^\\]?", word) else f"{{{inner}}}" if "(" not in word else inner
    return f"\\text{{{inner}}}"


def _after_number(said: str) -> str:
    """The words behind a number: x is a variable, a million is a power of ten, and a second number is no word."""
    word = said.strip()
    scale = _SCALE.match(word)
    if scale:
        return _power_of_ten(scale) + _after_number(word[scale.end():])
    if word in _VARIABLES or word == "pi":
        return f"{word} "
    pieces = re.split(r"(\b(?:and|or)\b(?=\s+-?\d|\s*$)|(?<![\w^./{(*:-])-?\d[\d.,]*(?<![.,]))", said)
    return "".join(piece if not piece.strip() or piece[-1].isdigit() else f"\\text{{{piece}}}" for piece in pieces)

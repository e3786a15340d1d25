"""What the texts of a feature say that others do not: contrastive words and pairs of words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from transfer.core.span import WORD, Span

STOP = frozenset(
    """
    a an and are as at be but by can do for from has have how i if in is it me my not of on or so that the their them
    they this to up was we what when which who will with would you your i'm it's i've
    """.split()  # noqa: SIM905 - a paragraph reads better than ninety quoted words
)


def terms(text: str, pairs: bool = False) -> set[str]:
    """Words of a text, lower case; with ``pairs`` also two in a row, such as ``garden fence``."""
    words = [m.group().casefold() for m in WORD.finditer(text)]
    return set(words) | ({f"{a} {b}" for a, b in pairwise(words)} if pairs else set())


class WordCounts:
    """In how many distinct texts of a corpus each word stands: the background that descriptions contrast with.

    Args:
        texts: The background.
        pairs: Also count pairs of words in a row.
    """

    def __init__(self, texts: Iterable[str], *, pairs: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self.n = 0
        self.pairs = pairs
        for text in texts:
            self.counts.update(terms(text, pairs))
            self.n += 1

    def contrast(self, texts: Sequence[str], n: int = 4) -> list[str]:
        """The ``n`` terms that stand in ``texts`` most beyond the background; see ``scored``.

        A word that is part of a better pair is left out, and so is a pair that a better word of its own is part of.
        """
        chosen: list[str] = []
        for term, _ in self.scored(texts):
            if not any(set(term.split()) & set(c.split()) for c in chosen if " " in c or " " in term):
                chosen.append(term)
            if len(chosen) == n:
                break
        return chosen

    def scored(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """Terms that stand in ``texts`` more often than in the rest: log-odds with a Dirichlet prior, as z-scores.

        The prior is the background itself (Monroe, Colaresi and Quinn 2008), so rare terms need more evidence.
        ``texts`` are taken to be part of the background. Terms in fewer than two of them, function words, and pairs
        with one are left out.

        Returns:
            Terms with z > 1, best first.
        """
        inside = Counter(w for t in texts for w in terms(t, self.pairs))
        scored = []
        for term, a in inside.items():
            if a < min(2, len(texts)) or len(term) < 2 or not STOP.isdisjoint(term.split()):
                continue
            b = max(self.counts[term] - a, 0)
            prior = (self.counts[term] + 1) / (self.n + 2)
            rest = max(self.n - len(texts), 0)
            odds = math.log((a + prior) / (len(texts) - a + 1 - prior)) - math.log((b + prior) / (rest - b + 1 - prior))
            z = odds / math.sqrt(1 / (a + prior) + 1 / (b + prior))
            if z > 1:
                scored.append((-z, term))
        return [(term, -z) for z, term in sorted(scored)]


def describe(spans: Sequence[Span], background: WordCounts, promotes: Sequence[str] = ()) -> str:
    """One line: the words it fires on, what its texts share against the background, the tokens it makes likelier."""
    if not spans:
        return "never fires on this corpus"
    words = Counter(w for s in spans if (w := s.word()))
    common = [w for w, n in sorted(words.items(), key=lambda x: (-x[1], x[0])) if n > 1][:3]
    on = common or [s.word() or s.token.strip() for s in spans[:2]]
    about = [w for w in background.contrast([s.text for s in spans]) if w not in on]
    line = "fires on " + ", ".join(f"“{w}”" for w in dict.fromkeys(on))
    line += f"; texts with: {', '.join(about)}" if about else ""
    return line + (f"; promotes: {', '.join(promotes)}" if promotes else "")

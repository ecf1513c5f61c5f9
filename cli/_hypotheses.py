"""What a search looked at, drawn: the tree of hypotheses and each step's candidates, for a terminal and as HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

import pyrformer as pf

Decode = Callable[[list[int]], str]


@dataclass
class Branch:
    """A run of tokens without a fork: its text, its tokens, its probability given what precedes it, and what follows.

    ``rank`` counts the results that end here from 1; ``kept`` says whether a result goes through here.
    """

    text: str
    tokens: int
    probability: float
    rank: int | None = None
    score: float | None = None
    kept: bool = False
    children: list[Branch] = field(default_factory=list)


@dataclass
class Moment:
    """One step of one result: the chosen token, its probability, and (token, probability, whether it could be drawn) of
    the candidates."""

    token: str
    probability: float
    candidates: list[tuple[str, float, bool]]


def visible(text: str) -> str:
    """A token's text with its spaces at the ends, its line ends and its tabs made visible."""
    inner = text.strip(" ")
    if not inner:
        return "␣" * len(text) if text else "∅"
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    shown = "␣" * before + inner + "␣" * after
    return shown.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")


def _prefixes(out: pf.Generation) -> list[list[tuple[int, ...]]]:
    """The tokens that each row of each step had added, for a search of one prompt."""
    found: list[list[tuple[int, ...]]] = []
    for i, step in enumerate(out.steps):
        if i == 0:
            found.append([()] * len(step.tokens))
        else:
            rows = zip(step.parents, step.tokens, strict=True)
            found.append([(*found[-1][parent], token) for parent, token in rows])
    return found


def beam_tree(out: pf.Generation, decode: Decode) -> Branch:
    """The tree of all hypotheses that the search followed for its one prompt, runs without forks joined."""
    logprobs: dict[tuple[int, ...], float] = {}
    for step, prefixes in zip(out.steps, _prefixes(out), strict=True):
        logprobs |= {prefix: p for prefix, p in zip(prefixes, step.logprobs, strict=True) if prefix}
    results: dict[tuple[int, ...], tuple[int, float | None]] = {}
    kept: set[tuple[int, ...]] = {()}
    for rank, (ids, values, score) in enumerate(zip(out.ids, out.token_logprobs, out.scores, strict=True), 1):
        for i, value in enumerate(values, 1):
            logprobs[tuple(ids[:i])] = value
            kept.add(tuple(ids[:i]))
        results[tuple(ids)] = (rank, score)
    children: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prefix in logprobs:
        children.setdefault(prefix[:-1], []).append(prefix)

    def branch(start: tuple[int, ...]) -> Branch:
        """The run that begins with the last token of ``start``."""
        end, total = start, logprobs.get(start, 0.0)
        while start and end not in results and len(following := children.get(end, [])) == 1:
            end = following[0]
            total += logprobs[end]
        rank, score = results.get(end, (None, None))
        below = sorted(children.get(end, []), key=lambda p: -logprobs[p])
        text = _text(decode, list(start[:-1]), list(end))
        probability = math.exp(total)
        tokens = len(end) - len(start) + 1
        return Branch(text, tokens, probability, rank, score, end in kept, [branch(p) for p in below])

    return branch(())


def _text(decode: Decode, before: list[int], whole: list[int]) -> str:
    """The text that ``whole`` adds to ``before``; of what is no prefix of the other, the tokens' own text."""
    first, both = decode(before), decode(whole)
    return both[len(first) :] if both.startswith(first) else decode(whole[len(before) :])


def moments(out: pf.Generation, result: int, decode: Decode) -> list[Moment]:
    """The steps of one result of a search with one prompt."""
    ids, logprobs = out.ids[result], out.token_logprobs[result]
    found = []
    for i, (step, prefixes) in enumerate(zip(out.steps, _prefixes(out), strict=True)):
        if i >= len(ids):
            break
        row = prefixes.index(tuple(ids[:i]))
        shown = [
            (_text(decode, ids[:i], [*ids[:i], c.token]), c.probability, c.weight > 0)
            for c in step.candidates[row]
        ]
        found.append(Moment(_text(decode, ids[:i], ids[: i + 1]), math.exp(logprobs[i]), shown))
    return found


def ids_as_text(ids: list[int]) -> str:
    """What stands for a text where there is no tokenizer."""
    return "".join(f" {i}" for i in ids)


# ---- the terminal ---------------------------------------------------------------------------------------------------


def draw_tree(root: Branch, prompt: str) -> RenderableType:
    """The tree of hypotheses; results bold with their rank, what was given up dim."""
    tree = Tree(Text(visible(prompt), style="cyan", overflow="ellipsis"))

    def add(parent: Tree, branch: Branch) -> None:
        label = Text(visible(branch.text), style="" if branch.kept else "dim")
        label.append(f"  {branch.probability:.3g}", style="green" if branch.kept else "dim green")
        if branch.rank is not None:
            label.append(f"  {_result(branch)}", style="bold")
        node = parent.add(label)
        for child in branch.children:
            add(node, child)

    for child in root.children:
        add(tree, child)
    return Group(
        tree, Text("Numbers: probability of the run given what precedes it; #: results.", style="dim")
    )


def _result(branch: Branch) -> str:
    return f"#{branch.rank}" + ("" if branch.score is None else f" score {branch.score:.4f}")


def draw_moments(steps: list[Moment]) -> RenderableType:
    """A line a step: the chosen token, its probability as a bar, and the candidates; those cut off are dim."""
    lines = [_line("step", Text("token"), Text("p"), Text("candidates (dim: cannot be drawn)"))]
    lines[0].stylize("dim")
    for number, step in enumerate(steps, 1):
        candidates = Text()
        for token, p, allowed in step.candidates:
            chosen = token == step.token
            candidates.append(visible(token), style="bold" if chosen else "" if allowed else "dim")
            candidates.append(f" {p:.2f}  ", style="green" if allowed else "dim green")
        bar = Text(f"{step.probability:.3f} {_bar(step.probability, 8)}", style="green")
        lines.append(_line(str(number), Text(visible(step.token), style="bold"), bar, candidates))
    return Group(*lines)


def _line(number: str, token: Text, bar: Text, candidates: Text) -> Text:
    """One line, cut off where the terminal ends."""
    line = Text(f"{number:>4}  ", no_wrap=True, overflow="ellipsis")
    for part, width in ((token, 12), (bar, 14)):
        part.truncate(width, overflow="ellipsis", pad=True)
        line.append(part).append("  ")
    return line.append(candidates)


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()).ljust(width)


# ---- HTML -----------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8886; --bar: #2a9d5c55; --kept: #2a9d5c; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; white-space: pre-wrap; }
ul.tree, ul.tree ul { list-style: none; margin: 0; padding-left: 1.2rem; border-left: 1px solid var(--line); }
ul.tree li { margin: .15rem 0; }
ul.tree li.lost > .run { opacity: .5; }
.p { font-size: .8em; color: var(--kept); margin-left: .5em; font-variant-numeric: tabular-nums; }
.rank { font-weight: 600; margin-left: .5em; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .2rem .6rem; border-top: 1px solid var(--line); }
td.n { font-variant-numeric: tabular-nums; text-align: right; }
.c { display: inline-block; margin: 0 .3rem .2rem 0; padding: 0 .4em; border-radius: .3em;
     background: linear-gradient(to right, var(--bar) var(--w), #8882 0); }
.c.chosen { outline: 1.5px solid var(--kept); }
.c.cut { opacity: .45; }
"""


def page(prompt: str, tree: Branch | None, results: list[list[Moment]]) -> str:
    """A page that needs no other file."""
    parts = [
        "<!doctype html>\n<html lang=en><meta charset=utf-8><title>pyrformer sample</title>",
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>",
        f"<h1>pyrformer sample</h1>\n<p>Prompt: <code>{html.escape(prompt)}</code></p>",
    ]
    if tree is not None:
        parts.append(
            "<h2>Hypotheses</h2><p>Numbers are the probability of a run given what precedes it; faint ones were "
            "given up.</p>"
        )
        parts.append(f"<ul class=tree>{''.join(_branch(b) for b in tree.children)}</ul>")
    for number, steps in enumerate(results, 1):
        title = "Steps" if len(results) == 1 else f"Steps of result {number}"
        parts.append(f"<h2>{title}</h2><table><tr><th>step<th>token<th>p<th>candidates</tr>")
        parts += (_row(i, step) for i, step in enumerate(steps, 1))
        parts.append("</table>")
    return "\n".join(parts) + "\n</html>\n"


def _branch(branch: Branch) -> str:
    rank = "" if branch.rank is None else f"<span class=rank>{html.escape(_result(branch))}</span>"
    run = (
        f"<code>{html.escape(visible(branch.text))}</code><span class=p>{branch.probability:.3g}</span>{rank}"
    )
    below = f"<ul>{''.join(_branch(b) for b in branch.children)}</ul>" if branch.children else ""
    return f"<li class={'kept' if branch.kept else 'lost'}><span class=run>{run}</span>{below}</li>"


def _row(number: int, step: Moment) -> str:
    def chips() -> Iterator[str]:
        for token, p, allowed in step.candidates:
            kinds = "c" + (" chosen" if token == step.token else "") + ("" if allowed else " cut")
            text = f"<code>{html.escape(visible(token))}</code><span class=p>{p:.3f}</span>"
            yield f"<span class='{kinds}' style='--w:{100 * p:.1f}%'>{text}</span>"

    token = f"<code>{html.escape(visible(step.token))}</code>"
    return f"<tr><td class=n>{number}<td>{token}<td class=n>{step.probability:.3f}<td>{''.join(chips())}</tr>"

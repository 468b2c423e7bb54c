"""A tokenizer's own chat template: what it writes of a conversation, and what of that a model must say."""

import re
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.conversations import IMAGE, Turn
from mmcore.ops import require

Written = tuple[str, list[tuple[int, int]]]
"""A conversation as text, and where in it is what is learned."""

_require = partial(require, "ChatTokens")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_DATE = {"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri"}
_REPLACED = "".join(f" | replace('{code}', '{text}')" for code, text in _DATE.items())
_ON_ONE_DAY = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}\n"
"""Before a chat template: it is always the same day, for a sample must not depend on when it is read."""


def _marked(turns: Sequence[Turn]) -> list[Turn]:
    """The turns, whose answers are marks that no text has."""
    return [Turn(x.role, f"\ue000{i}\ue000" if x.role == "assistant" else x.text) for i, x in enumerate(turns)]


def _as_written(answer: str) -> list[str]:
    """An answer, and what templates keep of it that leave out what was thought before."""
    said = answer.rpartition("</think>")[2]
    return [answer, said, said.lstrip("\n"), said.strip()]


def _num_shared(a: Sequence[str], b: Sequence[str]) -> int:
    """With how many equal elements both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


class OwnTemplate:
    """A tokenizer's chat template, found out by rendering conversations whose answers are marks.

    Raises BrokenRecord or ValueError for a template that cannot be learned from.
    """

    def __init__(self, tokenizer: Any, special: Sequence[str]) -> None:
        self.tokenizer, self._special = tokenizer, special
        self._around = self._learned_around()
        self.ends = {end for _, end in self._around.values() if end}
        """What ends an answer."""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """What is given before the answer to the last turn, the same as in `write`."""
        (mark,) = _marked([Turn("assistant", "")])
        before = self._apply([*turns, mark]).partition(mark.text)[0]
        return before.removesuffix(self._around[True][0] or "")

    def write(self, turns: Sequence[Turn], name: str) -> Written:
        """Raises BrokenRecord where the template refuses a conversation or what is said in it; ValueError, with the
        name, where it leaves out answers or images."""
        marked = _marked(turns)
        gaps = self._gaps(marked, f"of conversation {name!r} ")
        text, place, learned = self._apply(turns), len(gaps[0]), []
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        for n, (answer, behind) in enumerate(zip(answers, gaps[1:], strict=True)):
            lead, end = self._around[n == len(answers) - 1]
            written = next((x for x in _as_written(answer) if text.startswith(x + behind, place)), None)
            rewrites = "the tokenizer's chat template rewrites what was said, such as an answer's <think>"
            if written is None or not text.startswith(gaps[0]):
                raise BrokenRecord(f"{rewrites}: --template chatml would keep it")
            if lead is not None:
                is_ended = end is not None and gaps[n].endswith(lead) and behind.startswith(end)
                reason = "the tokenizer's chat template ends the last of several answers alone"
                BrokenRecord.unless(is_ended, f"{reason}: --template chatml ends each")
                learned.append((place - len(lead), place + len(written) + len(end or "")))
            place += len(written) + len(behind)
        return text, learned

    def _gaps(self, turns: Sequence[Turn], of: str = "") -> list[str]:
        """What the template writes around the answers, which are marks."""
        gaps, rest = [], self._apply(turns)
        for turn in turns:
            if turn.role == "assistant":
                before, found, rest = rest.partition(turn.text)
                gaps.append(before)
                what = "the tokenizer's chat template must write each answer {}once, in order, got another text"
                _require(bool(found) and turn.text not in rest, what, of)
        return [*gaps, rest]

    def _learned_around(self) -> dict[bool, tuple[str | None, str | None]]:
        """Of an answer that others follow (False) and of the last (True): what of the template is learned before it,
        None = such an answer is not learned, and behind it, None = nothing ends it.

        Before it that is what the generation prompt leaves out, if it is white space, or what stands with the answer
        between `{% generation %}` marks; else nothing: a role's header or an empty `<think>` is given.
        """
        turns = _marked([Turn("user", "a"), Turn("assistant", ""), Turn("user", "c"), Turn("assistant", "")])
        self._takes_lists = not self._reads_strings(turns[:2])
        before, last = self._gaps(turns[:2])
        try:
            before_more, behind, _ = self._gaps(turns)
        except (BrokenRecord, ValueError):  # conversations of several answers are refused one by one
            before_more, behind = before, last
        end, last_end = self._ends(behind, last)
        what = "the tokenizer's chat template must write an end of an answer, got none in conversation 'probe': {}"
        _require(last_end is not None, what, "choose --template v1, llama_3 or chatml")
        lead = self._lead(turns[:2], before)
        _require(lead is not None, "the tokenizer's chat template must mark the last answer as generated, got {}", None)
        return {False: (self._lead(turns, before_more), end), True: (lead, last_end)}

    def _reads_strings(self, turns: Sequence[Turn]) -> bool:
        """Whether a message's content is a string for the template, and not a list of texts and images."""
        self._takes_lists = False
        try:
            return turns[1].text in self._apply(turns)
        except BrokenRecord:
            return False

    def _lead(self, turns: Sequence[Turn], before: str) -> str | None:
        prompt = self._apply(turns[:1], is_prompt=True)
        is_prompt = before.startswith(prompt)
        start = len(before.rstrip(" "))  # a token may begin with a space, none ends with one
        if is_prompt and not before[len(prompt) :].strip():
            start = min(start, len(prompt))
        if _GENERATION.search(self.tokenizer.get_chat_template()):
            spans = self._render(turns, return_assistant_tokens_mask=True)[1][0]
            begin = next((begin for begin, end in spans if begin <= len(before) < end), None)
            if begin is None:
                return None
            pieces = self._pieces(before)
            shared = pieces[: _num_shared(pieces, self._pieces(prompt))]  # a prompt may open a <think> after it
            start = min(start, max(begin, len(prompt if is_prompt else "".join(shared))))
        return before[start:]

    def _ends(self, behind: str, last: str) -> tuple[str | None, str | None]:
        """What ends an answer that others follow, and the last one, of what is written behind them: what both begin
        with, or each its own special token. White space behind it is no part of it, unless there is nothing else."""
        pieces = [self._pieces(behind), self._pieces(last)]
        num_shared = _num_shared(*pieces)
        others = ["".join(x[num_shared : num_shared + 1]) for x in pieces]
        part = 0 if set(others) & set(self._special) else _num_shared(*others)
        shared = "".join(pieces[0][:num_shared]) + others[0][:part]
        end = shared.rstrip() or shared
        if end.strip(" "):
            return end, end
        firsts = ["".join(x[: 1 + (not x[0].strip())]) for x in pieces]
        own, own_last = (x if x.strip() in self._special else None for x in firsts)
        return own, own_last

    def _pieces(self, text: str) -> list[str]:
        """A text cut before and behind special tokens."""
        cuts = re.compile(f"({'|'.join(map(re.escape, self._special))})")
        return [piece for piece in cuts.split(text) if piece] or [""]

    def _apply(self, turns: Sequence[Turn], *, is_prompt: bool = False) -> str:
        text = self._render(turns, add_generation_prompt=is_prompt)[0][0]
        num_images = sum(turn.text.count(IMAGE) for turn in turns)
        what = "the tokenizer's chat template must write {} {}, got {}"
        _require(text.count(IMAGE) == num_images, what, num_images, IMAGE, text.count(IMAGE))
        return text

    def _content(self, text: str) -> Any:
        """What a message holds."""
        return [{"type": "text", "text": text}] if self._takes_lists else text

    def _render(self, turns: Sequence[Turn], **options: Any) -> Any:
        messages = [{"role": turn.role, "content": self._content(turn.text)} for turn in turns]
        template = _ON_ONE_DAY + self.tokenizer.get_chat_template()
        options |= self.tokenizer.special_tokens_map
        try:
            return render_jinja_template([messages], chat_template=template, **options)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:  # what its expressions raise too
            reason = f"the tokenizer's chat template refuses a conversation: {' '.join(str(error).split())}"
            raise BrokenRecord(reason) from None

"""The words of a caption as COCO's evaluation counts them: Penn Treebank tokens, lower case, without punctuation."""

import re

# the evaluation looks for upper-case brackets after lower-casing, so that -lrb- and its kin stay
_REMOVED = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())
_PARENTHESES = str.maketrans({"(": "-lrb-", ")": "-rrb-"})
_REPLACED: dict[str, str] = (
    {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "€": "$", "£": "#", "¢": "cents"}
    | {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
    | dict.fromkeys('"“”«»‘’', "'")
    | dict.fromkeys("–—―…", "-")
)
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'", "nbsp": " "} | {"ndash": "-", "mdash": "-"}
_ENTITY = re.compile(f"&({'|'.join(_ENTITIES)});")
_CURLY = re.compile(r"’(?=(?:s|m|d|re|ve|ll)\b)|(?<=n)’(?=t\b)", re.IGNORECASE)

# abbreviations whose period is part of the word, in any case, if so capitalized, and before a number
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co
col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov govs hon
inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont
mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pres prof pte ptes pty ptys pvt rd rep reps
rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed wis
wisc wm wyo
"""
_CAPITALIZED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_NUMBERED = "art ca fig figs no nos op pp prop"
# apart from o'clock, d'or, l'eau and their like
_WITH_APOSTROPHE = "ma'am s'mores ne'er e'er hallowe'en hawai'i c'mon c'est n'est li'l ol' 'em 'cause 'till? 'n"
# after these a letter's period ends a sentence
_OPENING = """
A About According Additionally After An As At But He Her Here However If In It Last Many Mr. Ms. More Now Once One Other
Our She Since So Some Such That The Their Then There These They This We What When While Yet You
"""
# one word as written, two as counted
_TWO_WORDS = "can|not gon|na got|ta wan|na gim|me lem|me 't|is 't|was"


def _any(words: str) -> str:
    return "(?:" + "|".join(words.split()) + ")"


# a letter, and a letter or digit; to Python fractions and superscripts are such too
_L, _A = r"[^\W\d_²³¹¼-¾⅐-⅞]", r"[^\W_²³¹¼-¾⅐-⅞]"
_FIRST_OF_TWO = _any(re.sub(r"\|(\S+)", r"(?=\1(?![-_']?\\w))", _TWO_WORDS))
_TWO_IN_ONE = _any(_TWO_WORDS.replace("|", ""))
_OPENERS = _any(_OPENING.replace(".", r"\.")) + "|" + _any(_OPENING.upper().replace(".", r"\."))
_SLASH_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_HYPHENED = r"(?:-(?:(?:[A-Za-z]\.){2,}|[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*))"
# the first that matches wins, so an alternative stands before those that match less
_TOKEN = re.compile(
    rf"""
      (?!(?i:{_TWO_IN_ONE})\s)[A-Za-z]+(?=\s)                                               # most words; for speed
    | https?://[^\s<>"|(){{}}]+ | www\.[^\s<>"|(){{}},]+ | [\w.]+@[\w-]+(?:\.[\w-]+)*       # addresses
    | </?[A-Za-z!][^<>]*> | &\#[0-9]+;                                                      # tags, entities
    | [<>]?[:;=][-o*']?[)(](?!\w) | [<>]?[:;=]-?[DdPp\]\[@|{{](?!\w) | [-^>]_[-^<]          # smileys
    | @[A-Za-z_]\w* | \#{_L}+ | [A-Z]+\$ | [cC](?:\+\+|\#) | [A-Z]+(?:[&+][A-Z]+)+          # @us #us US$ c++ R&B
    | (?<!['\w])'[0-9]0[sS] | '[0-9][0-9](?!\S)                                             # '90s '99
    | (?i:{_FIRST_OF_TWO}) | [yYjJ]['’](?={_L})                                             # can|not y'|all
    | '[nN]' | (?i:{_any(_WITH_APOSTROPHE)})(?!\w) | (?i:[dlo]|qu)['’](?![sS]\b){_L}{{2,}}
    | [dD]'(?!s\b)                                                                          # d'|1
    | {_A}+?(?=[nN]['`][tT]) | [nN]['`][tT] | (?<!')'(?i:s|m|d|re|ve|ll)(?!{_L})            # do|n't it|'s
    | [0-9]+-[0-9]+/[0-9]+ | {_SLASH_PART}(?:/{_SLASH_PART}){{1,2}}                         # 1-1/2 and/or
    | [A-Za-z0-9][A-Za-z0-9.,]*{_HYPHENED}+(?!-?{_A})(?:\.(?=[,;:]))?                       # 1,000-pound
    | {_L}(?=\.(?:\s*\Z|\s+(?:{_OPENERS})(?!\S)))                                           # vitamin c|. The
    | (?:{_L}\.)+(?!{_L}) | (?i:ph|ed)\.[dD]\.                                              # p.m. ph.d.
    | (?:(?i:{_any(_ABBREVIATIONS)})|{_any(_CAPITALIZED)}|{_any(_CAPITALIZED.upper())})\.(?!{_L})
    | (?i:{_any(_NUMBERED)})\.(?=\s?[0-9]) | {_A}+\.(?=[,;:])                               # no. 5
    | {_L}{_A}*(?:[.!?]{_L}{_A}*)+                                                          # dog.the
    | (?<!-)(?<!\.\.)[+-]?[0-9]*(?:[.,:][0-9]+)+ | (?<!-)[+-][0-9]+                         # 12:30 .5 -5
    | {_A}+(?:[-_‐‑]{_A}+)*                                                                 # dog t-shirt
    | [!?]+ | _+ | \*\*+ | \#+ | @+ | << | >>
    | [^\s\u200b\ufeff\U00010000-\U0010ffff]
    """,
    re.VERBOSE,
)


def caption_tokens(caption: str) -> list[str]:
    """The tokens of a caption, perhaps none, that COCO's evaluation counts; a line break is a space.

    As Stanford's PTBTokenizer 3.4.1 with -preserveLines -lowerCase gives them, less the evaluation's list of
    punctuation. Contractions come apart (do n't, it 's), abbreviations keep their period (st., p.m.), numbers,
    hyphenated words and and/or stay whole; brackets count (-lrb-), and so do !! and &.

    The original sees all captions as one text: whether "the letter R." keeps its period depends on the first word of
    the next caption. Here a caption stands alone, and the period goes, as before captions that start with "A" or "The".
    Beyond that they differ where captions seldom go: "don'ts" and "'tisn't", telephone numbers with brackets, accents
    and vowel signs that are code points of their own, apostrophes inside unusual words, words glued by an @.
    """
    text = _CURLY.sub("'", caption)
    text = _ENTITY.sub(lambda found: _ENTITIES[found[1]], text).replace("\u00ad", "")
    found: list[str] = _TOKEN.findall(text)
    tokens = " ".join(_REPLACED.get(token, token.translate(_PARENTHESES)) for token in found)
    return [token for token in tokens.lower().split() if token not in _REMOVED]

"""The words of a caption as COCO's evaluation counts them: Penn Treebank tokens, lower case, without punctuation."""

import re

# as in the evaluation, which looks for upper-case brackets after lower-casing: -lrb- and its kin therefore stay
_REMOVED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_PARENTHESES = str.maketrans({"(": "-lrb-", ")": "-rrb-"})
_REPLACED = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_REPLACED |= dict.fromkeys("\"“”«»‘", "'") | dict.fromkeys("–—―…", "-")
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'", "nbsp": " "}
_ENTITY = re.compile(f"&({'|'.join(_ENTITIES)});")
_REPLACED |= {"€": "$", "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}

# abbreviations whose period is part of the word, in any case, if so capitalized, and before a number
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co
col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov govs hon
inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont
mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pres prof pte ptes pty ptys pvt rd rep reps
rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed wis
wisc wm wyo
"""
_CAPITALIZED = "ark az del ill la mass miss ore pa tex wash"
_NUMBERED = "art ca fig figs no nos op pp prop"
# apart from o'clock, d'or, l'eau and their like
_WITH_APOSTROPHE = "ma'am s'mores ne'er e'er hallowe'en hawai'i c'mon c'est n'est li'l ol' 'em 'cause 'till? 'n'?"
# one word as written, two as counted: the first part, and the second after a bar
_TWO_WORDS = "can|not gon|na got|ta wan|na gim|me lem|me 't|is 't|was y'|all"


def caption_tokens(caption: str) -> list[str]:
    """The tokens of a caption that COCO's evaluation counts.

    As Stanford's PTBTokenizer 3.4.1 with -preserveLines -lowerCase gives them, less the evaluation's list of
    punctuation. Contractions come apart (do n't, it 's), abbreviations keep their period (st., p.m.), numbers,
    hyphenated words and and/or stay whole; brackets count (-lrb-), and so do !! and &.

    What differs from the original is listed in the tests: @@@.

    Args:
        caption: text of one caption; line breaks are spaces.

    Returns:
        Tokens, perhaps none.
    """
    text = _ENTITY.sub(lambda found: _ENTITIES[found[1]], caption).replace("\u00ad", "").replace("’", "'")
    tokens = (_REPLACED.get(token, token).translate(_PARENTHESES) for token in _TOKEN.findall(text))
    return [word for token in tokens for word in token.lower().split() if word not in _REMOVED]


def _any(words: str) -> str:
    return "(?:" + "|".join(words.split()) + ")"


# a letter, and a letter or digit; Python counts fractions and superscripts as such, the tokenizer does not
_L, _A = "[^\\W\\d_²³¹¼-¾⅐-⅞]", "[^\\W_²³¹¼-¾⅐-⅞]"
_SPLIT = _any(" ".join(f"{first}(?={second}(?![-\\w]))" for first, second in (w.split("|") for w in _TWO_WORDS.split())))
_TOKEN = re.compile(
    rf"""
      https?://[^\s<>"|(){{}}]+ | www\.[^\s<>"|(){{}},]+                    # addresses
    | [\w.]+@[\w-]+(?:\.[\w-]+)*
    | </?[A-Za-z!][^<>\n]*>                                                # tags
    | [<>]?[:;=][-o*']?[)(](?!\w) | [<>]?[:;=]-?[DPp\]\[@|{{3](?!\w)        # smileys
    | [-^>]_[-^<]
    | [#@]{_L}+ | [A-Z]+\$ | [cC](?:\+\+|\#) | (?<!\w)'[0-9]0s | (?<!\w)'[0-9][0-9](?![\w'])
    | (?i:{_SPLIT})
    | (?i:{_any(_WITH_APOSTROPHE)})(?!\w) | [dDlLoO]'(?![sS]\b){_L}+ | [yYjJ]'(?={_L})
    | {_A}+?(?=[nN]'[tT]) | [nN]'[tT] | '(?i:s|m|d|re|ve|ll)(?!{_L})
    | [A-Z]+(?:[&+][A-Z]+)+
    | (?:{_L}\.)+(?!{_L})(?:(?<=[.]){_L}?-{_A}+)? | (?i:ph|ed)\.[dD]\.
    | (?:(?i:{_any(_ABBREVIATIONS)})|(?:{_any(_CAPITALIZED.title())}|{_any(_CAPITALIZED.upper())}))\.(?!{_L})
    | (?i:{_any(_NUMBERED)})\.(?=\s?[0-9])
    | {_L}+(?:[.!?]{_L}+)+
    | [+-]?[0-9]*(?:[.,][0-9]+)+(?:-{_A}+)* | [+-]?[0-9]+(?::[0-9]+)+ | [+-]?[0-9]+-[0-9]+/[0-9]+
    | [A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}){{1,2}}
    | {_A}+(?:[-_\u2010\u2011]{_A}+)* | [+-][0-9]+
    | \.\.\. | [!?]+ | -+ | _+ | \*\*+ | \#+ | @+ | << | >>
    | [^\s\u200b\ufeff\U00010000-\U0010ffff]
    """,
    re.VERBOSE,
)

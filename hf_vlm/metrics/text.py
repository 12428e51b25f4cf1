"""Caption tokenizer of the COCO caption evaluation: Penn Treebank tokens, lower case, no punctuation.

- The rules are those of Stanford's PTBTokenizer 3.4.1 as pycocoevalcap calls it. They were derived from the output of
  that program and are written as one regular expression, so no Java is needed.
- **Kept together**: `t-shirt`, `and/or`, `o'clock`, `10:30`, `1,000`, `a.m.`, `St.` and other abbreviations with their
  full stop, a single letter with its full stop at the end of a sentence (`plan b.`), `!!`.
- **Split**: `'s`, `n't` and similar clitics (`ca n't`), `can not`, `gon na`, `$ 5`, `50 %`, `b & w` (but `AT&T`).
- **Not removed**, as in PTBTokenizer: brackets, which become `-lrb-`, `-rrb-` etc., and symbols that are not in
  pycocoevalcap's list.

Captions, emoji names and plain prose give exactly PTBTokenizer's tokens. Known differences:

- emoticons, superscripts, `c++`, tags with attributes, CJK brackets, typographic apostrophes inside names;
- adjacent numbers that look like a telephone number or a mixed fraction (PTBTokenizer: one token with a no-break
  space);
- clitics in unusual places (`5n't`, `gonna'll`);
- the full stop after a single letter. PTBTokenizer drops it if the next sentence, even in the next caption, begins with
  a word such as `A` or `The`. Here the tokens of a caption depend on that caption only.
"""

import re

# Capitalised entries are abbreviations only when capitalised: in lower case they are ordinary words.
ABBREVIATIONS = frozenset(
    "adj adm adv al ala apr ariz assn asst aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co col colo comdr"
    " conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov hon inc ind"
    " insp intl invt jan jos jr jul jun kan ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr"
    " mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc pres prof pte pty pvt rd rep rev rt sen sep sept"
    " seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs tue tues univ va vs vt wed wis wm wyo Ark Az Del Ill"
    " La Mass Miss Ore Pa Tex Wash".split()
)
PARTS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}
LETTERS = r"[^\W\d_]"
# Letters, digits and combining marks.
WORD = r"[\w\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0900-\u0dff\u0e00-\u0eff]+"
TOKEN = re.compile(
    rf"""
      https?://[^\s<>"()]*[\w/]                                      # web and mail addresses
    | [\w.+-]+@\w+(?:[.-]\w+)*
    | </?[a-z!][^\s<>]*>                                             # tags, such as <unk>
    | [#@][a-z_]\w*                                                  # hash tags and user names
    | '(?:s|m|d|re|ve|ll|tis|twas|em|til|cause|\d\ds)(?!\w) | 'n(?!\w)'?
    | n't(?!\w)
    | (?:art|ca|figs?|nos?|op|pp)\.(?=\s*\d)                         # No. 5
    | (?:[a-z]\.){{2,}}(?!\w)(?:-{WORD})* | [a-z]\.(?![\w.])         # a.m., and the last letter of a sentence
    | [dlo]'{LETTERS}\w*                                             # o'clock
    | (?:ma'am|ne'er|e'er|c'mon|b'day|s'mores|hawai'i|xi'an|[jy]')
    | [+-]?\d*(?:[.,:/]\d+)+(?:-{WORD})* | [+-]\d+(?!\w)             # numbers
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                                       # AT&T
    | \w+?(?=n't(?!\w))
    | (?P<word>{WORD}(?:[-/]{WORD} | (?<=[^\W\d_])\.(?={LETTERS}){WORD})*(?:\.(?!\w))?)  # joined by - / .
    | -[lr][crs]b- | [?!]+ | \.+ | -+ | \*+ | \S
    """,
    flags=re.VERBOSE | re.IGNORECASE,
)
DROPPED = re.compile(r"[-.]+|[\"'`,:;?!]")
# Characters that the Penn Treebank writes differently. The Java program does not know emoji outside the Basic
# Multilingual Plane.
CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("‘’", "'"),
        **dict.fromkeys("“”«»", '"'),
        **dict.fromkeys("–—", "--"),
        **dict.fromkeys("\u00ad\u200b\u200c\u200d\ufe0e\ufe0f\ufeff"),
        "…": "...",
        "½": " 1/2 ",
        "¼": " 1/4 ",
        "¾": " 3/4 ",
        "£": "#",
        "€": "$",
        "¢": " cents ",
    }
)
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"'}
ENTITY = re.compile("|".join(ENTITIES))
ASTRAL = re.compile("[\U00010000-\U0010ffff]")
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def ptb_tokenize(caption: str) -> list[str]:
    """Tokens of a caption, in lower case.

    >>> ptb_tokenize("A man's dog can't run (fast).")
    ['a', 'man', "'s", 'dog', 'ca', "n't", 'run', '-lrb-', 'fast', '-rrb-']
    """
    text = ASTRAL.sub(" ", caption.translate(CHARACTERS))
    if "&" in text:
        text = ENTITY.sub(lambda match: ENTITIES[match[0]], text)
    words: list[str] = []
    for match in TOKEN.finditer(text):
        token = match[0]
        if DROPPED.fullmatch(token):
            continue
        word = token.lower()
        if match.lastgroup == "word" and word[-1] == "." and ABBREVIATIONS.isdisjoint({token[:-1], word[:-1]}):
            word = word[:-1]
        words.extend(PARTS.get(word) or (BRACKETS.get(word, word),))
    return words


__all__ = ["ptb_tokenize"]

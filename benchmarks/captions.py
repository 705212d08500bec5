"""The score of captions: CIDEr of sentences against several references.

    caption_scores(answers, references)  ->  {"CIDEr": mean}

CIDEr-D, the variant that COCO's evaluation code (coco-caption, pycocoevalcap) computes: Vedantam et
al., arXiv 1411.5726. Papers print it times 100. Sentences are split into words as in the Penn
Treebank ("isn't" is "is n't"), in lower case, without punctuation. The official tokenizer is a Java
program with thousands of rules. Ours has those that English captions need, and tests/test_scores.py
compares it with recorded output of the official one.
"""

import math
import re
from collections import Counter

# --- words --------------------------------------------------------------------------------

# Tokens that are dropped.
PUNCTUATION = re.compile(r"""[.?!,:;'"`–—―…-]|\.{2,}|-{2,4}""")
RENAMED = """
    (=-lrb-, )=-rrb-, [=-lsb-, ]=-rsb-, {=-lcb-, }=-rcb-, £=#, €=$, ¢=cents, cannot=can not,
    gonna=gon na, wanna=wan na, gotta=got ta, gimme=gim me, lemme=lem me, 'tis='t is, 'twas='t was
"""
RENAMED = dict(pair.strip().split("=") for pair in RENAMED.split(","))
QUOTES = """’=' ‘=' “=" ”=" ½=1/2 ¼=1/4 ¾=3/4"""
QUOTES = str.maketrans(dict(pair.split("=") for pair in QUOTES.split()))
ABBREVIATIONS = r"""
    mr|mrs|ms|dr|prof|st|ave|blvd|rd|mt|ft|jr|sr|inc|co|corp|ltd|vs|etc|pres|gov|sen|rep|gen|col|
    capt|lt|sgt|rev|jan|feb|mar|apr|jun|jul|aug|sept|sep|oct|nov|dec|bros|esq|ph\.d
"""
# Of the penalty on different lengths, in words.
SIGMA = 6.0
# A letter or digit; those of a word may have "_" between them.
LETTER = r"[^\W_]"
END = f"(?!{LETTER})"
WORD = rf"{LETTER}(?:\w*{LETTER})?"
TOKEN = re.compile(
    rf"""
    # addresses
    -[lr][rsc]b- | (?:https?://|www\.)[^\s"]*[^\s".,:;!?()]
    # mail, HTML
  | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | </?[a-z]+>
    # runs
  | \.{{2,}} | -{{2,}} | [?!]+
    # words that begin with an apostrophe
  | 'n' | '(?:em|cause|til|n|tis|twas){END} | '\d0s{END}
    # second halves of words
  | '(?:s|m|d|re|ve|ll){END} | n't{END}
    # abbreviations with their dot
  | (?:{ABBREVIATIONS})\.{END} | no\.(?=\s*\d) | [^\W\d_]+\.(?=[,;:])
    # initials: p.m., U.S., A.
  | (?<!{LETTER}|')(?:[a-z]\.)+(?:[a-z](?![\w'-])\.?)?
    # 10:30|am, 0.5|ms, 3/4-size, 1 1/2
  | \d+:\d+(?=[ap]\.?m) | \d+\.\d+(?=[a-z]) | \d+/\d+-\w+ | \d+\s+\d+/\d+{END}
    # other numbers, times, fractions
  | (?<!{LETTER})[-+]?(?:\d+(?:[.,:/-]\d+)*|\.\d+)(?!{LETTER}|[-']\w) | \.\d+(?:\.\d+)*
    # two words in one; AT&T
  | (?:cannot|gonna|wanna|gotta|gimme|lemme){END}(?!-) | (?-i:[A-Z]+&[A-Z]+){END}
    # first halves of isn't, ...
  | [^\W\d_]+(?=n't{END})
    # words with an apostrophe inside
  | o'clock | ma'am | c'mon | ne'er | [od]'[a-z]{{2,}} | d'you | y'
    # words, also joined ones
  | {WORD}(?:[-/]{WORD}|[.?!][^\W\d_]+)*
  | @\w+ | \#[a-z]\w*
    # Markdown: **, __, ##
  | \*+ | _+ | \#+ | @+ | \S
""",
    re.VERBOSE | re.IGNORECASE,
)


def words(sentence):
    """Split a sentence as coco-caption does: "The dog's ball." -> ["the", "dog", "'s", "ball"]."""
    found = []
    for token in TOKEN.findall(sentence.translate(QUOTES)):
        token = token.lower()
        # "1 1/2" is one match and two words.
        found += RENAMED.get(token, token).split()
    return [token for token in found if not PUNCTUATION.fullmatch(token)]


# --- scores -------------------------------------------------------------------------------


def ngrams(tokens):
    """Count all n-grams of a list of words, n = 1..4; each is a tuple."""
    found = Counter()
    for n in range(1, 5):
        found.update(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return found


def cider(answers, references):
    """Return CIDEr-D of every answer, lists of words against lists of references.

    A sentence is a vector of its n-grams' counts, each weighted by how few images have the n-gram
    in a reference. The score is 10 times the cosine of answer and reference, with clipped counts
    and a penalty on different lengths, averaged over references and n = 1..4. For a single image
    every weight is 0.
    """
    images = Counter()
    for others in references:
        images.update(set().union(*map(ngrams, others)))

    def vectors(tokens):
        """Return the weights of all n-grams, a dict for each n."""
        weights = [{}, {}, {}, {}]
        for gram, count in ngrams(tokens).items():
            rarity = math.log(len(references)) - math.log(max(1, images[gram]))
            weights[len(gram) - 1][gram] = count * rarity
        return weights

    scores = []
    for answer, others in zip(answers, references, strict=True):
        weights, total = vectors(answer), 0.0
        for other in others:
            # In bigrams, as in the official code.
            difference = max(1, len(answer)) - max(1, len(other))
            penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
            for a, b in zip(weights, vectors(other), strict=True):
                product = sum(min(a[gram], b[gram]) * b[gram] for gram in a if gram in b)
                norm = math.hypot(*a.values()) * math.hypot(*b.values())
                total += penalty * product / norm if norm else 0.0
        scores.append(10 * total / (4 * len(others)))
    return scores


def caption_scores(answers, references):
    """Score texts against a list of reference texts each -> {"CIDEr": mean}."""
    answers = [words(answer) for answer in answers]
    references = [[words(text) for text in texts] for texts in references]
    return {"CIDEr": sum(cider(answers, references)) / len(answers)}

"""Scores of captions: CIDEr, BLEU-1 to 4 and ROUGE-L of sentences against several human ones.

    caption_scores([(answer, [reference, ...]), ...])  ->  {"CIDEr", "BLEU-1", ..., "BLEU-4", "ROUGE-L"}, 1 where papers print 100

What COCO's evaluation code (coco-caption, pycocoevalcap) computes, in Python alone. Sentences are cut into words as the Penn
Treebank does ("isn't" is "is n't"), lower-cased, and their punctuation is left out; METEOR and SPICE, which are Java programs,
are not here. The official tokenizer, one more of those, has thousands of rules; ours has the ones that English captions meet,
and tests/test_scores.py holds it to recorded output of the official one.

CIDEr (its variant D, the one that the code computes): Vedantam et al., arXiv 1411.5726. BLEU: Papineni et al., ACL 2002. ROUGE-L:
Lin, ACL 2004.
"""
import math
import re
from collections import Counter

# --- words ----------------------------------------------------------------------------------------------------------

PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}     # tokens that are left out
OTHERS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", '"': "''", "£": "#",
          "€": "$", "¢": "cents", "–": "--", "—": "--", "―": "--", "…": "..."}
QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "½": "1/2", "¼": "1/4", "¾": "3/4"})
SPLIT = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta", "gimme": "gim me", "lemme": "lem me",
         "'tis": "'t is", "'twas": "'t was"}                         # "-lrb-" stays in: the official list has it in capitals only
ABBREVIATIONS = "|".join("""mr mrs ms dr prof st ave blvd rd mt ft jr sr inc co corp ltd vs etc pres gov sen rep gen col capt lt
                         sgt rev jan feb mar apr jun jul aug sept sep oct nov dec bros esq ph.d""".split()).replace(".", r"\.")
TOKEN = re.compile(rf"""
    -[lr][rsc]b- | (?:https?://|www\.)[^\s"]*[^\s".,:;!?()]                        # addresses
  | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | </?[a-z]+>                                      # mail, HTML
  | \.{{2,}} | -{{2,}} | [?!]+                                                     # runs
  | 'n' | '(?:em|cause|til|n|tis|twas)\b | '\d0s\b                                 # words that begin with an apostrophe
  | '(?:s|m|d|re|ve|ll)(?!\w) | n't(?!\w)                                          # second halves of words
  | (?:{ABBREVIATIONS})\.(?!\w) | no\.(?=\s*\d) | [^\W\d_]+\.(?=[,;:])             # abbreviations keep their dot,
  | (?<![\w'])(?:[a-z]\.)+(?:[a-z](?![\w'-])\.?)?                                  # and so do initials: p.m., U.S., A.
  | \d+:\d+(?=[ap]\.?m) | \d+\.\d+(?=[a-z]) | \d+/\d+-\w+ | \d+\s+\d+/\d+(?!\w)    # 10:30|am, 0.5|ms, 3/4-size, 1 1/2
  | (?<!\w)[-+]?(?:\d+(?:[.,:/-]\d+)*|\.\d+)(?!\w|[-']\w) | \.\d+(?:\.\d+)*        # other numbers, times, fractions
  | (?:cannot|gonna|wanna|gotta|gimme|lemme)\b(?!-) | (?-i:[A-Z]+&[A-Z]+)\b        # two words in one; AT&T
  | [^\W\d_]+(?=n't(?!\w))                                                         # first halves of isn't, ...
  | o'clock | ma'am | c'mon | ne'er | [od]'[a-z]{{2,}} | d'you | y'                # words with an apostrophe inside
  | \w+(?:[-_/]\w+|[.?!][^\W\d]+)*                                                 # words, also joined ones
  | @\w+ | \#[a-z]\w* | \S
""", re.VERBOSE | re.IGNORECASE)


def words(sentence):
    """A sentence -> its words as coco-caption gives them: "The dog's (red) ball." -> ["the", "dog", "'s", "-lrb-", "red",
    ...]."""
    found = []
    for token in TOKEN.findall(sentence.translate(QUOTES)):
        token = token.lower()
        token = "..." if re.fullmatch(r"\.{2,}", token) else "--" if re.fullmatch("-{2,4}", token) else token
        found += SPLIT.get(token, OTHERS.get(token, token)).split()
    return [token for token in found if token not in PUNCTUATION]


# --- scores ---------------------------------------------------------------------------------------------------------

def ngrams(tokens, longest=4):
    """Words -> Counter of all their n-grams, n = 1..longest, each a tuple."""
    return Counter(tuple(tokens[i:i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1))


def bleu(answers, references, longest=4):
    """Lists of words, lists of lists of words -> [BLEU-1, ..., BLEU-longest] of the whole set: the geometric mean of the
    precisions of n-grams (each counted at most as often as in the one reference that has it most), times the brevity penalty
    against the reference closest in length. The tiny numbers are the official code's; they keep 0/0 at 0."""
    right, said, length, closest = [0] * longest, [0] * longest, 0, 0
    for answer, others in zip(answers, references):
        most = Counter()
        for other in others:
            most |= ngrams(other, longest)
        for gram, count in (ngrams(answer, longest) & most).items():
            right[len(gram) - 1] += count
        said = [total + max(0, len(answer) - n) for n, total in enumerate(said)]
        length += len(answer)
        closest += min((abs(len(other) - len(answer)), len(other)) for other in others)[1]
    product, scores = 1.0, []
    for n in range(longest):
        product *= (right[n] + 1e-15) / (said[n] + 1e-9)
        scores.append(product ** (1 / (n + 1)))
    ratio = (length + 1e-15) / (closest + 1e-9)
    return [score * math.exp(1 - 1 / ratio) if ratio < 1 else score for score in scores]


def common_subsequence(a, b):
    """Length of the longest common subsequence of two lists."""
    row = [0] * (len(b) + 1)                                         # row[j]: of a so far, and b[:j]
    for one in a:
        before = row[:]
        for j, other in enumerate(b, start=1):
            row[j] = before[j - 1] + 1 if one == other else max(before[j], row[j - 1])
    return row[-1]


def rouge_l(answer, references, beta=1.2):
    """Words, list of lists of words -> F-measure of the longest common subsequence, with the best precision and the best recall
    over the references. An empty sentence counts as one empty word, as in the official code."""
    answer, references = answer or [""], [reference or [""] for reference in references]
    common = [common_subsequence(answer, reference) for reference in references]
    precision = max(common) / len(answer)
    recall = max(same / len(reference) for same, reference in zip(common, references))
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision) if precision and recall else 0.0


def cider(answers, references, sigma=6.0):
    """Lists of words, lists of lists of words -> CIDEr-D of every answer. Each sentence is a vector of its n-grams' counts,
    weighted by how few of the pictures have the n-gram in a reference; an answer scores 10 times its cosine with each
    reference, counts clipped, lengths compared, the mean over references and n = 1..4. It is meant for a set: of one
    picture every weight is 0."""
    pictures = Counter(gram for others in references for gram in set().union(*map(ngrams, others)))
    logarithm = math.log(len(references))

    def vector(tokens):                                              # a dict for each n, their norms, and the length, in
        vectors = [{}, {}, {}, {}]                                   # bigrams (so the official code measures it)
        for gram, count in ngrams(tokens).items():
            vectors[len(gram) - 1][gram] = count * (logarithm - math.log(max(1, pictures[gram])))
        return vectors, [math.sqrt(sum(v * v for v in one.values())) for one in vectors], max(0, len(tokens) - 1)

    scores = []
    for answer, others in zip(answers, references):
        said, said_norms, said_length = vector(answer)
        total = 0.0
        for there, there_norms, there_length in map(vector, others):
            penalty = math.exp(-(said_length - there_length) ** 2 / (2 * sigma ** 2))
            for n in range(4):
                product = sum(min(value, there[n].get(gram, 0.0)) * there[n].get(gram, 0.0) for gram, value in said[n].items())
                norms = said_norms[n] * there_norms[n]
                total += penalty * (product / norms if norms else product)
        scores.append(10 * total / (4 * len(others)))
    return scores


def caption_scores(pairs):
    """[(answer, [reference, ...]), ...], texts, a pair a picture -> {metric: value}."""
    answers = [words(answer) for answer, _ in pairs]
    references = [[words(text) for text in texts] for _, texts in pairs]
    return {"CIDEr": sum(cider(answers, references)) / len(pairs),
            **{f"BLEU-{n}": value for n, value in enumerate(bleu(answers, references), start=1)},
            "ROUGE-L": sum(map(rouge_l, answers, references)) / len(pairs)}

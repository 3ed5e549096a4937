"""Laws of tests/prose.py: sentences of known length."""

import prose
import pytest

PAGE = """# A heading of very many words is no sentence at all

Five words are in this. The model, e.g. of Fig. 3, takes 0.5 s (`a b c` or $x + y$) here!
It goes on
over a line, see [the whole page](page.md). ![An image](a.png)

- An item without its end
- An item with its end.

```sh
echo this is code. It is not counted at all.
```

| name | what it is |
|---|---|
| cell | A sentence in a cell. |
"""


@pytest.mark.parametrize(
    ("line", "words", "ended"),
    [
        (3, 5, True),
        (3, 13, True),
        (4, 10, True),
        (7, 5, False),
        (8, 5, True),
        (16, 5, True),
    ],
)
def test_a_sentence_is_found_with_its_line_and_length(line, words, ended):
    found = [(s.line, s.words, s.ended) for s in prose.sentences(PAGE)]
    assert (line, words, ended) in found


def test_nothing_else_is_a_sentence():
    assert sum(s.ended for s in prose.sentences(PAGE)) == 5


@pytest.mark.parametrize(
    "text", ["It is so, i.e. short.", "A. Smith et al. found it.", "At 3.5 s."]
)
def test_abbreviations_initials_and_decimals_end_nothing(text):
    assert [s.text for s in prose.sentences(text)] == [text]


@pytest.mark.parametrize("text", ["Is it? Yes.", "(It is.) So there.", "**It is.** `So` there."])
def test_marks_end_sentences_within_brackets_and_before_code(text):
    assert len(list(prose.sentences(text))) == 2


@pytest.mark.parametrize("words", [prose.LONGEST, prose.LONGEST + 1])
def test_one_word_too_many_is_told_with_its_place(words):
    page = "Short.\nShort.\n\n" + " ".join(["word"] * words) + ".\n"
    lines, _ = prose.mistakes("page.md", page)
    assert [line.split(" words")[0] for line in lines] == ["page.md:4: 31"] * (words - 30)


@pytest.mark.parametrize(("length", "wrong"), [(17, False), (18, True)])
def test_the_mean_must_be_below(length, wrong):
    lines, mean = prose.mistakes("page.md", (" ".join(["word"] * length) + ". ") * 3)
    assert bool(lines) == wrong and mean.startswith(f"{length:5.1f}")

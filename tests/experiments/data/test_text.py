"""Text: splits that cover it, an alphabet from the training part alone, windows by step."""

from __future__ import annotations

import warnings

import pytest
import torch

from diffusionblocks.experiments.data import text
from diffusionblocks.experiments.data.vocabulary import Characters


def test_the_embedded_text_is_split_without_loss_or_overlap():
    data = text.load("topics", vocab_size=64)
    documents = text.load_documents("topics")
    total = sum(map(len, documents)) + 2 * (len(documents) - 1)
    parts = [len(data.train), len(data.val), len(data.test)]
    assert sum(parts) == total > 3e5 and parts[1] == parts[2] == int(0.05 * total)
    assert len(data.vocabulary.alphabet) == 64 and int(data.train.max()) == 63
    known = (data.test < 63).double().mean()
    assert known > 0.98, "nearly all characters are in the alphabet"


def test_text_survives_encoding_and_decoding():
    data = text.load("topics", vocab_size=64)
    assert data.decode(data.vocabulary.encode("the value of x")) == "the value of x"
    assert data.decode(data.vocabulary.encode("a☃b")) == f"a{text.UNKNOWN}b"


def test_an_alphabet_smaller_than_the_vocabulary(tmp_path):
    """A network may say any of its symbols, also those that no character of the text stands for."""
    (tmp_path / "genome.txt").write_text("acgt" * 50, encoding="utf-8")
    data = text.load(str(tmp_path / "genome.txt"), vocab_size=9)
    assert data.vocabulary.alphabet[:4] == "acgt" and data.decode(torch.arange(9)) == data.vocabulary.alphabet
    assert data.decode(data.vocabulary.encode("tag?")) == f"tag{text.UNKNOWN}"


def test_characters_beyond_the_alphabet_are_counted_and_told(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("é☃" + "acgt" * 50, encoding="utf-8")
    with pytest.warns(
        UserWarning,
        match=r"the text .*a\.txt: 2 of 202 characters \(0\.99%\) are beyond the 4 .* become U\+FFFD, the replacement "
        r"character: 2 rare ones, most often '\xe9', '\u2603'; --model\.vocab-size 7 keeps",  # equal counts: by code
    ):
        data = text.load(str(path), vocab_size=5)
    assert data.decode(torch.cat([data.train, data.val, data.test])).count(text.UNKNOWN) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.load(str(path), vocab_size=7)
        text.load(str(path), vocab_size=5)  # what was told once isn't told again


def test_too_many_of_them_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x4F00))) * 3, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.txt: .* of 768 characters .* More than 10% is refused: raise it"):
        text.load(str(tmp_path / "a.txt"), vocab_size=64)
    text._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="topics: "):
        text.load("topics", vocab_size=12)  # for trials with small networks


@pytest.mark.parametrize("prompt", ["aé", "a\ufffd"])
def test_a_prompt_beyond_the_alphabet_is_refused_with_a_count(prompt):
    with pytest.raises(ValueError, match="1 of 2 characters, the model knows 'acgt'"):
        Characters("acgt" + text.UNKNOWN).check(prompt)


def test_every_split_must_have_its_windows(tmp_path):
    (tmp_path / "short.txt").write_text("acgt" * 300, encoding="utf-8")  # 60 characters to validate and to test
    data = text.load(str(tmp_path / "short.txt"), vocab_size=9)
    data.check_windows(30, 2)
    with pytest.raises(ValueError, match="a split holds 60 tokens, less than 2 windows of length=31"):
        data.check_windows(31, 2)


def test_facts_tell_texts_and_alphabets_apart(tmp_path):
    path, prints = tmp_path / "a.txt", []
    for content, symbols in (("acgt" * 50, 9), ("acgt" * 50, 9), ("bcgt" * 50, 9), ("acgt" * 50, 8)):
        path.write_text(content, encoding="utf-8")
        prints.append(str(text.load(str(path), vocab_size=symbols).facts()))
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("abc " * 50, encoding="utf-8")
    (tmp_path / "b.txt").write_text("äöü " * 50, encoding="utf-8")
    (tmp_path / "c.md").write_text("not read", encoding="utf-8")
    data = text.load(str(tmp_path), vocab_size=8)
    assert sum(map(len, (data.train, data.val, data.test))) == 402
    assert len(text.load_documents(str(tmp_path / "a.txt"))) == 1


def test_a_local_copy_of_a_hub_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "", "three"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "copy"))
    assert text.load_documents(f"hub:{tmp_path / 'copy'}") == ["one", "three"]
    datasets.DatasetDict({"train": rows.rename_column("text", "body")}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="lacks a column 'text'"):
        text.load_documents(f"hub:{tmp_path / 'other'}")


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a text file"):
        text.load_documents(str(tmp_path / "nothing.txt"))
    with pytest.raises(FileNotFoundError, match=r"nor a folder with"):
        text.load_documents(str(tmp_path))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        text.load_documents(str(tmp_path))
    (tmp_path / "binary.txt").write_text("short")
    with pytest.raises(ValueError, match="too few"):
        text.load(str(tmp_path), vocab_size=4)
    with pytest.raises(ValueError, match="a window 9"):
        text.Windows(torch.arange(8), 9, 1, seed=0, device="cpu")


def test_windows_are_a_function_of_seed_and_step():
    tokens = torch.arange(1000)
    batches = [text.Windows(tokens, 16, 4, seed=seed, device="cpu").batch(step) for seed, step in
               ((0, 0), (0, 0), (0, 1), (1, 0))]  # fmt: skip
    assert all(torch.equal(x, y) and x.shape == (4, 16) for x, y in batches)
    assert all(torch.equal(x.diff(dim=1), torch.ones(4, 15, dtype=torch.int64)) for x, _ in batches)
    assert torch.equal(batches[0][0], batches[1][0])
    assert not torch.equal(batches[0][0], batches[2][0]) and not torch.equal(batches[0][0], batches[3][0])
    ends = torch.cat([text.Windows(torch.arange(17), 16, 64, seed=0, device="cpu").batch(0)[0][:, 0]])
    assert set(ends.tolist()) == {0, 1}, "the last window is drawn too"


def test_rows_cover_a_split_once():
    assert torch.equal(text.rows(torch.arange(11), 3), torch.arange(9).view(3, 3))

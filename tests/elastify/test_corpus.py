"""Training data: folders of text, batches, iterators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastic_infer.elastify.corpus import Corpus, IteratorData
from elastic_infer.errors import InvalidRequest


def letters(text: str) -> list[int]:
    return [ord(c) % 48 for c in text]


def test_corpus_reads_text_and_lines(tmp_path):
    (tmp_path / "b.txt").write_text("hello world")
    (tmp_path / "a.jsonl").write_text(
        '{"input_ids": [5, 6, 7]}\n\n{"text": "ab"}\n{"prompt": "c", "completion": "d"}\n'
    )
    (tmp_path / "skipped.bin").write_bytes(b"\xff")
    done = []
    found = Corpus.from_folder(
        tmp_path, letters, 4, end_token=2, vocab_size=48, progress=done.append
    )
    ids = np.concatenate([found.train, found.held_out]).tolist()
    assert ids == [5, 6, 7, 2, *letters("ab"), 2, *letters("cd"), 2, *letters("hello world"), 2]
    assert len(found.held_out) == 4 and len(done) == 2
    cached = Corpus.from_folder(tmp_path, letters, 4, end_token=2, cache=tmp_path / "tokens")
    again = Corpus.from_folder(tmp_path / "gone", None, 4, cache=tmp_path / "tokens")
    assert cached.train.tolist() == again.train.tolist() == found.train.tolist()


def test_corpus_batches_cover_every_sequence_once_an_epoch_and_can_be_skipped():
    found = Corpus(np.arange(100, dtype=np.int32), 10)
    stream = found.batches(3, 10, seed=1)
    first = [next(stream).ids for _ in range(6)]
    starts = [int(row[0]) for ids in first for row in ids]
    assert sorted(starts[:9]) == sorted(starts[9:18]) == list(range(0, 90, 10))
    assert starts[:9] != starts[9:18]
    skipped = found.batches(3, 10, seed=1, skip=2)
    assert torch.equal(next(skipped).ids, first[2])
    assert found.validation(4, 10, 4)[0].ids.tolist() == [list(range(90, 100))]


def test_corpus_refuses_what_holds_no_tokens(tmp_path):
    def refused(match, name="x", encode=letters, text=None, **options):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(InvalidRequest, match=match):
            Corpus.from_folder(tmp_path, encode, 4, **options)

    refused("must hold .txt, .md, .jsonl, .json files, got none")
    refused("at least one token, got none", "a.txt", text="  ")
    refused("at least one token, got none", cache=tmp_path / "tokens")
    refused("at least 8 tokens", "a.txt", text="abc")
    refused("must have a tokenizer", encode=None)
    refused(r"b.jsonl line 2 must be one JSON object", "b.jsonl", text='{"text": "a"}\n{oops\n')
    refused('must be an object with "text"', "b.jsonl", text='{"other": 1}\n')
    refused(
        r"must lie in 0\.\.9, got 1\.\.77", "b.jsonl", text='{"input_ids": [1, 77]}', vocab_size=10
    )
    with pytest.raises(InvalidRequest, match="which is neither"):
        Corpus.from_folder(tmp_path / "nowhere", letters, 4)


def test_iterator_data_goes_around_a_list_and_cuts_to_the_stage():
    parts = [torch.arange(8)[None], torch.arange(8, 16)[None]]
    data = IteratorData(parts, [torch.ones(1, 9).long()])
    stream = data.batches(1, 3, 0)
    assert [next(stream).ids[0].tolist() for _ in range(3)] == [[0, 1, 2], [8, 9, 10], [0, 1, 2]]
    assert next(data.batches(1, 8, 0, skip=1)).ids[0, 0] == 8
    assert data.validation(1, 4, 3)[0].ids.shape == (1, 4)
    once = IteratorData(iter([torch.ones(1, 4).long()] * 3))
    next(once.batches(1, 4, 0))
    with pytest.raises(InvalidRequest, match="cannot go back to batch 0, it is at 1"):
        next(once.batches(1, 4, 0))

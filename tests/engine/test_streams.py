"""A stream that is left, in whatever way and at whatever moment, ends its request."""

from __future__ import annotations

import gc

import pytest

from elastic_infer import SamplingParams
from support.engines import assert_all_free, held, open_engine, write_text_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with open_engine(write_text_model(tmp_path_factory.mktemp("model"))) as engine:
        yield engine
        assert_all_free(engine)


def _closed(stream):
    stream.close()
    assert next(stream, None) is None


def _left(stream):
    with stream:
        pass


def _raised(stream):
    try:
        raise ValueError("before the first token")
    except ValueError:
        pass


@pytest.mark.parametrize("leave", [_closed, _left, _raised])
def test_a_stream_left_before_its_first_token_is_cancelled(engine, leave):
    """Stands for all ways to leave a stream that was never asked for a token: it is closed,
    dropped, or its user fails first."""
    with held(engine):
        stream = engine.stream("a", SamplingParams(max_tokens=40, ignore_eos=True))
        request = stream._request
        leave(stream)
        del stream
        gc.collect()
        assert request.cancelled
    output = request.wait(60)
    assert output.finish_reason == "cancelled" and output.token_ids == []


def test_a_stream_that_has_ended_is_not_cancelled(engine):
    stream = engine.stream("a", SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(list(stream)) == 4 and next(stream, None) is None
    stream.close()
    assert not stream._request.cancelled


def test_a_stream_interrupted_while_it_waits_is_cancelled(engine):
    """Stands for exceptions out of `next`: of the request, or of a signal."""
    stream = engine.stream("a", SamplingParams(max_tokens=40))

    class Events:
        def get(self, timeout):
            raise KeyboardInterrupt

    events, stream._request.events = stream._request.events, Events()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    stream._request.events = events
    assert stream._request.cancelled

"""No verdict of a test depends on the pace of threads or of the machine."""

import ast
from pathlib import Path

from hypothesis import settings

TESTS = Path(__file__).resolve().parents[1]
WAITS = {"wait", "join", "result", "get", "communicate", "run"}
LEAST = 60  # seconds: a shorter limit would tell slow from quick, not hanging from running


def hurried(source: str) -> list[str]:
    """Calls that sleep, or that give a wait a limit which a slow machine may reach."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        limits = [k.value for k in call.keywords if k.arg == "timeout"]
        if call.func.attr in WAITS - {"get", "run"}:
            limits += call.args[:1]
        numbers = [n.value for n in limits if isinstance(n, ast.Constant)]
        few = [n for n in numbers if isinstance(n, (int, float)) and 0 < n < LEAST]
        if call.func.attr == "sleep" or (call.func.attr in WAITS and few):
            found.append(f"line {call.lineno}: {ast.unparse(call)[:80]}")
    return found


def test_no_test_sleeps_or_waits_for_a_short_time():
    """Stands for races: threads are led by barriers, held engines and injected clocks, and a limit
    only tells of a hang."""
    found = {str(p.relative_to(TESTS)): hurried(p.read_text()) for p in TESTS.rglob("*.py")}
    assert not {name: calls for name, calls in found.items() if calls}


def test_it_finds_what_it_is_for():
    bad = ["time.sleep(1)", "event.wait(5)", "t.join(timeout=2.5)", "subprocess.run(x, timeout=9)"]
    good = [
        "event.wait()",
        "event.wait(0)",
        "event.wait(HANG)",
        "t.join(60)",
        "x.get('a')",
        "', '.join(names)",
    ]
    assert all(map(hurried, bad)) and not any(map(hurried, good))


def test_examples_of_properties_have_no_deadline():
    assert settings.default.deadline is None

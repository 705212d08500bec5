"""bench.py load: it measures what it says, and leaves nothing behind."""
import json
from pathlib import Path

import pytest

import bench
from hub import InputError


def test_loading_a_small_llama_is_timed_and_copies_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bench.main(["load", "--layers=1", "--repeats=1", "--device=cpu", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bytes"] == 2 * (2 * 32000 * 2048 + 2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 5632 * 2048 + 3 * 2048)
    for contender in ("ours", "floor"):
        assert 0 < result[contender]["load"] < result[contender]["seconds"]
    assert result["ours_over_floor"] > 0
    if Path("/proc/self/status").exists():
        assert result["ours"]["anonymous"] < 0.1 * result["bytes"]   # 350 MB of weights, none of them copied
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [
    (["save"], "no such benchmark; there is load"), (["--vs=llamafile"], "only transformers can be compared with"),
    (["--repeats=0"], "must be 1 or more")])
def test_what_cannot_be_measured_is_one_line(arguments, message):
    with pytest.raises(InputError, match=message):
        bench.main(arguments)
